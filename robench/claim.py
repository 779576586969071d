"""Claims: a paper's statement as a quantity to measure, and the verdict on it.

A quantity is a sum of accuracies, so that two defenses are compared on the same examples. The verdict comes from its 95 % interval
under the paper's own attack; beside it stands whether the statement survives the strongest attack recorded here.
"""

import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Literal

from robench import attacks, record, zoo
from robench.errors import UserError
from robench.estimate import Estimate, contrast, over_seeds
from robench.record import Record
from robench.threat import ThreatModel
from robench.zoo import Paper, Scale

GROUP = "robench.claims"

Verdict = Literal["reproduced", "not reproduced", "underpowered"]
Status = Literal["holds", "broken", "open"]
STATUS_OF: dict[Verdict, Status] = {"reproduced": "holds", "not reproduced": "broken", "underpowered": "open"}


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
    """

    name: str
    paper: Paper
    statement: str
    source: str
    published: str
    expect: Expectation
    tolerance: float
    trials: tuple[Trial, ...]

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
        return f"{trial.quantity} {trial.expect or self.expect} points, tolerance {100 * self.tolerance:g}"


@dataclass(frozen=True)
class Settlement:
    """What a claim came to on one data set and scale.

    Attributes:
        estimate: the quantity under the paper's attack, with `verdict`.
        strongest: the quantity with every robust accuracy under the worst case of the attacks recorded, with `status`; where
            several defenses are compared, of the attacks that all of a kind were put to.
        attacks: the attacks in that worst case.
    """

    claim: Claim
    dataset: str
    scale: Scale
    estimate: Estimate
    verdict: Verdict
    strongest: Estimate
    status: Status
    attacks: tuple[str, ...]

    @property
    def standing(self) -> Standing:
        """The outcome that the project stands by."""
        return self.claim.trial(self.dataset, self.scale).standing.get(self.scale, SOUND)

    def as_dict(self) -> dict[str, object]:
        """Return the settlement for JSON: shares and their intervals as fractions."""

        def numbers(e: Estimate) -> dict[str, object]:
            return {"value": e.value, "low": e.low, "high": e.high, "n": e.n, "seeds": list(e.seeds)}

        return {
            "claim": self.claim.name, "paper": self.claim.paper.arxiv, "statement": self.claim.statement, "source": self.claim.source,
            "published": self.claim.published, "dataset": self.dataset, "scale": self.scale,
            "protocol": self.claim.protocol(self.dataset, self.scale),
            "ours": numbers(self.estimate), "verdict": self.verdict, "under_strongest_attack": numbers(self.strongest),
            "status": self.status, "attacks": list(self.attacks), "because": self.standing.because,
        }  # fmt: skip

    @property
    def as_stood_by(self) -> bool:
        """Whether the outcome is that one."""
        return self.verdict in self.standing.verdicts and self.status in self.standing.status


def judge(estimate: Estimate, expect: Expectation, tolerance: float) -> Verdict:
    """Return the verdict on an estimate.

    One bound: reproduced where the whole interval lies beyond it, not reproduced where none does; where the bound lies inside the
    interval, underpowered if the interval's half-width exceeds the tolerance, else not reproduced, since a difference as large as
    claimed would have shown. Two bounds: underpowered where the half-width exceeds the tolerance, unless the interval lies outside
    altogether; else the value decides.
    """
    if estimate.high < expect.low or estimate.low > expect.high:
        return "not reproduced"
    if estimate.low > expect.low and estimate.high < expect.high:
        return "reproduced"
    wide = (estimate.high - estimate.low) / 2 > tolerance
    if wide:
        return "underpowered"
    two_sided = expect.low > -float("inf") and expect.high < float("inf")
    return "reproduced" if two_sided and expect.low <= estimate.value <= expect.high else "not reproduced"


Find = Callable[[Accuracy, int], Sequence[Record]]
"""From an accuracy and a training seed to the records that measure it, the paper's attack first; none if there are none."""


def settle(claim: Claim, dataset: str, scale: Scale, find: Find, seeds: int = 1) -> Settlement:
    """Measure a claim's quantity and return what it came to.

    Args:
        claim: the claim.
        dataset: on which of its data sets.
        scale: at which scale.
        find: gives the records of an accuracy: one for the paper's attack, then any others of the same subject.
        seeds: independently trained copies of each defense, numbered from 0.

    Raises:
        LookupError: if an accuracy has no record, naming it.
    """
    trial = claim.trial(dataset, scale)
    own: list[tuple[float, Estimate]] = []
    worst: list[tuple[float, Estimate]] = []
    used: set[str] = set()
    untried = False
    found = [[find(accuracy, seed) for seed in range(seeds)] for _, accuracy in trial.quantity.terms]
    for (_, accuracy), per_seed in zip(trial.quantity.terms, found, strict=True):
        if not all(per_seed):
            raise LookupError(f"no record of {Quantity(((1.0, accuracy),))} at scale {scale}")
    robust_terms = [per_seed for (_, a), per_seed in zip(trial.quantity.terms, found, strict=True) if a.threat is not None]
    for (coefficient, accuracy), every_attack in zip(trial.quantity.terms, found, strict=True):
        per_seed = every_attack if accuracy.threat is None else _equally_attacked(every_attack, robust_terms)
        if accuracy.threat is None:
            estimates = strongest = [record.clean_estimate(records[0]) for records in per_seed]
        else:
            estimates = [record.robust_estimate(records[0]) for records in per_seed]
            strongest = [record.worst_case(records)[0] for records in per_seed]
            used |= {r.attack.name for records in per_seed for r in records}
            untried = untried or any(len(records) == 1 for records in per_seed)
        own.append((coefficient, over_seeds(estimates) if seeds > 1 else estimates[0]))
        worst.append((coefficient, over_seeds(strongest) if seeds > 1 else strongest[0]))
    estimate, strongest_estimate = _combined(own), _combined(worst)
    expect = trial.expect or claim.expect
    verdict, under_strongest = (judge(e, expect, claim.tolerance) for e in (estimate, strongest_estimate))
    # What was put to no other attack has not survived one; another on the rest alone would flatter it.
    status = "open" if untried else STATUS_OF[under_strongest]
    return Settlement(claim, dataset, scale, estimate, verdict, strongest_estimate, status, tuple(sorted(used)))


