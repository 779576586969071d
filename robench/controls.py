"""Whether the attack that a record rests on worked at all: a random defense's controls, and a gradient. Pure functions of the record.

With next to no budget an attack must leave the clean accuracy, and without any bound it must leave nothing (Athalye et al., arXiv
1802.00420, section 3.1). One that leaves more than nothing optimises badly, or gives up: its robust accuracy is an upper bound
still, but may lie far above what a working attack leaves.
"""

from dataclasses import dataclass

from robench.estimate import Estimate
from robench.record import Record
from robench.threat import ThreatModel

EXAMPLES = 32
"""The first examples of each control, or all where there are fewer."""
TINY, UNBOUNDED = "tiny budget", "unbounded"
FOLLOW_GRADIENTS = (
    "apgd-ce", "apgd-dlr", "apgd-t", "autoattack-rand", "fab-t", "fgsm", "ifgsm", "mean-transfer", "momentum", "pgd", "pgd-adam",
    "predictor-transfer", "universal",
)  # fmt: skip
"""Attacks that have nothing but the gradient to go by."""
ROBUST, CLEAN, CHANCE = "robust accuracy", "clean accuracy", "share of the commonest class"
"""What is kept of each, as in ``unbounded: robust accuracy``. An attack that changes all images alike, and so makes them all the same
image when unbounded, leaves the class that this is given, so it is due no more than the commonest class's share."""
SLACK = 0.01
"""A share of the examples that may differ by chance, through rounding or a draw near the border."""


@dataclass(frozen=True)
class Failure:
    """A control that failed.

    Attributes:
        control: `TINY` or `UNBOUNDED`; `missing` where a random defense's record has none; `gradient` where there was none.
        text: what was found and what was due, with the numbers.
    """

    control: str
    text: str

    def __str__(self) -> str:
        return self.text


def key(control: str, reading: str) -> str:
    """Return a reading's name in `Record.controls`."""
    return f"{control}: {reading}"


def failures(record: Record) -> tuple[Failure, ...]:
    """Return why a record's attack cannot be taken to have worked: nothing where it can.

    An attack by gradients needs one to have come back. A random defense's controls are shares of few examples, so one fails only
    if the 95 % interval of what should not be there lies above `SLACK`; a deterministic defense has none.
    """
    attack = record.attack.name.partition(",")[0]
    follows = attack in FOLLOW_GRADIENTS or attack.rpartition("-")[0] in FOLLOW_GRADIENTS
    attacked = record.clean_accuracy.value > 0 and ThreatModel.parse(record.threat).epsilon > 0
    if follows and attacked and record.cost.backwards == 0:
        return (Failure("gradient", "no gradient came back to the image (0 backwards), so that it had nothing to follow"),)
    if not record.defense.random:
        return ()
    found, n = record.controls, min(EXAMPLES, record.dataset.n)
    wanted = [key(control, reading) for control in (TINY, UNBOUNDED) for reading in (ROBUST, CLEAN)]
    if absent := [name for name in wanted if name not in found]:
        return (Failure("missing", f"no controls were run ({', '.join(absent)})"),)
    failed = []
    left, clean = found[key(TINY, ROBUST)], found[key(TINY, CLEAN)]
    if _share(abs(left - clean), n).low > SLACK:
        failed.append(Failure(TINY, f"{TINY} leaves {100 * left:.1f} % of {n} examples, clean are {100 * clean:.1f} %"))
    left, due = found[key(UNBOUNDED, ROBUST)], found.get(key(UNBOUNDED, CHANCE), 0.0)
    if (share := _share(left, n)).low > due + SLACK:
        more = f", due is at most {100 * due:.1f} %" if due else ""
        interval = f"[{100 * share.low:.1f}, {100 * share.high:.1f}]"
        failed.append(Failure(UNBOUNDED, f"{UNBOUNDED} leaves {100 * left:.1f} % {interval} of {n} examples{more}"))
    return tuple(failed)


def _share(value: float, n: int) -> Estimate:
    """Return a share of n examples with its Wilson interval."""
    return Estimate.proportion(min(value * n, n), n)
