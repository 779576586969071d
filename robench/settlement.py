"""What claims came to by the records there are.

The verdict comes from the quantity's 95 % interval under the paper's own attack; beside it stands whether the statement survives the
strongest attacks, all those that its scale holds claims against.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from robench import accuracies, attacks, zoo
from robench.claim import (
    SOUND,
    STATUS_OF,
    Accuracy,
    Claim,
    Expectation,
    Quantity,
    Standing,
    Status,
    Trial,
    Verdict,
    above,
    discover,
    held_against,
)  # fmt: skip
from robench.controls import failures
from robench.estimate import Estimate, contrast, over_seeds
from robench.record import Record
from robench.threat import ThreatModel
from robench.zoo import Scale

NOTHING = Estimate(0.0, 0.0, 0.0, 0)
"""An accuracy that has fallen as far as it can."""


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


class UnsettledError(LookupError):
    """Records that settle a claim are missing or do not belong together, in one line."""


Find = Callable[[Accuracy, int], Sequence[Record]]
"""From an accuracy and a training seed to the records that measure it, the paper's attack first; none if there are none."""


def settle(claim: Claim, dataset: str, scale: Scale, find: Find, seeds: int = 1) -> Settlement:
    """Measure a claim's quantity and return what it came to.

    A robust accuracy that was not put to all attacks that its scale holds claims against (`claim.held_against`), on as many examples as
    the paper's and with none of their controls failed, may still fall as far as 0: the status is open unless it is the same at either
    end. The strongest attacks count on the paper's examples alone.

    Args:
        claim: the claim.
        dataset: on which of its data sets.
        scale: at which scale.
        find: gives the records of an accuracy: one for the paper's attack, then any others of the same subject.
        seeds: independently trained copies of each defense, numbered from 0.

    Raises:
        UnsettledError: if an accuracy has no record, or the records are of different images or trainings, naming it.
    """
    trial = claim.trial(dataset, scale)
    terms = [(c, accuracy, [list(find(accuracy, seed)) for seed in range(seeds)]) for c, accuracy in trial.quantity.terms]
    for _, accuracy, per_seed in terms:
        if not all(per_seed):
            raise UnsettledError(f"no record of {Quantity(((1.0, accuracy),))} at scale {scale}")
    for seed in range(seeds):
        _of_one_training([(accuracy, per_seed[seed]) for _, accuracy, per_seed in terms], claim.one_network)
    _of_the_same_images([(accuracy, per_seed) for _, accuracy, per_seed in terms])
    robust_terms = [per_seed for _, accuracy, per_seed in terms if accuracy.threat is not None]
    own: list[tuple[float, Estimate]] = []
    worst: list[tuple[float, Estimate]] = []
    used: set[str] = set()
    unfinished: list[bool] = []
    for coefficient, accuracy, every_attack in terms:
        if accuracy.threat is None:
            estimates = strongest = [accuracies.clean_estimate(records[0]) for records in every_attack]
            may_fall = False
        else:
            per_seed = _equally_attacked(every_attack, robust_terms)
            estimates = [accuracies.robust_estimate(records[0]) for records in per_seed]
            strongest = [accuracies.worst_case(records, records[0].dataset.n)[0] for records in per_seed]
            used |= {r.attack.name for records in per_seed for r in records}
            may_fall = not all(tried(accuracy, scale, records) for records in per_seed)
        own.append((coefficient, over_seeds(estimates) if seeds > 1 else estimates[0]))
        worst.append((coefficient, over_seeds(strongest) if seeds > 1 else strongest[0]))
        unfinished.append(may_fall)
    estimate, strongest_estimate = _combined(own), _combined(worst)
    expect = trial.expect or claim.expect
    # As if all that may fall had fallen: what is added, then what is subtracted.
    ends = [[term for term, falls in zip(worst, unfinished, strict=True) if not falls or (term[0] > 0) == kept] for kept in (False, True)]
    came_to = {_verdict(end, worst[0], claim, expect) for end in (worst, *ends)}
    between = any(unfinished) and expect.low > -float("inf") and expect.high < float("inf")
    status = STATUS_OF[came_to.pop()] if len(came_to) == 1 and not between else "open"
    verdict = _verdict(own, own[0], claim, expect)
    return Settlement(claim, dataset, scale, estimate, verdict, strongest_estimate, status, tuple(sorted(used)))


