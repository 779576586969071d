"""The leaderboard: rows made from records. Pure functions: nothing here reads a file."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, get_args

from robench.accuracies import clean_estimate, worst_case
from robench.controls import failures
from robench.estimate import Estimate
from robench.record import Record, Scale, file_name
from robench.threat import ThreatModel

NOTE = (
    "Robust accuracy is an upper bound: on each example the worst of the attacks that were run, with a 95 % interval. "
    "A stronger attack can only lower it."
)
EMPTY = "No records to show: nothing that matches has been measured yet."
SCALES: tuple[str, ...] = get_args(Scale)


AttackVersion = Callable[[str, bool], int | None]
"""From an attack's name, as records have it, and whether the defense is random to the current version."""


@dataclass(frozen=True)
class Finding:
    """What a claim came to: its name, its verdict and its status under the strongest attacks."""

    claim: str
    verdict: str
    status: str

    def __str__(self) -> str:
        return f"{self.claim}: {self.verdict}, {self.status}"


Findings = Mapping[tuple[str, str, str, str | None], Sequence[Finding]]
"""By a defense's full name, a data set, a scale and a threat model, or None for claims that are about none."""


@dataclass(frozen=True)
class Row:
    """One trained defense on one data set, under one threat model, at one scale.

    Attributes:
        records: what the row is made of, the strongest attack first.
        robust: the robust accuracy, the worst case over the attacks on each example.
        clean: the clean accuracy, on the most examples measured.
        verdicts: what the claims say of the defense here.
        stale: why the row should be measured again, one line each; empty if it is current.
        twin: whether another row is of the same name and place, but of other weights.
    """

    records: tuple[Record, ...]
    robust: Estimate
    clean: Estimate
    verdicts: tuple[Finding, ...] = ()
    stale: tuple[str, ...] = ()
    twin: bool = False

    @property
    def strongest(self) -> Record:
        """The record with the strongest single attack."""
        return self.records[0]

    @property
    def copy(self) -> tuple[str, ...]:
        """Which of the defense's trained copies it is: its seed, and its weights where another row would look the same."""
        defense = self.strongest.defense
        return (f"seed {defense.training_seed}", *([f"weights {defense.weights_sha256[:8]}"] if self.twin else []))

    @property
    def attacks(self) -> tuple[str, ...]:
        """The names of the attacks run, each once, the strongest first."""
        return tuple(dict.fromkeys(record.attack.name for record in self.records))

    @property
    def trustworthy(self) -> bool:
        """Whether any attack that was run on all examples worked (`robench.controls`); else the bound holds, but may lie far too high."""
        return any(not failures(record) for record in self.records if record.dataset.n >= self.robust.n)

    @property
    def bound(self) -> str:
        """The robust accuracy as it is shown: what it bounds from above, and whether to trust that."""
        return f"≤ {self.robust}" + ", not trustworthy" * (not self.trustworthy)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the number must know: a random defense's scoring, failed controls, unfinished and mixed runs, staleness."""
        notes = []
        if score := self.strongest.random_score:
            mean, worst = (f"{100 * share.value:.1f} %" for share in (score.mean, score.worst))
            notes.append(f"random, {score.draws} draws of {self.strongest.attack.name}: mean {mean}, worst draw {worst}")
        for record in self.records:
            if record.random_score and (own := record.random_score.own_count):
                mean = f"{100 * record.robust_accuracy.value:.1f} %"
                notes.append(f"{record.attack.name} itself counts {100 * own.value:.1f} %, fresh draws give {mean} (n={own.n})")
        failed = dict.fromkeys(f"control failed ({r.attack.name}): {failure}" for r in self.records for failure in failures(r))
        if not self.trustworthy:
            notes.append("no trustworthy upper bound: every attack that was run on all examples fails a control")
        partial = dict.fromkeys(f"partial ({r.attack.name}): {r.partial}" for r in self.records if r.partial is not None)
        mixed = dict.fromkeys(f"made in parts ({r.attack.name}): {r.parts}" for r in self.records if r.parts is not None)
        return (*notes, *failed, *partial, *mixed, *(f"stale: {reason}" for reason in self.stale))


def rows(
    records: Iterable[Record],
    *,
    dataset: str | None = None,
    threat: str | None = None,
    verdicts: Findings | None = None,
    attack_version: AttackVersion | None = None,
    defense_versions: Mapping[str, int] | None = None,
) -> list[Row]:
    """Return one row for each trained defense, data set, threat model and scale, the most robust first within these.

    Args:
        records: any records, in any order.
        dataset: keep only this data set.
        threat: keep only this threat model (``Linf:8/255``).
        verdicts: what claims came to.
        attack_version: gives the current version of a record's attack, from its name and whether the defense is random, or None
            for one that is not registered. Another recorded version makes a row stale.
        defense_versions: likewise, by the defense's name without parameters.

    Raises:
        UserError: if `threat` is no threat model.
    """
    wanted = None if threat is None else str(ThreatModel.parse(threat))
    kept = [r for r in records if dataset in (None, r.dataset.name) and wanted in (None, r.threat)]
    made = []
    for _, group in groupby(sorted(kept, key=_subject), key=_subject):
        # The worst case does not depend on the order; the row's list of attacks must not either.
        members = sorted(group, key=lambda record: (record.robust_accuracy.value, file_name(record)))
        robust, strongest = worst_case(members)
        members.sort(key=lambda record: record is not strongest)
        made.append(
            Row(
                records=tuple(members),
                robust=robust,
                clean=clean_estimate(max(members, key=lambda record: record.dataset.n)),
                verdicts=_about(strongest, verdicts or {}),
                stale=_stale(members, attack_version or (lambda _name, _random: None), defense_versions or {}),
            )
        )
    named = Counter(map(_shown, made))
    return sorted((replace(row, twin=named[_shown(row)] > 1) for row in made), key=_order)


def _shown(row: Row) -> tuple[Any, ...]:
    """Return what a reader tells rows apart by."""
    record = row.strongest
    return (record.defense.name, record.defense.training_seed, record.dataset.name, record.threat, record.scale)


def _about(record: Record, verdicts: Findings) -> tuple[Finding, ...]:
    subject = (record.defense.name, record.dataset.name, record.scale)
    return (*verdicts.get((*subject, record.threat), ()), *verdicts.get((*subject, None), ()))


def _subject(record: Record) -> tuple[Any, ...]:
    defense, dataset = record.defense, record.dataset
    weights = (defense.version, defense.training_seed, defense.weights_sha256)
    return (defense.name, dataset.name, dataset.fingerprint, record.threat, record.scale, *weights)


def _order(row: Row) -> tuple[Any, ...]:
    record, threat = row.strongest, ThreatModel.parse(row.strongest.threat)
    where = (record.dataset.name, threat.norm, threat.budget, -SCALES.index(record.scale))
    return (*where, -row.robust.value, _subject(record))


def _stale(records: Sequence[Record], attack_version: AttackVersion, defense_versions: Mapping[str, int]) -> tuple[str, ...]:
    reasons = []
    defense = records[0].defense
    current = defense_versions.get(defense.name.partition(",")[0], defense.version)
    if current != defense.version:
        reasons.append(f"the defense was version {defense.version}, now {current}")
    for attack in (record.attack for record in records):
        now = attack_version(attack.name, defense.random)
        if now not in (None, attack.version):
            reasons.append(f"{attack.name} was version {attack.version}, now {now}")
    return tuple(dict.fromkeys(reasons))
