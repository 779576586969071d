"""What is read off an attack on a random defense: its own count beside the score over fresh draws, and its controls."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench import attacks, console, controls, data, leaderboard, leaderboard_formats, record
from robench.attacks import Attack, Found
from robench.data import as_float
from robench.defense import Defense, FreshDraws
from robench.errors import UserError
from robench.evaluation import measure
from robench.noise import Draw, normal
from robench.record import Record
from robench.scoring import predictions
from robench.targets import of_module
from robench.threat import ThreatModel

LINF = ThreatModel.parse("Linf:16/255")
REFERENCE, OURS = "pyautoattack-rand,batch_size=20", "autoattack-rand,steps=20,draws=5"


class Noisy(Defense):
    """A network with Gaussian noise on its logits, which single draws see differently and attacks pay little for."""

    random = True

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        assert draw is not None
        logits: Tensor = self.network(x)
        return (logits + 1.5 * normal(draw, "noise", (10,)))[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        return [self.network]


@pytest.fixture(scope="module")
def noisy(linear_network: nn.Module) -> Defense:
    return Noisy(linear_network).eval()


def measured(defense: nn.Module, name: str, n: int = 20, threat: ThreatModel = LINF, **settings: Any) -> Record:
    return measure(of_module(defense, "noisy"), data.load("digits", "test").first(n), threat, attacks.parse(name), **settings)


@pytest.mark.parametrize("name", [pytest.param(REFERENCE, marks=pytest.mark.slow), OURS])
def test_the_attacks_own_count_is_lower_than_the_score_on_fresh_draws(noisy: Defense, name: str) -> None:
    score = measured(noisy, name).random_score
    assert score is not None
    assert score.own_count is not None
    assert list(score.own_stages) == ["clean", "apgd-ce", "apgd-dlr"]
    assert score.own_count.value < score.mean.value - 0.05
    assert score.own_stages["clean"] > score.own_stages["apgd-dlr"] == round(20 * score.own_count.value)
    assert score.worst.value <= score.mean.value


@pytest.mark.slow
def test_the_count_is_what_the_reference_prints(noisy: Defense, caplog: pytest.LogCaptureFixture) -> None:
    from pyautoattack import AutoAttack

    split = data.load("digits", "test").first(6)
    x, y, examples = as_float(split.images).contiguous(), split.labels, torch.arange(6)
    counted = attacks.parse("pyautoattack-rand,batch_size=4").run(noisy, x, y, LINF, examples=examples, seed=2).counted
    with torch.random.fork_rng(devices=[]), caplog.at_level(logging.DEBUG, "auto-attack"):
        reference = AutoAttack(FreshDraws(noisy, 2), norm="Linf", eps=LINF.epsilon, seed=2, version="rand", device="cpu")
        reference.run_standard_evaluation(x, y, batch_size=4)
    printed = [line for line in caplog.messages if "accuracy" in line]
    shares = {stage: f"{marks.float().mean():.2%}" for stage, marks in counted.items()}
    assert printed[0] == f"initial accuracy: {shares['clean']}"
    for stage in ("apgd-ce", "apgd-dlr"):
        assert any(line.startswith(f"robust accuracy after {stage.upper()}: {shares[stage]} ") for line in printed)
    assert printed[-1] == f"robust accuracy: {shares['apgd-dlr']}"


def test_a_stage_that_finds_nothing_to_attack_leaves_the_count(noisy: Defense) -> None:
    x = as_float(data.load("digits", "test").first(2).images)
    with torch.no_grad():
        wrong = noisy.members()[0](x).argmin(1)
        assert not (FreshDraws(noisy, 0)(x).argmax(1) == wrong).any()
    counted = attacks.parse("pyautoattack-rand").run(noisy, x, wrong, LINF, examples=torch.arange(2), seed=0).counted
    assert list(counted) == ["clean", "apgd-ce", "apgd-dlr"]
    assert not any(bool(marks.any()) for marks in counted.values())


def test_each_look_of_our_count_draws_anew(noisy: Defense) -> None:
    """Without a budget an image has one chance only; with a useless one it has three, and falls more often."""
    x, y = as_float(data.load("digits", "test").first(100).images), data.load("digits", "test").first(100).labels
    attack = attacks.parse("autoattack-rand,steps=1,draws=1")
    counts = {}
    for text in ("Linf:0", "Linf:1e-6"):
        counted = attack.run(noisy, x, y, ThreatModel.parse(text), examples=torch.arange(100), seed=0).counted
        counts[text] = [int(marks.sum()) for marks in counted.values()]
    assert len(set(counts["Linf:0"])) == 1
    assert counts["Linf:1e-6"][0] == counts["Linf:0"][0] > counts["Linf:1e-6"][1] > counts["Linf:1e-6"][2]


def test_a_deterministic_defense_has_no_count_of_its_own(networks: list[nn.Module]) -> None:
    made = measured(networks[0], OURS, 5)
    assert made.random_score is None


def counting(defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, *, examples: Tensor, seed: int) -> Found:
    return Found(x, counted={"clean": examples >= 0, "last": examples % 3 == 0})


def test_the_count_survives_the_cache_of_chunks(noisy: Defense, tmp_path: Path) -> None:
    """In one piece, in chunks, and from the chunks that an interrupted evaluation left."""
    attack, split = Attack("counting", 1, {}, counting, random_version=2), data.load("digits", "test").first(20)

    def run(**settings: Any) -> Record:
        return measure(of_module(noisy, "noisy"), split, LINF, attack, **settings)

    def interrupted(_line: str) -> None:
        raise KeyboardInterrupt

    assert run().attack.version == 2
    whole = run().random_score
    assert whole is not None
    assert whole.own_stages == {"clean": 20, "last": 7}
    with pytest.raises(KeyboardInterrupt):
        run(batch_size=6, cache=tmp_path, progress=interrupted)
    for _ in range(2):
        assert run(batch_size=6, cache=tmp_path).random_score == whole


def test_a_record_with_a_count_is_read_back_and_shown(noisy: Defense, tmp_path: Path) -> None:
    made = measured(noisy, OURS, 10)
    assert record.load(record.save(made, tmp_path)) == made
    score = made.random_score
    assert score is not None
    assert score.own_count is not None
    shown = dict(console.outcome(made))["  the attack's own count"]
    assert f"{100 * score.own_count.value:.1f} %" in shown
    assert f"apgd-dlr {100 * score.own_count.value:.1f} %" in shown
    (row,) = leaderboard.rows([made])
    assert any(note.startswith(f"{made.attack.name} itself counts {100 * score.own_count.value:.1f} %") for note in row.notes)


@pytest.mark.parametrize(("count", "stages", "reason"), [
    (None, {"clean": 2}, "is not the share of 3 examples"),
    (1 / 3, {"clean": 3, "last": 2}, "is not the share of 3 examples"),
    (2 / 3, {"clean": 1, "last": 2}, "rise from one stage to the next"),
])  # fmt: skip
def test_a_count_that_its_stages_belie_is_refused(
    make_record: Callable[..., Record], tmp_path: Path, count: float | None, stages: dict[str, int], reason: str
) -> None:
    text = record.to_json(make_record([1, 0, 1], defense={"random": True}))
    share = "null" if count is None else f'{{"value": {count}, "low": 0, "high": 1, "n": 3}}'
    path = tmp_path / "record.json"
    text = text.replace('"own_count": null', f'"own_count": {share}').replace('"own_stages": {}', f'"own_stages": {json.dumps(stages)}')
    path.write_text(text)
    with pytest.raises(UserError, match=reason):
        record.load(path)


def test_the_committed_records_are_still_read() -> None:
    folder = Path(__file__).parent.parent / "leaderboard" / "records"
    old = [made.random_score for made in record.load_folder(folder) if made.random_score]
    assert old
    assert all(score.own_stages == {} for score in old if score.own_count is None)


# --- controls

TINY, UNBOUNDED = "tiny budget: robust accuracy", "unbounded: robust accuracy"


def controlled(make_record: Callable[..., Record], n: int = 32, **found: float) -> Record:
    """Return a record of a random defense of 90 % clean accuracy with these readings."""
    names = {"tiny": TINY, "unbounded": UNBOUNDED, "chance": "unbounded: share of the commonest class"}
    return make_record([0.5] * n, defense={"random": True}, controls={names[name]: value for name, value in found.items()})


@pytest.mark.parametrize(("found", "n", "fails"), [
    ({}, 32, []),
    ({"unbounded": 0.146875}, 200, ["unbounded leaves 14.7 % [6.3, 30.7] of 32 examples"]),
    ({"unbounded": 1 / 32}, 32, []),
    ({"unbounded": 2 / 32}, 32, ["unbounded leaves 6.2 % [1.7, 20.1] of 32 examples"]),
    ({"unbounded": 1.0}, 2, ["unbounded leaves 100.0 % [34.2, 100.0] of 2 examples"]),
    ({"unbounded": 0.15, "chance": 0.15}, 32, []),
    ({"unbounded": 0.6, "chance": 0.15}, 32, ["unbounded leaves 60.0 % [42.9, 75.0] of 32 examples, due is at most 15.0 %"]),
    ({"tiny": 0.88}, 32, []),
    ({"tiny": 0.7}, 32, ["tiny budget leaves 70.0 % of 32 examples, clean are 90.0 %"]),
    ({"tiny": 1.0, "unbounded": 0.5}, 32, ["tiny budget leaves 100.0 % of 32 examples, clean are 90.0 %", "unbounded leaves 50.0 %"]),
])  # fmt: skip
def test_a_control_fails_where_its_interval_leaves_what_is_due(
    make_record: Callable[..., Record], found: dict[str, float], n: int, fails: list[str]
) -> None:
    texts = [failure.text for failure in controls.failures(controlled(make_record, n, **found))]
    assert len(texts) == len(fails)
    assert all(text.startswith(start) for text, start in zip(texts, fails, strict=True))


def test_controls_that_were_not_run_are_a_failure_of_a_random_defense_only(make_record: Callable[..., Record]) -> None:
    text = record.to_json(controlled(make_record)).replace(f'"{UNBOUNDED}"', '"other"')
    (failure,) = controls.failures(Record.model_validate_json(text))
    assert str(failure) == f"no controls were run ({UNBOUNDED})"
    assert controls.failures(make_record([1, 0])) == ()


def test_the_committed_reference_runs_fail_their_unbounded_control_and_no_other_record_any() -> None:
    known = record.load_folder(Path(__file__).parent.parent / "leaderboard" / "records")
    failed = {made.attack.name for made in known if controls.failures(made)}
    assert failed == {"pyautoattack-rand"}
    rows = [row for row in leaderboard.rows(known) if "pyautoattack-rand" in row.attacks]
    assert all(row.trustworthy for row in rows), "others that pass were run on them"
    left = {
        row.strongest.dataset.name: [note for note in row.notes if note.startswith("control failed (pyautoattack-rand): unbounded leaves ")]
        for row in rows
    }
    assert set(left) == {"cifar10", "digits"}
    assert all(float(note.split()[5]) > 10 for (note,) in left.values()), "a tenth of the images and more withstand any budget"


def test_a_row_is_not_trustworthy_if_every_attack_on_it_fails_a_control(make_record: Callable[..., Record]) -> None:
    bad, good = controlled(make_record, unbounded=0.5), controlled(make_record).model_copy(update={"seed": 1})
    (alone,), (both,) = leaderboard.rows([bad]), leaderboard.rows([bad, good])
    assert (alone.trustworthy, both.trustworthy) == (False, True)
    assert alone.bound == f"≤ {alone.robust}, not trustworthy"
    assert both.bound == f"≤ {both.robust}"
    few = controlled(make_record, n=10).model_copy(update={"seed": 1})
    assert not leaderboard.rows([bad, few])[0].trustworthy, "the other images were attacked by what failed alone"
    assert "no trustworthy upper bound: every attack that was run on all examples fails a control" in alone.notes
    for text in (leaderboard_formats.as_markdown([alone]), leaderboard_formats.as_csv([alone])):
        assert "control failed (pgd-20): unbounded leaves 50.0 %" in text
    assert json.loads(leaderboard_formats.as_json([alone]))["rows"][0]["trustworthy"] is False
    assert dict(console.outcome(bad))["controls"].startswith("failed: unbounded leaves 50.0 %")
    assert dict(console.outcome(good))["controls"] == "passed"
    assert "controls" not in dict(console.outcome(make_record([1, 0])))


@pytest.mark.parametrize("settings", ["", ",target=3"])
def test_a_universal_perturbation_of_a_random_defense_has_controls(noisy: Defense, settings: str) -> None:
    made = measured(noisy, f"universal,steps=30,images=200{settings}", 30)
    labels = data.load("digits", "test").first(30).labels
    assert made.controls["unbounded: share of the commonest class"] == float(labels.bincount().max()) / 30
    assert made.controls[TINY] == pytest.approx(made.controls["tiny budget: clean accuracy"], abs=0.01)
    assert controls.failures(made) == ()


def test_a_universal_perturbation_that_learns_nothing_fails_its_control(noisy: Defense) -> None:
    def nothing(defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, *, seed: int, images: int = 20) -> Tensor:
        return torch.zeros_like(x[0])

    attack = Attack("nothing", 1, {"images": 20}, nothing, apply=lambda x, _threat, learnt: x + learnt)
    made = measure(of_module(noisy, "noisy"), data.load("digits", "test").first(30), LINF, attack)
    assert [failure.control for failure in controls.failures(made)] == ["unbounded"]


@pytest.mark.parametrize(("name", "leaves"), [(REFERENCE, True), (OURS, False)])
def test_unbounded_the_reference_leaves_what_it_gave_up_and_ours_nothing(noisy: Defense, name: str, leaves: bool) -> None:
    """The reference returns the clean image of what a first draw misclassifies; ours attacks every example to the end."""
    split = data.load("digits", "test").first(30)
    x, examples, unbounded = as_float(split.images), torch.arange(30), ThreatModel.parse("Linf:1")
    x_adv = attacks.parse(name)(noisy, x, split.labels, unbounded, examples=examples, seed=0)
    left = (predictions(noisy, x_adv, examples, 0) == split.labels).double().mean(0)
    untouched = (x_adv == x).flatten(1).all(1)
    assert bool(untouched.any()) is leaves
    assert bool((left[untouched] > 0.3).any()) is leaves
    assert (float(left.mean()) > 0.05) is leaves
    assert float(left[~untouched].mean()) < 0.02
