"""What a check of the doctor finds, and what counts as clearly less robust."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from robench.estimate import Estimate

ATHALYE, CARLINI, PINTOR = "arXiv 1802.00420, section 3.1", "arXiv 1902.06705, section 5", "arXiv 2106.09947"
"""Signs of obfuscated gradients; advice on evaluations; indicators of attack failure."""
EOT, TRANSFER = "arXiv 1802.00420, section 4", "arXiv 2411.14834"
"""Attacks on random defenses; on aggregations that hide gradients."""

NOTICEABLE = 0.05
"""Smallest difference of accuracies taken for one, beside a paired interval that excludes zero."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: the check's name.
        values: the figures it rests on, by name.
        flagged: whether they are suspicious.
        meaning: what they mean, in one line; the reason where the check was skipped.
        source: the paper and section of the idea, or an empty string.
        decisive: whether a flag makes the robustness likely an artefact; else it is advice to the attacker.
        skipped: whether the check had nothing to work on.
    """

    check: str
    values: Mapping[str, float]
    flagged: bool
    meaning: str
    source: str = ""
    decisive: bool = True
    skipped: bool = False


def clearly_lower(a: Estimate, b: Estimate, by: float = NOTICEABLE) -> bool:
    """Return whether share `a` is below `b` by at least `by`, and the paired interval of the difference excludes zero."""
    difference = b - a
    return difference.low > 0 and difference.value >= by - 1e-9


def share(mask: Tensor) -> float:
    """Return the share of a bool tensor that is true; 0 of an empty one."""
    return float(mask.double().mean()) if mask.numel() else 0.0


def skipped(check: str, reason: str, source: str = "") -> Finding:
    """Return the finding of a check that had nothing to work on."""
    return Finding(check, {}, False, reason, source, skipped=True)
