"""Evaluation on models whose robust accuracy is known, and the promises of a record: repeatable, resumable, checked."""

import hashlib
import json
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench import attacks, data, noise, plugins, provenance, record, targets
from robench.aggregate import mean_of_logits
from robench.attacks import Attack
from robench.attacks.registry import Found
from robench.data import Dataset, as_float
from robench.defense import Defense, Ensemble, Plain
from robench.errors import UserError
from robench.evaluation import evaluate, measure
from robench.noise import Draw
from robench.record import Provenance, Record
from robench.scoring import SCORING_DRAWS, predictions
from robench.surrogate import Substitute
from robench.threat import ThreatModel

SHAPE = (3, 4, 4)
SIZE = 48
LINF = ThreatModel.parse("Linf:0.03")


def linear(seed: int = 0, classes: int = 2) -> nn.Sequential:
    """Return a linear classifier of images around 1/2, its logits of the order of the budget's effect."""
    with noise.isolated_generator(seed):
        layer = nn.Linear(SIZE, classes)
    with torch.no_grad():
        layer.bias -= layer.weight.sum(1) / 2
    return nn.Sequential(nn.Flatten(), layer)


def examples(count: int = 50, classes: int = 2) -> Dataset:
    """Return images in [0.3, 0.7], where the box is out of reach, and their labels by `linear`, a few of them wrong."""
    images = 0.3 + 0.4 * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        labels = linear(classes=classes)(images).argmax(1)
    labels[::9] = (labels[::9] + 1) % classes
    return data.from_tensors(images, labels, classes, "levels")


def margins(dataset: Dataset, dual: float) -> tuple[Tensor, Tensor]:
    """Return each example's margin under `linear`, float64 (B,), and the dual norm of its gradient."""
    weight, bias = (p.detach().double() for p in linear()[1].parameters())  # type: ignore[union-attr]
    difference, offset = weight[1] - weight[0], bias[1] - bias[0]
    signed = dataset.images.double().flatten(1) @ difference + offset
    return torch.where(dataset.labels == 1, signed, -signed), difference.norm(p=dual)


