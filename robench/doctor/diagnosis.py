"""The doctor: is a defense's robustness real, or an artefact of gradients that lead attacks nowhere?

A clean bill is no proof of robustness: it says that the signs looked for are not there. Sources: Athalye et al., arXiv
1802.00420; Carlini et al., arXiv 1902.06705; Pintor et al., arXiv 2106.09947 (ideas).
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table

from robench import console, provenance
from robench.data import Dataset
from robench.doctor import attack_checks, contract_checks, gradient_checks
from robench.doctor.examination import Examination
from robench.doctor.finding import Finding
from robench.errors import UserError
from robench.estimate import Estimate
from robench.exact import exact_arithmetic
from robench.noise import isolated_generator
from robench.record import DefenseInfo, Provenance, Scale
from robench.scoring import defense_info
from robench.strangers import explained
from robench.targets import Target
from robench.threat import ThreatModel

EXAMPLES = 100
"""Test examples by default: enough to tell 10 points apart, few enough to take a minute."""

SMALLEST = 1e-6
"""Budget below which a change of an image in [0, 1] is near the rounding of float32."""

Verdict = Literal["likely an artefact", "not robust", "no sign of masking"]
Progress = Callable[[str], None]

CHECKS: tuple[Callable[[Examination], Finding], ...] = (
    gradient_checks.input_gradients, gradient_checks.ties, gradient_checks.saturation, gradient_checks.predicted_change,
    gradient_checks.ascent_direction, gradient_checks.gradient_stability, gradient_checks.lost_inside,
    gradient_checks.gradient_across_draws, attack_checks.unbounded, attack_checks.falls_with_budget, attack_checks.falls_with_steps,
    attack_checks.averaging_draws, attack_checks.optimisation, attack_checks.other_loss, attack_checks.transfer, attack_checks.surrogate,
    attack_checks.black_box, attack_checks.everyday, attack_checks.tiny_budget, attack_checks.scoring,
)  # fmt: skip
"""The checks on the examples classified right, cheap ones first; those of the contract come before them."""


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found.

    Attributes:
        defense: the defense, as a record describes it.
        dataset: the data set's name.
        threat: the threat model.
        scale: of the computation.
        n: the examples asked for; the checks are on those classified right.
        seed: of the doctor's attacks.
        classes: of the data set.
        findings: one for each check, in order.
        clean_accuracy: on all `n` examples.
        robust_accuracy: on all `n`, under the strongest of the attacks that the checks ran: an upper bound, and a loose one.
        provenance: the source, versions and hardware.
    """

    defense: DefenseInfo
    dataset: str
    threat: ThreatModel
    scale: Scale
    n: int
    seed: int
    classes: int
    findings: tuple[Finding, ...]
    clean_accuracy: Estimate
    robust_accuracy: Estimate
    provenance: Provenance

    @property
    def decided_by(self) -> tuple[str, ...]:
        """The decisive checks that are flagged."""
        return tuple(finding.check for finding in self.findings if finding.flagged and finding.decisive)

    @property
    def verdict(self) -> Verdict:
        """``likely an artefact`` where a decisive check is flagged, else ``not robust`` where the doctor's own attacks leave no more
        than is right with one answer to every image.
        """
        if self.decided_by:
            return "likely an artefact"
        return "not robust" if self.robust_accuracy.value <= 1 / self.classes else "no sign of masking"