def _equally_attacked(term: list[Sequence[Record]], terms: list[list[Sequence[Record]]]) -> list[Sequence[Record]]:
    """Return a term's records under its own attack and under those that every term of its kind and threat was put to.

    Of two defenses the one that fewer attacks were run on would look the stronger. Random and deterministic defenses are attacked
    in different ways, so each kind is compared within itself.
    """

    def attack(r: Record) -> tuple[object, ...]:
        # Run on more examples, it is more of an attack.
        return (r.attack.name, r.dataset.n, *sorted((key, str(value)) for key, value in r.attack.parameters.items()))

    random, threat = term[0][0].defense.random, term[0][0].threat
    alike = [records for other in terms for records in other if (records[0].defense.random, records[0].threat) == (random, threat)]
    common = set.intersection(*({attack(r) for r in records} for records in alike))
    return [[records[0], *(r for r in records[1:] if attack(r) in common)] for records in term]


def _combined(terms: list[tuple[float, Estimate]]) -> Estimate:
    """Return one share as it is, with its own interval, and anything else as a contrast."""
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else contrast(terms)


def matching(records: Iterable[Record], accuracy: Accuracy, dataset: str, scale: Scale, seed: int) -> list[Record]:
    """Return the records that measure an accuracy, current in the defense's and the attack's version.

    For a robust accuracy the paper's attack comes first, then every other attack on the same defense, weights and threat model;
    nothing if the paper's attack is missing. Where the accuracy is held against
    named attacks alone, only those. For a clean accuracy any record of the defense does, the one of most examples first.
    """
    named = zoo.parse(accuracy.defense)
    of_defense = [
        r for r in records
        if r.defense.name == named.text and r.defense.version == named.entry.version and r.defense.origin == "zoo"
        and r.dataset.name == dataset and r.scale == scale and r.defense.training_seed == seed and _current(r)
    ]  # fmt: skip
    if accuracy.threat is None:
        return sorted(of_defense, key=lambda r: (-r.dataset.n, r.attack.name, r.threat))
    attack = attacks.parse(accuracy.attack or "")
    threat = str(ThreatModel.parse(accuracy.threat))
    same = [r for r in of_defense if r.threat == threat]
    own = [r for r in same if r.attack.name == attack.name and r.attack.parameters == dict(attack.parameters)]
    own.sort(key=lambda r: -r.dataset.n)
    others = [r for r in same if own and r is not own[0] and r.defense.weights_sha256 == own[0].defense.weights_sha256]
    if accuracy.only:
        named_attacks = [attacks.parse(text) for text in accuracy.against]
        allowed = [(a.name, dict(a.parameters)) for a in named_attacks]
        others = [r for r in others if (r.attack.name, r.attack.parameters) in allowed]
    return [*own[:1], *others]


def _current(r: Record) -> bool:
    known = attacks.registered()
    name = r.attack.name if r.attack.name in known else r.attack.name.rpartition("-")[0]
    return name not in known or known[name].version == r.attack.version


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


def settle_all(records: Sequence[Record], dataset: str | None = None) -> list[Settlement]:
    """Return what every claim comes to by these records alone, on each data set and scale that they measure."""
    settled = []
    for claim in discover():
        for trial in claim.trials:
            for scale in trial.scales:
                if dataset not in (None, trial.dataset):
                    continue

                def find(accuracy: Accuracy, seed: int, trial: Trial = trial, scale: Scale = scale) -> list[Record]:
                    return matching(records, accuracy, trial.dataset, scale, seed)

                try:
                    settled.append(settle(claim, trial.dataset, scale, find))
                except LookupError:
                    continue
    return settled


def verdicts_by_defense(settlements: Iterable[Settlement]) -> dict[str, list[str]]:
    """Return, by a defense's full name, a line for each settled claim that is about it."""
    lines: dict[str, list[str]] = {}
    for s in settlements:
        for name in {zoo.parse(accuracy.defense).text for _, accuracy in s.claim.trial(s.dataset, s.scale).quantity.terms}:
            lines.setdefault(name, []).append(f"{s.claim.name} ({s.dataset}, {s.scale}): {s.verdict}, {s.status}")
    return lines