@pytest.mark.parametrize(
    ("threat", "attack", "dual"),
    [
        ("Linf:0.03", "fgsm", 1),
        ("Linf:0.03", "pgd-20", 1),
        ("Linf:0.02", "apgd-ce", 1),
        ("L2:0.15", "fgsm", 2),
        ("Linf:0.03", "fast", 1),
        ("L2:0.15", "adaptive,steps=10,queries=10", 2),
        ("Linf:0.03", "autoattack,steps=10,queries=10", 1),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_robust_accuracy_of_a_linear_model_is_the_closed_form(threat: str, attack: str, dual: int, precision: Any) -> None:
    """Robust exactly where the margin exceeds the budget times the dual norm of the weights' difference."""
    model, dataset = ThreatModel.parse(threat), examples()
    margin, norm = margins(dataset, dual)
    left = margin - model.epsilon * norm
    assert float(left.abs().min()) > 1e-5, "no example lies on the border"
    made = measure(targets.of_module(linear()), dataset, model, attacks.parse(attack), precision=precision)
    assert made.outcomes.robust == (left > 0).double().tolist()
    assert made.outcomes.clean == (margin > 0).double().tolist()
    assert made.robust_accuracy.value == float((left > 0).double().mean())
    assert 0.1 < made.robust_accuracy.value < made.clean_accuracy.value < 0.95
    assert made.precision == precision
    assert made.threat == threat


class Coarse(nn.Module):
    """Logits of about 1000, whose difference only float32 resolves: in bfloat16 all are equal, and class 0 wins."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = linear()
        with torch.no_grad():
            self.flat[1].bias += 1000  # type: ignore[operator, union-attr]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.flat(x)
        return logits


def test_what_fools_only_in_reduced_precision_does_not_count() -> None:
    dataset, threat = examples(200), ThreatModel.parse("Linf:0.015")
    margin, norm = margins(dataset, 1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert not Coarse()(dataset.images).argmax(1).any(), "bfloat16 cannot tell the classes apart"
    # There every image of class 1 counts as fooled at the start, and the attack on it ends before it began.
    made = measure(targets.of_module(Coarse()), dataset, threat, attacks.parse("pgd-20"), precision="bfloat16")
    decided = (dataset.labels == 1) & ((margin - threat.epsilon * norm).abs() > 1e-3)
    expected = (margin > threat.epsilon * norm).double()
    assert [r for r, d in zip(made.outcomes.robust, decided, strict=True) if d] == expected[decided].tolist()
    assert 3 < int(expected[decided].sum()) < int(((margin > 0) & decided).sum()) - 3


def test_the_stages_count_what_is_fooled_in_float32() -> None:
    """In bfloat16 every image of class 1 counts as fooled by the first."""
    dataset = examples(200)
    made = measure(targets.of_module(Coarse()), dataset, ThreatModel.parse("Linf:0.015"), attacks.parse("fast"), precision="bfloat16")
    fooled = sum(c == 1 and r == 0 for c, r in zip(made.outcomes.clean, made.outcomes.robust, strict=True))
    assert 3 < fooled == sum(made.stages.values())


def test_an_attack_that_works_in_place_is_held_to_the_images_it_was_given() -> None:
    with pytest.raises(UserError, match=r"attack bad left the threat model Linf:0\.03"):
        measure(targets.of_module(linear()), examples(), LINF, bad_attack(lambda _d, x, *_, **__: x.add_(0.2).clamp_(0, 1)))


def ensemble() -> Ensemble:
    return Ensemble([linear(seed) for seed in range(3)], mean_of_logits)


def measured(defense: nn.Module, attack: str = "pgd-5", threat: ThreatModel = LINF, **settings: Any) -> Record:
    return measure(targets.of_module(defense), settings.pop("dataset", examples()), threat, attacks.parse(attack), **settings)


def test_a_measurement_repeats() -> None:
    first, second = measured(ensemble(), seed=4), measured(ensemble(), seed=4)
    assert record.identity(first) == record.identity(second)
    assert first.seed == 4


@pytest.mark.parametrize(
    ("budget", "done"),
    [
        ({"max_passes": 0}, 16),
        ({"max_passes": 1}, 16),
        ({"max_seconds": 0.0}, 16),
        ({"max_passes": 17 * 12}, 32),
        ({"max_seconds": 1e-9}, 16),
    ],
)
def test_a_spent_budget_ends_the_attack_at_a_batch_and_makes_the_record_partial(budget: Any, done: int, tmp_path: Path) -> None:
    made = measured(linear(), batch_size=16, cache=tmp_path, **budget)
    assert made.dataset.n == made.robust_accuracy.n == done
    assert made.partial is not None
    assert made.partial.startswith(f"stopped after {done} of 50 examples, its budget of passes or time spent (")
    # The same command without it goes on from there, and a budget that is not spent changes nothing.
    whole, ample = measured(linear(), batch_size=16, cache=tmp_path), measured(linear(), batch_size=16, max_passes=10**9)
    assert whole.outcomes.robust[:done] == made.outcomes.robust
    assert record.identity(whole) == record.identity(ample)
    assert whole.partial is None


def test_a_record_tells_what_each_stage_was_the_first_to_fool() -> None:
    made = measured(linear(classes=5), "autoattack,steps=10,queries=10", dataset=examples(classes=5), batch_size=16)
    assert list(made.stages) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert sum(made.stages.values()) == sum(made.outcomes.clean) - sum(made.outcomes.robust) > 0
    assert made.stages["apgd-ce"] > 0


def test_a_stage_that_not_all_batches_need_is_counted_in_its_place() -> None:
    """`fast` smooths and looks within only where an image calls for it, so that batches have other stages."""
    calls = iter([["first", "last"], ["first", "rare", "last"], ["first", "last"]])

    def spend(_defense: Defense, x: Tensor, _y: Tensor, _threat: ThreatModel, **_other: Any) -> Found:
        return Found(x.clone(), {name: torch.ones(len(x), dtype=torch.bool) for name in next(calls)})

    attack = Attack(name="spends", version=1, parameters={}, function=spend)
    made = measure(targets.of_module(linear(), "model"), examples(30), LINF, attack, batch_size=10)
    assert list(made.stages.items()) == [("first", 30), ("rare", 10), ("last", 30)]


def test_the_measurement_leaves_the_global_generator_and_the_weights_alone() -> None:
    defense, before = ensemble(), torch.random.get_rng_state()
    weights = [p.clone() for p in defense.parameters()]
    measured(defense)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(p, w) and p.grad is None for p, w in zip(defense.parameters(), weights, strict=True))
    assert not any(m._forward_hooks for m in defense.modules())


@pytest.mark.parametrize("attack", ["pgd-5", "apgd-ce,steps=5", "pgd-adam-5"])
def test_the_batch_size_does_not_matter(attack: str) -> None:
    results = [measured(ensemble(), attack, batch_size=size) for size in (7, 64)]
    assert results[0].outcomes == results[1].outcomes
    assert results[0].robust_accuracy == results[1].robust_accuracy


def test_the_cost_is_counted_at_the_members() -> None:
    """PGD of 5 steps from a random start: six points, five gradients, three members each."""
    made = measured(ensemble(), batch_size=7)
    assert (made.cost.forwards, made.cost.backwards) == (18.0, 15.0)
    assert made.defense.members == 3


def test_a_record_says_what_was_measured() -> None:
    dataset = examples().first(20)
    made = measure(targets.of_module(ensemble(), "mine"), dataset, LINF, attacks.parse("pgd-5,loss=margin"), scale="smoke")
    assert (made.defense.name, made.defense.origin, made.defense.version) == ("mine", "module", 0)
    assert made.defense.parameters == 3 * (2 * SIZE + 2)
    assert (made.dataset.name, made.dataset.n, made.dataset.classes) == ("levels", 20, 2)
    assert made.dataset.fingerprint == examples().fingerprint
    assert made.attack.parameters["loss"] == "margin"
    assert (made.attack.name, made.attack.parameters["steps"], made.scale, made.random_score) == ("pgd-5", 5, "smoke", None)
    assert record.Record.model_validate_json(record.to_json(made)) == made


# Resume


class Counting(nn.Module):
    """A linear model that counts the images it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()
        self.images = 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        logits: Tensor = self.inner(x)
        return logits


LOOKED_AT = 15 * 16 + 2
"""Images by which each process knows the model: for its logits three times, once taking a gradient, four times in other company, once near
them, and there and beside them for its predictors' logits and the gradients of both; and two of noise, beside its copy."""


def stop_after(chunks: int) -> Callable[[str], None]:
    lines: list[str] = []

    def progress(line: str) -> None:
        lines.append(line)
        if len(lines) == chunks:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    whole = Counting()
    expected = measured(whole, batch_size=10, cache=tmp_path / "whole")
    first, second, third = Counting(), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        measured(first, batch_size=10, cache=tmp_path / "parts", progress=stop_after(3))
    resumed = measured(second, batch_size=10, cache=tmp_path / "parts")
    assert record.identity(resumed) == record.identity(expected)
    # Each of the five chunks costs the same.
    chunk = (whole.images - LOOKED_AT) / 5
    assert (first.images - LOOKED_AT, second.images - LOOKED_AT) == (3 * chunk, 2 * chunk)
    again = measured(third, batch_size=10, cache=tmp_path / "parts")
    assert record.identity(again) == record.identity(expected)
    assert third.images == LOOKED_AT


@pytest.mark.parametrize(
    "change",
    [{"attack": "pgd-6"}, {"threat": ThreatModel.parse("Linf:0.02")}, {"seed": 1}, {"batch_size": 25}, {"dataset": examples(49)}],
    ids=["attack", "threat", "seed", "batch size", "data"],
)
def test_unfinished_work_of_another_measurement_is_not_taken(change: dict[str, Any], tmp_path: Path) -> None:
    measured(Counting(), cache=tmp_path)
    model = Counting()
    measured(model, cache=tmp_path, **change)
    assert model.images > LOOKED_AT


def test_unfinished_work_of_other_code_is_not_taken(tmp_path: Path) -> None:
    """The same weights under the same name, and another forward."""

    class Doubled(Counting):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    measured(Counting(), cache=tmp_path)
    Doubled.__name__ = "Counting"
    model = Doubled()
    measured(model, cache=tmp_path)
    assert model.images > LOOKED_AT


class Surrogates(Counting):
    """The same logits whatever is declared in the place of their step."""

    def __init__(self, surrogate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step = Substitute(lambda x: x.detach(), surrogate)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.step(x))


class Rounding(Counting):
    """The same logits of the images that there are, which lie on the levels it rounds to, or not."""

    def __init__(self, rounds: bool) -> None:
        super().__init__()
        self.rounds = rounds

    def forward(self, x: Tensor) -> Tensor:
        near = (x * 1024).round() / 1024
        return super().forward(x + (near - x).detach() if self.rounds else x)


class Doubtful(Counting):
    """The same logits by another gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach() + 0 * x)


class Told(Ensemble):
    """Two networks that the mean's structure tells of, or not."""

    def __init__(self, tells: bool) -> None:
        super().__init__([linear(), linear()], mean_of_logits)
        self.tells = tells

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        shown = super().predictors(x, draw)
        return shown if self.tells else shown.mean(1, keepdim=True)


class Nested(Ensemble):
    """A defense within a defense that tells of itself, or not."""

    def __init__(self, tells: bool) -> None:
        super().__init__([Ensemble([linear(), linear(1)], mean_of_logits)], mean_of_logits)
        self.tells = tells

    @property
    def nested(self) -> bool:
        return self.tells


class Within(Ensemble):
    """One network, whose cost is counted at all of it or at a layer."""

    def __init__(self, layer: bool) -> None:
        super().__init__([linear()], mean_of_logits)
        self.layer = layer

    def members(self) -> list[nn.Module]:
        network = super().members()[0]
        return [network.get_submodule("1")] if self.layer else [network]


@pytest.mark.parametrize(
    ("kept", "asked"),
    [
        (lambda: Rounding(False), lambda: Rounding(True)),
        (lambda: Nested(False), lambda: Nested(True)),
        (lambda: Within(False), lambda: Within(True)),
        (lambda: Doubtful(), lambda: Counting()),
        (lambda: Surrogates(lambda x: 0 * x), lambda: Surrogates(lambda x: x)),
        (lambda: Told(False), lambda: Told(True)),
    ],
    ids=[
        "a step that cleans its input",
        "a nested defense that is told",
        "other members",
        "a masked gradient that was mended",
        "another surrogate",
        "structure that is told",
    ],
)
def test_results_of_a_model_with_the_same_logits_that_attacks_see_otherwise_are_not_taken(
    kept: Callable[[], nn.Module], asked: Callable[[], nn.Module], tmp_path: Path
) -> None:
    for build in (kept, asked):
        model = build()
        # One name for both, as when a file was edited; images on levels of 1/1024.
        dataset = examples()
        dataset = data.from_tensors((dataset.images * 1024).round() / 1024, dataset.labels, 2, "levels")
        measure(targets.of_module(model, "model"), dataset, LINF, attacks.parse("pgd-5"), cache=tmp_path)
    assert len(list((tmp_path / "evaluations").iterdir())) == 2


def test_what_an_attack_of_ones_own_found_is_not_taken_after_its_file_was_edited(tmp_path: Path) -> None:
    """Nobody raises the version of what is being written."""

    def found(text: str) -> float:
        path = tmp_path / "mine.py"
        path.write_text(f"from robench import attacks\ndef mine(defense, x, y, threat, **named):\n    return {text}\n")
        made = measure(
            targets.of_module(linear(), "model"), examples(), LINF, Attack("mine", 1, {}, plugins.import_file(path).mine), cache=tmp_path
        )
        return made.robust_accuracy.value

    assert found("x") > found("attacks.parse('pgd-20')(defense, x, y, threat, **named)")


def test_noise_that_no_draw_holds_is_refused() -> None:
    generator = torch.Generator()

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn(x.shape, generator=generator)

    with pytest.raises(UserError, match="different logits for the same images on one draw, so that no measurement of it repeats"):
        measured(Plain(nn.Sequential(linear(), Own()), random=True))


HERE = provenance.of_this_process("cpu")
BEFORE = HERE.model_copy(update={"commit": "1" * 40, "dirty": False})
AFTER = BEFORE.model_copy(update={"commit": "2" * 40, "processor": "another processor"})


@pytest.fixture
def made_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Provenance], None]:
    """Let what is measured from now on be another process's work."""
    return lambda made: monkeypatch.setattr(provenance, "of_this_process", lambda _device: made)