def _verdict(terms: Sequence[tuple[float, Estimate]], first: tuple[float, Estimate], claim: Claim, expect: Expectation) -> Verdict:
    """Return the verdict on a quantity, and of a ratio's claim on its `first` term where that fails."""
    found = judge(_combined(terms), expect, claim.tolerance)
    if claim.first_above is None or found != "reproduced":
        return found
    return judge(first[1] if any(term is first for term in terms) else NOTHING, above(claim.first_above), claim.tolerance)


def tried(accuracy: Accuracy, scale: Scale, records: Sequence[Record]) -> bool:
    """Return whether records put an accuracy to every attack it is held against, on as many examples as the first, the paper's.

    An attack that fails a control was not tried: it may have had no gradient to follow.
    """
    ran = [(r.attack.name, r.attack.parameters) for r in records if r.dataset.n >= records[0].dataset.n and not failures(r)]
    needed = map(attacks.parse, held_against(accuracy, scale, records[0].defense.random))
    return all((attack.name, dict(attack.parameters)) in ran for attack in needed)


def _of_one_training(terms: Sequence[tuple[Accuracy, list[Record]]], one_network: bool) -> None:
    """Put the clean record of the weights first whose robustness is measured, and make sure that a defense has one set of them.

    Where the claim is about `one_network`, all its defenses have.
    """

    def network(accuracy: Accuracy) -> str:
        return "" if one_network else accuracy.defense

    weights: dict[str, str] = {}
    for accuracy, records in terms:
        if accuracy.threat is not None:
            found = records[0].defense.weights_sha256
            if weights.setdefault(network(accuracy), found) != found:
                elsewhere = "another defense that is to share them" if one_network else "at one budget and another"
                raise UnsettledError(f"the records of {accuracy.defense} are of different weights, {elsewhere}")
    for accuracy, records in terms:
        if accuracy.threat is None and (wanted := weights.get(network(accuracy))):
            records.sort(key=lambda r: r.defense.weights_sha256 != wanted)
            if records[0].defense.weights_sha256 != wanted:
                raise UnsettledError(f"no clean accuracy of {accuracy.defense} is of the weights whose robust accuracy is recorded")


def _of_the_same_images(terms: Sequence[tuple[Accuracy, list[list[Record]]]]) -> None:
    """Make sure that the records are of one data set, and the copies of a defense of equally many of its examples."""
    if len({records[0].dataset.fingerprint for _, per_seed in terms for records in per_seed}) > 1:
        raise UnsettledError("the records are of different images under one data set's name")
    for accuracy, per_seed in terms:
        if len(counts := {records[0].dataset.n for records in per_seed}) > 1:
            raise UnsettledError(
                f"the copies of {accuracy.defense} were measured on {' and '.join(map(str, sorted(counts)))} examples; "
                "their mean needs the same"
            )


def _equally_attacked(term: list[list[Record]], terms: list[list[list[Record]]]) -> list[list[Record]]:
    """Return a term's records under its own attack and under those that every term of its kind and threat was put to.

    Of two defenses the one that fewer attacks were run on would look the stronger. Random and deterministic defenses are attacked
    in different ways, so each kind is compared within itself.
    """
    random, threat = term[0][0].defense.random, term[0][0].threat
    alike = [records for other in terms for records in other if (records[0].defense.random, records[0].threat) == (random, threat)]
    most = max(records[0].dataset.n for records in alike)

    def attack(r: Record) -> tuple[object, ...]:
        # Run on more of the examples compared, or from another seed, it is more of an attack.
        parameters = sorted((key, str(value)) for key, value in r.attack.parameters.items())
        return (r.attack.name, r.seed, min(r.dataset.n, most), *parameters)

    common = set.intersection(*({attack(r) for r in records} for records in alike))
    return [[records[0], *(r for r in records[1:] if attack(r) in common)] for records in term]