@exact_arithmetic()
def examine(
    target: Target,
    dataset: Dataset,
    threat: ThreatModel,
    *,
    seed: int = 0,
    device: str = "cpu",
    batch_size: int = 100,
    scale: Scale = "cpu",
    progress: Progress = lambda _line: None,
) -> Diagnosis:
    """Look for signs that a defense's gradients are masked; the target's modules are put in evaluation mode.

    The checks cost about 270 forwards and 230 backwards an image and member, twice that where the defense is random, and
    the queries of the gradient-free attack; where it is deterministic, `fast` besides.

    Args:
        target: the defense.
        dataset: the examples; those classified right are examined.
        threat: the threat model, with a budget above 0.
        seed: of attacks, draws and directions.
        device: ``cpu`` or ``cuda``.
        batch_size: examples that go through the defense together.
        scale: what the diagnosis says of the computation's scale.
        progress: is told a line as each check and attack begins.

    Raises:
        UserError: for a budget of 0, a model that does not fit the data set, fails on it or returns what is not finite, or one
            that classifies nothing right.
    """
    check_budget(threat)

    def told(line: str) -> None:
        progress(f"{target.name} within {threat}: {line}")

    told("contract")
    defense, findings = contract_checks.admit(target, dataset, seed=seed, device=device)
    # An undeclared random model draws from the global generators.
    with isolated_generator(seed, device), explained(f"{target.name} before the doctor"):
        patient = Examination.of(defense, dataset, threat, seed, device, batch_size, told)
        for check in CHECKS:
            told(check.__name__.replace("_", " "))
            findings.append(check(patient))
    return Diagnosis(
        defense_info(target), dataset.name, threat, scale, len(dataset), seed, len(dataset.classes), tuple(findings), patient.clean,
        patient.strongest(), provenance.of_this_process(device),
    )  # fmt: skip


def check_budget(threat: ThreatModel) -> None:
    """Make sure that there is something to change.

    Raises:
        UserError: for a budget of 0, or one that float32 hardly tells from none.
    """
    if threat.budget and threat.epsilon < SMALLEST:
        raise UserError(f"the threat model {threat} allows less than {SMALLEST:g}, which is lost in rounding; the doctor needs more")
    if not threat.budget:
        raise UserError(f"the threat model {threat} leaves an attack nothing to change; the doctor needs a budget above 0")


def figures(finding: Finding) -> str:
    """Return a finding's figures in one line."""
    return ", ".join(f"{name} {value:.3g}" for name, value in finding.values.items())


def state(finding: Finding) -> str:
    """Return ``ok``, ``skipped``, ``flagged``, or ``advice`` for a flag that does not decide."""
    if finding.skipped:
        return "skipped"
    return ("flagged" if finding.decisive else "advice") if finding.flagged else "ok"


def as_table(diagnosis: Diagnosis) -> Table:
    """Return a row for each finding."""
    rows = [
        [finding.check, figures(finding), state(finding), finding.meaning + f" ({finding.source})" * bool(finding.source)]
        for finding in diagnosis.findings
    ]
    return console.table(("check", "figures", "state", "meaning"), rows)


def facts(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """Return the names and values that a diagnosis's reader wants first."""
    because = f": {', '.join(diagnosis.decided_by)}" if diagnosis.decided_by else ""
    return [
        ("defense", diagnosis.defense.name),
        ("data", f"{diagnosis.dataset}, first {diagnosis.n}, {diagnosis.threat}, seed {diagnosis.seed}"),
        ("clean accuracy", str(diagnosis.clean_accuracy)),
        ("robust accuracy", f"≤ {diagnosis.robust_accuracy} under the doctor's own attacks"),
        ("verdict", diagnosis.verdict + because),
    ]


def as_json(diagnosis: Diagnosis) -> str:
    """Return the diagnosis with every finding and its figures as JSON: accuracies as fractions, null for what is not finite."""

    def share(estimate: Estimate) -> dict[str, float]:
        return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}

    def finite(finding: Finding) -> dict[str, float | None]:
        # JSON has no infinity.
        return {name: value if math.isfinite(value) else None for name, value in finding.values.items()}

    content: dict[str, Any] = {
        "defense": diagnosis.defense.model_dump(), "dataset": diagnosis.dataset, "threat": str(diagnosis.threat),
        "scale": diagnosis.scale, "n": diagnosis.n, "seed": diagnosis.seed, "classes": diagnosis.classes,
        "verdict": diagnosis.verdict, "decided_by": diagnosis.decided_by,
        "clean_accuracy": share(diagnosis.clean_accuracy), "robust_accuracy": share(diagnosis.robust_accuracy),
        "findings": [asdict(finding) | {"values": finite(finding)} for finding in diagnosis.findings],
        "provenance": diagnosis.provenance.model_dump(),
    }  # fmt: skip
    return json.dumps(content, indent=1) + "\n"