def kept(cache: Path) -> list[dict[str, Any]]:
    """Return the chunks in a cache, each said to have been made in a year of its own, from 2001 on."""
    found = []
    for number, path in enumerate(sorted(cache.glob("evaluations/*/0*.json")), start=1):
        content = json.loads(path.read_text()) | {"created": f"200{number}-01-01T00:00:00+00:00"}
        path.write_text(json.dumps(content))
        found.append(content)
    return found


@pytest.mark.parametrize("model", [linear, lambda: NoisyLinear()], ids=["deterministic", "random"])
def test_a_record_from_the_cache_is_by_what_made_its_chunks(
    model: Callable[[], nn.Module], made_by: Callable[[Provenance], None], tmp_path: Path
) -> None:
    made_by(BEFORE)
    measured(model(), batch_size=10, cache=tmp_path)
    chunks = kept(tmp_path)
    for path in tmp_path.glob("evaluations/*/controls.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"created": "2004-01-01T00:00:00+00:00"}))
    made_by(AFTER)
    again = measured(model(), batch_size=10, cache=tmp_path)
    assert (again.provenance, again.other_provenance, again.parts) == (BEFORE, [], None)
    assert again.timing.created == "2005-01-01T00:00:00+00:00"
    assert again.timing.seconds == pytest.approx(sum(chunk["seconds"] for chunk in chunks), abs=1e-3)


@pytest.mark.parametrize(("first", "second"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_record_of_two_processes_tells_of_both_and_first_of_uncommitted_changes(
    first: bool, second: bool, made_by: Callable[[Provenance], None], tmp_path: Path
) -> None:
    before, after = BEFORE.model_copy(update={"dirty": first}), AFTER.model_copy(update={"dirty": second})
    made_by(before)
    with pytest.raises(KeyboardInterrupt):
        measured(linear(), batch_size=10, cache=tmp_path, progress=stop_after(3))
    kept(tmp_path)
    made_by(after)
    both = measured(linear(), batch_size=10, cache=tmp_path)
    expected = [after, before] if second and not first else [before, after]
    assert [both.provenance, *both.other_provenance] == expected
    assert record.Record.model_validate_json(record.to_json(both)) == both
    assert both.timing.created > "2020"


def test_controls_that_another_process_made_are_told_of(made_by: Callable[[Provenance], None], tmp_path: Path) -> None:
    made_by(BEFORE)
    measured(NoisyLinear(), batch_size=50, cache=tmp_path)
    for path in tmp_path.glob("evaluations/*/0*.json"):
        path.unlink()
    made_by(AFTER.model_copy(update={"dirty": True}))
    made = measured(NoisyLinear(), batch_size=50, cache=tmp_path)
    assert made.provenance.dirty
    assert made.other_provenance == [BEFORE]


@pytest.mark.parametrize("chunk", [True, False], ids=["chunk", "controls"])
def test_unfinished_work_that_does_not_say_what_made_it_is_done_again(chunk: bool, tmp_path: Path) -> None:
    """That of an earlier release."""
    expected = measured(NoisyLinear(), batch_size=50, cache=tmp_path)
    (path,) = tmp_path.glob("evaluations/*/0*.json" if chunk else "evaluations/*/controls.json")
    content = json.loads(path.read_text())
    del content["provenance"], content["created"]
    path.write_text(json.dumps(content if chunk else content["readings"]))
    again, third = NoisyLinear(), NoisyLinear()
    assert record.identity(measured(again, batch_size=50, cache=tmp_path)) == record.identity(expected)
    assert record.identity(measured(third, batch_size=50, cache=tmp_path)) == record.identity(expected)
    assert len(again.draws) > len(third.draws)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"provenance": []}'])
@pytest.mark.parametrize("name", ["0*.json", "controls.json"])
def test_a_corrupt_file_of_unfinished_work_is_an_error_of_one_line(name: str, content: str, tmp_path: Path) -> None:
    measured(NoisyLinear(), cache=tmp_path, batch_size=50)
    (path,) = tmp_path.glob(f"evaluations/*/{name}")
    if name == "controls.json" and content.startswith('{"'):
        content = '{"readings": '
    path.write_text(content)
    with pytest.raises(UserError, match=r"is corrupt \(.*\); delete it to measure again$"):
        measured(NoisyLinear(), cache=tmp_path, batch_size=50)


@pytest.mark.parametrize(
    "wrong", [{"robust": [[1, 1]]}, {"robust": []}, {"robust": [[99] * 50]}, {"forwards": -5}, {"clean": [[-1] * 50]}], ids=str
)
def test_unfinished_work_that_does_not_fit_its_examples_is_corrupt(wrong: dict[str, Any], tmp_path: Path) -> None:
    """A prediction of no class, taken for a success, would be a wrong verdict."""
    measured(NoisyLinear(), cache=tmp_path, batch_size=50)
    path = next(tmp_path.glob("evaluations/*/0*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(UserError, match=r"is corrupt \(.*\); delete it to measure again$"):
        measured(NoisyLinear(), cache=tmp_path, batch_size=50)


@pytest.mark.parametrize("returned", [None, "images"])
def test_an_attack_that_returns_no_images_is_named(returned: object) -> None:
    attack = attacks.Attack("odd", 1, {}, lambda *_given, **_named: returned)  # type: ignore[arg-type, return-value]
    with pytest.raises(UserError, match=r"^attack 'odd' returns (NoneType|str); an attack returns images as a tensor, or a Found$"):
        attack.run(Plain(linear()), torch.rand(1, 3, 6, 6), torch.zeros(1).long(), LINF, examples=torch.arange(1), seed=0)


# Random defenses


class NoisyLinear(Defense):
    """A linear model behind noise on the image, from the draw; it keeps the draws it was given."""

    random = True

    def __init__(self, level: float = 0.02) -> None:
        super().__init__()
        self.inner = linear()
        self.level = level
        self.draws: list[Draw | None] = []

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        self.draws.append(draw)
        if draw is not None:
            x = x + self.level * noise.normal(draw, "noise", tuple(x.shape[1:])).to(x)
        logits: Tensor = self.inner(x)
        return logits[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        return [self.inner]


def test_a_random_defense_is_scored_over_fresh_draws() -> None:
    defense = NoisyLinear()
    made = measured(defense, "pgd-5,draws=2", batch_size=50)
    tenths = [outcome * 10 for outcome in (*made.outcomes.clean, *made.outcomes.robust)]
    assert all(abs(value - round(value)) < 1e-9 for value in tenths)
    assert any(0 < value < 10 for value in tenths)
    assert all(draw is not None for draw in defense.draws)
    scoring = {draw.seed for draw in defense.draws if draw is not None} - {0}
    (seed,) = scoring
    used = {draw.number for draw in defense.draws if draw is not None and draw.seed == seed}
    assert used == set(range(SCORING_DRAWS))
    attacked = {draw.number for draw in defense.draws if draw is not None and draw.seed == 0}
    assert attacked == set(range(12)), "two draws at each of six points"


def test_the_three_scores_of_a_random_defense() -> None:
    made = measured(NoisyLinear(), batch_size=50)
    score = made.random_score
    assert score is not None
    assert score.draws == SCORING_DRAWS
    assert score.mean == made.robust_accuracy
    assert score.mean.value == pytest.approx(sum(made.outcomes.robust) / 50)
    assert score.worst.value == pytest.approx(sum(outcome == 1 for outcome in made.outcomes.robust) / 50)
    # With two classes the majority is right where more than half of the draws are, and a tie goes to class 0.
    ties = sum(abs(outcome - 0.5) < 1e-9 for outcome in made.outcomes.robust)
    wins = sum(outcome > 0.5 + 1e-9 for outcome in made.outcomes.robust)
    assert wins <= round(score.majority.value * 50) <= wins + ties
    assert score.worst.value < score.mean.value


def test_the_mean_over_draws_is_the_known_probability() -> None:
    """Gaussian noise on a linear model moves the margin by a normal of known spread."""
    dataset = examples(200)
    margin, norm = margins(dataset, 2)
    level = 0.05
    spread = torch.distributions.Normal(0.0, float(level * norm))
    made = measured(NoisyLinear(level), "fgsm", dataset=dataset, threat=ThreatModel("Linf", Fraction(0)), batch_size=200)
    expected = float(spread.cdf(margin.float()).mean())
    # 2000 independent draws: four standard errors are below 0.045.
    assert made.clean_accuracy.value == pytest.approx(expected, abs=0.045)
    assert made.outcomes.clean == made.outcomes.robust


def test_a_random_defense_carries_its_controls() -> None:
    made = measured(NoisyLinear(), dataset=examples(32), batch_size=32)
    assert set(made.controls) == {
        f"{budget}: {kind} accuracy" for budget in ("tiny budget", "unbounded") for kind in ("robust", "clean")
    }  # fmt: skip
    assert made.controls["tiny budget: robust accuracy"] == pytest.approx(made.controls["tiny budget: clean accuracy"], abs=0.01)
    assert made.controls["tiny budget: clean accuracy"] == pytest.approx(made.clean_accuracy.value)
    assert made.controls["unbounded: robust accuracy"] < 0.01
    assert not measured(linear()).controls


def test_the_batch_size_does_not_matter_to_a_random_defense() -> None:
    results = [measured(NoisyLinear(), "pgd-5,draws=2", batch_size=size) for size in (7, 64)]
    assert results[0].outcomes == results[1].outcomes
    assert results[0].random_score == results[1].random_score
    assert results[0].controls == results[1].controls


def test_a_random_evaluation_resumes(tmp_path: Path) -> None:
    expected = measured(NoisyLinear(), batch_size=10)
    with pytest.raises(KeyboardInterrupt):
        measured(NoisyLinear(), batch_size=10, cache=tmp_path, progress=stop_after(2))
    for _ in range(2):
        assert record.identity(measured(NoisyLinear(), batch_size=10, cache=tmp_path)) == record.identity(expected)


def test_a_module_with_library_noise_is_measured_when_declared_random() -> None:
    module = nn.Sequential(linear(), Sprinkled())
    records = [measured(Plain(module, random=True), "fgsm") for _ in range(2)]
    assert record.identity(records[0]) == record.identity(records[1])
    assert records[0].random_score is not None


# What does not fit


class Sprinkled(nn.Module):
    """Noise from torch's global generator, in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Lost(nn.Module):
    """Logits that are not numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((len(x), 2), torch.nan)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Lost(), "Lost returns logits that are not finite"),
        (linear(classes=3), r"Sequential returns outputs of shape \(\d+, 3\); levels needs logits of shape \(batch, 2\)"),
        (nn.Flatten(0), r"Flatten returns outputs of shape \(768,\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), r"Sequential fails on images of shape \(16, 3, 4, 4\) of levels: "),
        (nn.Sequential(linear(), Sprinkled()), "gives different logits for the same images; declare it random"),
    ],
    ids=["NaN", "classes", "shape", "images", "silent randomness"],
)
def test_a_model_that_does_not_fit_is_an_error_of_one_line(module: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
        measured(module)


def test_logits_that_are_not_finite_only_on_attacked_images_are_an_error_of_one_line() -> None:
    """The first class would win by NaN, so that its images would seem robust."""

    class Lost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.clean = linear(), as_float(examples().images)

        def forward(self, x: Tensor) -> Tensor:
            known = torch.cdist(x.flatten(1), self.clean.flatten(1)).amin(1) < 1e-6
            return self.inner(x).masked_fill(~known[:, None], torch.nan)

    with pytest.raises(UserError, match=r"^[^\n]*not finite[^\n]*$"):
        measured(Lost(), attack="square,queries=3")


def bad_attack(function: Callable[..., Tensor]) -> Attack:
    return Attack("bad", 1, {}, function)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda d, x, y, t, **_: x + 1.01 * t.epsilon, "lies 0.0303"),
        (lambda d, x, y, t, **_: x - 2, "outside \\[0, 1\\]"),
        (lambda d, x, y, t, **_: x * torch.nan, "not finite"),
        (lambda d, x, y, t, **_: x[:, :, :2], "have shape"),
    ],
    ids=["budget", "box", "NaN", "shape"],
)
def test_an_attack_that_leaves_the_threat_model_is_an_error(function: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(UserError, match=f"^attack bad left the threat model Linf:0.03: .*{message}"):
        measure(targets.of_module(linear()), examples(), LINF, bad_attack(function))


def test_the_chain_of_projections_that_overstated_the_fall_of_crossmax_is_an_error() -> None:
    """Each round of the first re-evaluation's code (arXiv 2411.14834v1) projects around the last round's image: 2 rounds, 2 budgets."""

    def chained(defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, *, rounds: int, **settings: Any) -> Tensor:
        for _ in range(rounds):
            # Its mistake: the adversarial image takes the clean one's place.
            x = attacks.parse("pgd-5").function(defense, x, y, threat, steps=5, **settings)
        return x

    target = targets.of_module(linear())
    assert measure(target, examples(), LINF, bad_attack(partial(chained, rounds=1))).robust_accuracy.value < 1
    with pytest.raises(UserError, match=r"attack bad left the threat model Linf:0\.03: .*lies 0\.06"):
        measure(target, examples(), LINF, bad_attack(partial(chained, rounds=2)))


def test_a_useless_attack_still_knows_that_the_clean_image_is_an_adversary() -> None:
    """What is misclassified without any perturbation is not robust, wherever the attack ended."""
    dataset = examples()
    margin, _ = margins(dataset, 1)

    def helpful(defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, **_: Any) -> Tensor:
        point = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(defense(point), y, reduction="sum"), point)
        return x - threat.epsilon * gradient.sign()

    made = measure(targets.of_module(linear()), dataset, ThreatModel.parse("Linf:0.1"), bad_attack(helpful))
    assert made.outcomes.robust == made.outcomes.clean == (margin > 0).double().tolist()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.full((2, *SHAPE), 1.5), torch.tensor([0, 1]), r"images span \[1.5, 1.5\], not \[0, 1\]"),
        (torch.full((2, *SHAPE), -0.1), torch.tensor([0, 1]), r"images span \[-0.1, -0.1\], not \[0, 1\]"),
        (torch.full((2, *SHAPE), torch.nan), torch.tensor([0, 1]), r"images span \[nan, nan\], not \[0, 1\]"),
        (torch.zeros(2, *SHAPE), torch.tensor([0, 2]), "labels span 0 to 2, and there are 2 classes"),
        (torch.zeros(2, *SHAPE), torch.tensor([0]), "are not"),
    ],
)
def test_data_that_does_not_fit_is_an_error_of_one_line(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        data.from_tensors(images, labels, 2)


# The public function


def digit_model() -> nn.Module:
    with noise.isolated_generator(0):
        return nn.Sequential(nn.Flatten(), nn.Linear(768, 10))


def test_evaluate_takes_names() -> None:
    made = evaluate(digit_model(), dataset="digits", threat="Linf:8/255", attack="pgd-3", n=20, seed=2, name="mine")
    assert (made.defense.name, made.dataset.name, made.dataset.split, made.dataset.n) == ("mine", "digits", "test", 20)
    assert (made.threat, made.attack.name, made.seed, made.scale) == ("Linf:8/255", "pgd-3", 2, "cpu")
    assert made.robust_accuracy.value <= made.clean_accuracy.value
    same = evaluate(digit_model(), dataset=data.load("digits", "test").first(20), threat=ThreatModel.parse("Linf:8/255"),
                    attack=attacks.parse("pgd-3"), seed=2, name="mine")  # fmt: skip
    assert record.identity(made) == record.identity(same)


def test_evaluate_takes_all_examples_by_default() -> None:
    made = evaluate(linear(), dataset=examples(), threat="Linf:0.03", attack="fgsm")
    assert made.dataset.n == 50
    assert made.defense.name == "Sequential"


def test_evaluate_attacks_a_model_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.5), linear())
    assert model.training
    made = evaluate(model, dataset=examples(), threat="Linf:0.03", attack="fgsm")
    assert made.outcomes == measured(linear(), "fgsm").outcomes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n = 0 is not between 1 and 50"),
        ({"n": 51}, "n = 51 is not between 1 and 50"),
        ({"threat": "Linf8"}, "threat model 'Linf8' is not NORM:BUDGET"),
        ({"attack": "pgd"}, "attack 'pgd' should read 'pgd-N'"),
        ({"dataset": "digit"}, "unknown data set 'digit'"),
    ],
)
def test_evaluate_refuses_what_does_not_fit(settings: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"dataset": examples(), "threat": "Linf:0.03", "attack": "fgsm"} | settings
    with pytest.raises(UserError, match=message):
        evaluate(linear(), **given)


def test_scoring_draws_are_none_that_the_attack_can_have_used() -> None:
    x, ids = examples(4).images, torch.arange(4)
    defense = NoisyLinear()
    first, second = (predictions(defense, x, ids, seed=9) for _ in range(2))
    assert first.shape == (SCORING_DRAWS, 4)
    assert torch.equal(first, second)
    seeds = {draw.seed for draw in defense.draws if draw is not None}
    assert seeds == {int.from_bytes(hashlib.sha256(b"score/9").digest()[:6], "little")}
    # Attacks count their draws, and members of an ensemble theirs, from the attack's seed upwards.
    assert min(seeds) > 10**9