def _combined(terms: Sequence[tuple[float, Estimate]]) -> Estimate:
    """Return one share as it is, with its own interval, nothing as 0, and anything else as a contrast."""
    if not terms:
        return NOTHING
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else contrast(terms)


def matching(records: Iterable[Record], accuracy: Accuracy, dataset: str, scale: Scale, seed: int) -> list[Record]:
    """Return the records that measure an accuracy, current in the defense's and the attack's version.

    For a robust accuracy the paper's attack comes first, then every other attack on the same defense, weights and threat model;
    nothing if the paper's attack is missing. Where the accuracy is held against
    named attacks alone, only those. For a clean accuracy any record of the defense does, the one of most examples first.
    """
    named = zoo.parse(accuracy.defense)
    name = named.text
    of_defense = [
        r for r in records
        if r.defense.name == name and r.defense.version == named.entry.version and r.defense.origin == "zoo"
        and r.dataset.name == dataset and r.scale == scale and r.defense.training_seed == seed and _current(r)
    ]  # fmt: skip
    if accuracy.threat is None:
        return sorted(of_defense, key=lambda r: (-r.dataset.n, r.attack.name, r.threat))
    attack = attacks.parse(accuracy.attack or "")
    threat = str(ThreatModel.parse(accuracy.threat))
    same = [r for r in of_defense if r.threat == threat]
    own = [r for r in same if r.attack.name == attack.name and r.attack.parameters == dict(attack.parameters)]
    own.sort(key=lambda r: -r.dataset.n)
    others = [r for r in same if own and r is not own[0] and _alike(r, own[0])]
    if accuracy.only:
        named_attacks = [attacks.parse(text) for text in accuracy.against]
        allowed = [(a.name, dict(a.parameters)) for a in named_attacks]
        others = [r for r in others if (r.attack.name, r.attack.parameters) in allowed]
    return [*own[:1], *others]


def _alike(r: Record, own: Record) -> bool:
    """Say whether two records are of the same weights and images."""
    return (r.defense.weights_sha256, r.dataset.fingerprint) == (own.defense.weights_sha256, own.dataset.fingerprint)


def _current(r: Record) -> bool:
    return attacks.current_version(r.attack.name, r.defense.random) in (None, r.attack.version)


def copies(trial: Trial, find: Find) -> int:
    """Return how many independently trained copies, numbered from 0, all accuracies of a trial are recorded of on as many examples.

    It is 1 at least.
    """
    accuracies = [accuracy for _, accuracy in trial.quantity.terms]

    def examples(seed: int) -> list[int]:
        return [found[0].dataset.n if (found := find(accuracy, seed)) else 0 for accuracy in accuracies]

    first = examples(0)
    return next(seed for seed in itertools.count(1) if examples(seed) != first or not all(first))


def settle_all(records: Sequence[Record], dataset: str | None = None) -> list[Settlement]:
    """Return what every claim comes to by these records alone, on each data set and scale that they measure, by all copies there are."""
    settled = []
    for claim in discover():
        for trial in claim.trials:
            for scale in trial.scales:
                if dataset not in (None, trial.dataset):
                    continue

                def find(accuracy: Accuracy, seed: int, trial: Trial = trial, scale: Scale = scale) -> list[Record]:
                    return matching(records, accuracy, trial.dataset, scale, seed)

                try:
                    settled.append(settle(claim, trial.dataset, scale, find, copies(trial, find)))
                except UnsettledError:
                    continue
    return settled
