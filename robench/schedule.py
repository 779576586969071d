"""In which order to measure: first what settles most claims per minute, then the rest, the cheapest first. Pure functions.

A measurement takes its own minutes and those of the stages of training that its defense still lacks; a stage that several defenses
share is paid once.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """One record to be made.

    Attributes:
        defense: its full name.
        threat: the threat model's text.
        attack: the attack's name and parameters.
        n: test examples.
        seed: which independently trained copy of the defense.
    """

    defense: str
    threat: str
    attack: str
    n: int
    seed: int = 0

    def __str__(self) -> str:
        copy = f" (seed {self.seed})" if self.seed else ""
        return f"{self.defense}{copy} under {self.attack} within {self.threat}, n={self.n}"


@dataclass(frozen=True)
class Work:
    """What a measurement takes.

    Attributes:
        minutes: of the measurement itself.
        training: minutes of each stage that its defense lacks, by a key that defenses which share the stage share.
    """

    minutes: float
    training: Mapping[str, float]


def merged(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Return the measurements, each thing measured once, on the most examples asked for, in the order first asked for."""
    most: dict[tuple[str, str, str, int], Measurement] = {}
    for m in measurements:
        most[_of(m)] = m if _of(m) not in most or m.n > most[_of(m)].n else most[_of(m)]
    return list(most.values())


def _of(m: Measurement) -> tuple[str, str, str, int]:
    """Return what is measured, whatever the number of examples."""
    return (m.defense, m.threat, m.attack, m.seed)


def order(work: Mapping[Measurement, Work], goals: Mapping[str, Collection[Measurement]]) -> list[Measurement]:
    """Return the missing measurements in the order to make them in.

    Greedily: of the goals still open, the one whose missing measurements settle most goals per minute; then what no goal needs,
    the cheapest first. Ties go by the order of `goals` and of `work`.

    Args:
        work: what each missing measurement takes.
        goals: by claim, the measurements that it still needs; those that are not in `work` cannot be made, so their goal is left out.
    """
    chosen: list[Measurement] = []
    trained: set[str] = set()
    # A measurement on more examples serves a goal of fewer.
    most = {_of(m): m for m in work}
    served = {name: [most.get(_of(need)) for need in needs] for name, needs in goals.items()}
    open_goals = {
        name: frozenset(m for m in found if m is not None)
        for name, found in served.items()
        if found and all(m is not None and m.n >= need.n for m, need in zip(found, goals[name], strict=True))
    }
    while open_goals:
        best = max(open_goals.values(), key=lambda needs: _settled_per_minute(needs, open_goals.values(), work, trained))
        _append(chosen, trained, best, work)
        # What is chosen is no longer needed, and a goal without needs is settled.
        left = {name: needs - set(chosen) for name, needs in open_goals.items()}
        open_goals = {name: needs for name, needs in left.items() if needs}
    done = set(chosen)
    _append(chosen, trained, [m for m in work if m not in done], work)
    return chosen


def minutes(measurements: Iterable[Measurement], work: Mapping[Measurement, Work], trained: Collection[str] = ()) -> float:
    """Return the minutes that measurements take together, each stage of training once, those already `trained` free."""
    chosen = list(measurements)
    stages = {key: cost for m in chosen for key, cost in work[m].training.items() if key not in trained}
    # Exactly rounded, so that the order of a set does not show.
    return math.fsum([*(work[m].minutes for m in chosen), *stages.values()])


def _settled_per_minute(
    needs: frozenset[Measurement], open_goals: Collection[frozenset[Measurement]], work: Mapping[Measurement, Work], trained: set[str]
) -> float:
    return sum(other <= needs for other in open_goals) / max(minutes(needs, work, trained), 1e-9)


def _append(chosen: list[Measurement], trained: set[str], more: Collection[Measurement], work: Mapping[Measurement, Work]) -> None:
    """Append measurements, always the cheapest next one by what is trained by then."""
    left: Sequence[Measurement] = [m for m in work if m in more]
    while left:
        following = min(left, key=lambda m: minutes([m], work, trained))
        chosen.append(following)
        trained.update(work[following].training)
        left = [m for m in left if m != following]
