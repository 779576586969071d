"""How long a measurement will take: from records of its kind, and from a guess that the committed records bear out."""

import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from robench import attacks, costs
from robench.record import Record, load_folder

Build = Callable[..., Record]
RECORDS = load_folder(Path(__file__).parent.parent / "leaderboard" / "records")


KINDS = Counter((r.attack.name, r.defense.random) for r in RECORDS if r.attack.name in costs.PASSES and r.scale in ("smoke", "cpu"))


@pytest.mark.parametrize(("name", "random"), sorted(kind for kind, count in KINDS.items() if count > 1))
def test_the_guessed_passes_are_about_those_of_the_records(name: str, random: bool) -> None:
    measured = [
        (r.cost.forwards + r.cost.backwards) / r.defense.members
        for r in RECORDS
        if (r.attack.name, r.defense.random) == (name, random) and r.scale in ("smoke", "cpu")
    ]
    assert 1 / 3 < costs.guessed_passes(attacks.parse(name), random) / statistics.median(measured) < 3


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
def test_the_guessed_seconds_of_a_pass_are_about_those_of_the_records(scale: str) -> None:
    passes = {id(r): r.dataset.n * (r.cost.forwards + r.cost.backwards) for r in RECORDS}
    measured = [r.timing.seconds / passes[id(r)] for r in RECORDS if r.scale == scale and r.provenance.device == "cpu" and passes[id(r)]]
    assert 1 / 3 < costs.seconds_per_pass("natural", [], "cpu", scale) / statistics.median(measured) < 3


def test_the_same_attack_on_the_same_defense_tells_best() -> None:
    own = next(r for r in RECORDS if r.attack.name == "fast" and r.scale == "cpu" and r.provenance.device == "cpu")
    attack = attacks.parse("fast")
    subject = costs.Subject(own.defense.name, own.defense.members, own.defense.random)
    assert costs.measuring(subject, attack, 2 * own.dataset.n, [own], "cpu", "cpu") == pytest.approx(2 * own.timing.seconds)
    stranger = costs.Subject("another", 2 * own.defense.members, own.defense.random)
    assert costs.measuring(stranger, attack, own.dataset.n, [own], "cpu", "cpu") == pytest.approx(2 * own.timing.seconds)
    passes = costs.guessed_passes(attack, own.defense.random)
    assert costs.measuring(stranger, attack, 10, [own], "cuda", "cpu") == pytest.approx(
        10 * passes * stranger.members * costs.SECONDS["cuda"]["cpu"]
    )
