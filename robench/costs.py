"""How long a measurement will take: by what records of the same kind took, else by a crude guess. Pure functions of records."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from robench.attacks import Attack
from robench.record import Record

PASSES = {
    "fast": (100, 1100), "adaptive": (1000, 2400), "universal": (100, 400), "autoattack": (4000, 16000), "pyautoattack": (4000, 16000),
    "autoattack-rand": (6000, 6000), "pyautoattack-rand": (6000, 6000),
}  # fmt: skip
"""Passes per image and member, forwards and backwards, of attacks made of several, on deterministic and on random defenses.

About the medians of the committed records, where there are some.
"""

SECONDS = {
    "cpu": {"smoke": 2.5e-4, "cpu": 5e-4, "gpu": 2e-2, "paper": 2e-1},
    "cuda": {"smoke": 1e-5, "cpu": 5e-5, "gpu": 3e-4, "paper": 1e-3},
}
"""Seconds of one image's pass through one member, by device and scale, where nothing was measured yet; likewise."""


@dataclass(frozen=True)
class Subject:
    """What an estimate needs to know of a defense."""

    name: str
    members: int
    random: bool


def measuring(subject: Subject, attack: Attack, n: int, records: Sequence[Record], device: str, scale: str) -> float:
    """Return the seconds that attacking `n` examples should take.

    The seconds per image of the same attack on the same defense, where a record has them; else passes, those of the same attack on
    other defenses or a guess by its parameters, times the seconds of a pass.

    Args:
        subject: the defense.
        attack: the attack.
        n: examples.
        records: of one data set.
        device: ``cpu`` or ``cuda``; the records of other devices do not count.
        scale: likewise.
    """
    alike = _comparable(records, device, scale)
    same_attack = [r for r in alike if (r.attack.name, r.attack.parameters) == (attack.name, dict(attack.parameters))]
    if own := [r.timing.seconds / r.dataset.n for r in same_attack if r.defense.name == subject.name]:
        return n * statistics.median(own)
    of_kind = [_passes(r) / r.defense.members for r in same_attack if r.defense.random == subject.random]
    passes = statistics.median(of_kind) if of_kind else guessed_passes(attack, subject.random)
    return n * passes * subject.members * seconds_per_pass(subject.name, records, device, scale)


def seconds_per_pass(name: str, records: Sequence[Record], device: str, scale: str) -> float:
    """Return the seconds of one image's pass through one member: of this defense, else of any, else a guess."""
    rates = [(r.defense.name, r.timing.seconds / (r.dataset.n * _passes(r))) for r in _comparable(records, device, scale) if _passes(r)]
    own = [rate for defense, rate in rates if defense == name]
    if rates:
        return statistics.median(own or [rate for _, rate in rates])
    return SECONDS["cuda" if device.startswith("cuda") else "cpu"][scale]


def guessed_passes(attack: Attack, random: bool) -> float:
    """Return a guess of an attack's passes per image and member: two for each step, restart, draw and target, one for each query."""
    if attack.name in PASSES:
        return PASSES[attack.name][random]
    counts = {key: value for key, value in attack.parameters.items() if isinstance(value, int) and not isinstance(value, bool)}
    repeats = 1
    for key in ("restarts", "draws", "targets"):
        repeats *= max(counts.get(key, 1), 1)
    return repeats * (counts["queries"] if "queries" in counts else 2 * counts.get("steps", 1) + 1)


def _comparable(records: Iterable[Record], device: str, scale: str) -> list[Record]:
    kind = device.partition(":")[0]
    return [r for r in records if r.scale == scale and r.provenance.device.partition(":")[0] == kind]


def _passes(r: Record) -> float:
    return r.cost.forwards + r.cost.backwards
