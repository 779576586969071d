"""The doctor: is a defense's robustness real, or an artefact of gradients that lead attacks nowhere?"""

from robench.doctor.diagnosis import CHECKS, EXAMPLES, Diagnosis, as_json, as_table, check_budget, examine, facts, state

__all__ = ["CHECKS", "EXAMPLES", "Diagnosis", "as_json", "as_table", "check_budget", "examine", "facts", "state"]
