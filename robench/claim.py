"""Claims: a paper's statement as a quantity to measure, what it should come to, and the attacks that it is held against.

A quantity is a sum of accuracies, so that two defenses are compared on the same examples. `settlement` says what claims came to.
"""

import importlib.metadata
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Literal

from robench.errors import UserError
from robench.zoo import Paper, Scale

GROUP = "robench.claims"

Verdict = Literal["reproduced", "not reproduced", "underpowered"]
Status = Literal["holds", "broken", "open"]
STATUS_OF: dict[Verdict, Status] = {"reproduced": "holds", "not reproduced": "broken", "underpowered": "open"}

STRONGEST: dict[Scale, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "smoke": (("apgd-t,steps=20,targets=2",), ("mean-transfer-20,draws=2",)),
    "cpu": (("apgd-ce", "apgd-t,steps=50,targets=3"), ("mean-transfer-100,draws=8", "apgd-ce,draws=8")),
    "gpu": (("autoattack",), ("mean-transfer-200,draws=16", "apgd-ce,draws=16")),
    "paper": (("autoattack",), ("mean-transfer-500,draws=20", "apgd-ce,draws=20")),
}
"""Attacks beside the paper's own that claims are held against at each scale: on a deterministic defense, on a random one."""


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of a defense of the zoo: clean where `threat` is None, else robust accuracy under `attack`.

    `against` names attacks that the claim is held against beside those that every claim of its scale is; `only` holds it against
    these alone, since it is about this kind of attack (one perturbation for all images, say).
    """

    defense: str
    threat: str | None = None
    attack: str | None = None
    against: tuple[str, ...] = ()
    only: bool = False


def held_against(accuracy: Accuracy, scale: Scale, random: bool) -> tuple[str, ...]:
    """Return the attacks beside the paper's own that a robust accuracy must have been put to before anything is said to hold.

    Args:
        accuracy: of a defense within a threat model.
        scale: which of `STRONGEST` there are.
        random: whether the defense is.
    """
    strongest = () if accuracy.only else STRONGEST[scale][random]
    return tuple(dict.fromkeys((*strongest, *accuracy.against)))


@dataclass(frozen=True)
class Quantity:
    """A sum of accuracies with coefficients; made by `clean` and `robust`, combined with ``+``, ``-`` and ``*``."""

    terms: tuple[tuple[float, Accuracy], ...]

    def __add__(self, other: "Quantity") -> "Quantity":
        return Quantity(self.terms + other.terms)

    def __sub__(self, other: "Quantity") -> "Quantity":
        return self + other * -1

    def __mul__(self, factor: float) -> "Quantity":
        return Quantity(tuple((factor * coefficient, accuracy) for coefficient, accuracy in self.terms))

    def __str__(self) -> str:
        parts: list[str] = []
        for coefficient, a in self.terms:
            sign = "- " if coefficient < 0 else "+ " if parts else ""
            size = "" if abs(coefficient) == 1 else f"{abs(coefficient):g} "
            where = f"robust({a.defense}; {a.threat}, {a.attack})" if a.threat else f"clean({a.defense})"
            parts.append(f"{sign}{size}{where}")
        return " ".join(parts)


def clean(defense: str) -> Quantity:
    """Return the clean accuracy of a defense of the zoo."""
    return Quantity(((1.0, Accuracy(defense)),))


def robust(defense: str, threat: str, attack: str, against: tuple[str, ...] = (), *, only: bool = False) -> Quantity:
    """Return the robust accuracy of a defense of the zoo within a threat model under an attack, held `against` further ones.

    With `only`, against no others; see `Accuracy`.
    """
    return Quantity(((1.0, Accuracy(defense, threat, attack, against, only)),))


@dataclass(frozen=True)
class Expectation:
    """What a claim says of its quantity: that it lies between two bounds (shares, not percent).

    With one bound it is an ordering or a gap: the whole interval must lie beyond it. With both it is a value within a tolerance.
    """

    low: float = -float("inf")
    high: float = float("inf")

    def __str__(self) -> str:
        if self.low == -float("inf"):
            return f"below {100 * self.high:g}"
        return f"above {100 * self.low:g}" if self.high == float("inf") else f"between {100 * self.low:g} and {100 * self.high:g}"


def above(bound: float) -> Expectation:
    """Expect more than `bound`, a share."""
    return Expectation(low=bound)


def below(bound: float) -> Expectation:
    """Expect less than `bound`, a share."""
    return Expectation(high=bound)


def near(value: float, tolerance: float) -> Expectation:
    """Expect `value` within `tolerance`, shares."""
    return Expectation(value - tolerance, value + tolerance)


@dataclass(frozen=True)
class Standing:
    """The outcome that the project stands by where it is not "reproduced, holds", and why, with its source.

    Several verdicts may be named where the quantity lies so near its bound that hardware decides.
    """

    verdicts: tuple[Verdict, ...]
    status: tuple[Status, ...]
    because: str


SOUND = Standing(("reproduced",), ("holds",), "")


@dataclass(frozen=True)
class Trial:
    """A claim on one data set.

    Attributes:
        dataset: the data set's name.
        quantity: what is measured.
        standing: by scale, where the outcome is not "reproduced, holds".
        scales: where the claim is made; absolute values only at ``paper``.
        expect: replaces the claim's expectation here.
    """

    dataset: str
    quantity: Quantity
    standing: Mapping[Scale, Standing] = field(default_factory=dict)
    scales: tuple[Scale, ...] = ("cpu", "gpu", "paper")
    expect: Expectation | None = None


@dataclass(frozen=True)
class Claim:
    """A statement of a paper, with its numbers and how it is put to the test.

    Attributes:
        name: short and unique.
        paper: the paper.
        statement: what it says.
        source: where (table, section).
        published: its numbers.
        expect: of the quantity.
        tolerance: a share; an interval of more than this to either side cannot settle the claim.
        trials: the data sets it is tested on.
        one_network: whether it compares ways to use the same trained weights.
        first_above: of a claim that one accuracy is some times another, ``a - 17 b`` near 0, which 0 and 0 would meet: what the first
            must exceed, a share.
    """

    name: str
    paper: Paper
    statement: str
    source: str
    published: str
    expect: Expectation
    tolerance: float
    trials: tuple[Trial, ...]
    one_network: bool = False
    first_above: float | None = None

    def trial(self, dataset: str, scale: Scale | None = None) -> Trial:
        """Return the trial on a data set: the one made at `scale` where there are several, else the first."""
        found = [trial for trial in self.trials if trial.dataset == dataset]
        found.sort(key=lambda trial: scale not in (None, *trial.scales))
        if not found:
            raise UserError(f"claim {self.name} is not made on {dataset}; it is on {', '.join(t.dataset for t in self.trials)}")
        return found[0]

    def protocol(self, dataset: str, scale: Scale | None = None) -> str:
        """Return what is measured on a data set and what is expected, in one line."""
        trial = self.trial(dataset, scale)
        first = "" if self.first_above is None else f", the first {above(self.first_above)}"
        return f"{trial.quantity} {trial.expect or self.expect} points, tolerance {100 * self.tolerance:g}{first}"


def discover() -> list[Claim]:
    """Return every claim of the entry point group ``robench.claims``: what its modules list as ``CLAIMS``.

    Raises:
        UserError: for two claims of one name.
    """
    found: dict[str, Claim] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        package = point.load()
        modules = [import_module(f"{point.value}.{m.name}") for m in pkgutil.iter_modules(getattr(package, "__path__", []))
                   if m.name != "conftest"]  # fmt: skip
        for module in [package, *modules]:
            for claim in getattr(module, "CLAIMS", []):
                if claim.name in found:
                    raise UserError(f"the claim name {claim.name!r} is taken twice")
                found[claim.name] = claim
    return list(found.values())
