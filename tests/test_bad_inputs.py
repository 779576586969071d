"""Models and data that are odd or bad, against every attack: the right answer or one clear line."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench import attacks, console, controls, data, evaluation, leaderboard, noise
from robench.aggregate import mean_of_logits
from robench.data import Dataset
from robench.defense import Ensemble
from robench.errors import UserError
from robench.evaluation import measure
from robench.record import Record
from robench.targets import of_module
from robench.threat import ThreatModel

SHAPE = (3, 6, 6)
SIZE = 108
LINF = ThreatModel.parse("Linf:0.02")
QUICK = {"steps": 10, "queries": 30, "draws": 2, "images": 12}
REFERENCE = ("pyautoattack", "pyautoattack-rand")
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in REFERENCE else ()) for name in attacks.registered()]
INEXACT = ("square", "universal")
"""These need not reach the optimum of a linear model in so few steps."""
LEAST = {"adaptive": 2, "apgd-dlr": 3, "apgd-t": 4, "fast": 2, "pyautoattack": 4, "pyautoattack-rand": 3}
"""Fewest classes, where these are more than one."""
IDLE = ("apgd-dlr", "apgd-t")
"""Of one class, which nothing can change, these take no pass and say nothing."""

every_attack = pytest.mark.parametrize("name", NAMES)


def quick(name: str) -> attacks.Attack:
    attack = attacks.registered()[name]
    settings = [f"{key}={value}" for key, value in QUICK.items() if key in attack.defaults() and key != attack.number]
    return attacks.parse(",".join([f"{name}-10" if attack.number else name, *settings]))


def linear(classes: int = 5) -> nn.Sequential:
    with noise.isolated_generator(0):
        layer = nn.Linear(SIZE, classes)
    with torch.no_grad():
        layer.bias -= layer.weight.sum(1) / 2
    return nn.Sequential(nn.Flatten(), layer)


class After(nn.Module):
    """The linear model with something done to its logits."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = linear(), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.inner(x))


class Half(nn.Module):
    """Half precision inside, and half-precision logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear().half()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x.half())
        return logits


class Counting(nn.Module):
    """Keeps how many images it saw in a buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        logits: Tensor = self.inner(x)
        return logits


class Remembering(nn.Module):
    """Answers an image as it answered the first like it that it saw; what it saw is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = linear(), list[tuple[Tensor, Tensor]]()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        answers = []
        for image, own in zip(x, logits, strict=True):
            known = [answer for other, answer in self.seen if float((other - image).abs().max()) < 0.03]
            if not known and len(self.seen) < 20:
                self.seen.append((image.detach(), own.detach()))
            answers.append(own if not known else known[0] + own - own.detach())
        return torch.stack(answers)


class Hooked(nn.Module):
    """Keeps its features by a hook on itself, so that a copy's hook keeps them where the copy does not look."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.inner, self.features = nn.Flatten(), linear()[1], torch.empty(0)
        self.flat.register_forward_hook(lambda _layer, _given, output: setattr(self, "features", output))

    def forward(self, x: Tensor) -> Tensor:
        self.flat(x)
        logits: Tensor = self.inner(self.features)
        return logits


class Stuck(nn.Module):
    """Batch normalisation that eval() does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(SIZE), linear())

    def train(self, mode: bool = True) -> "Stuck":
        return super().train(mode=True) if mode is not None else self

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return logits


def examples(classes: int = 5, count: int = 12) -> Dataset:
    """Return images in [0.3, 0.7], which the box does not hold back, labelled by the linear model."""
    images = 0.3 + 0.4 * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return data.from_tensors(images, linear(classes)(images).argmax(1), classes, "levels")


def standing(classes: int = 5) -> list[float]:
    """Return which examples no perturbation can change: 1 where every margin exceeds the budget times the dual norm."""
    dataset = examples(classes)
    weight, bias = (p.detach().double() for p in linear(classes)[1].parameters())  # type: ignore[union-attr]
    logits = dataset.images.flatten(1).double() @ weight.T + bias
    margins = logits.gather(1, dataset.labels[:, None]) - logits
    room = margins - LINF.epsilon * (weight[dataset.labels][:, None] - weight[None]).abs().sum(2)
    others = torch.arange(classes)[None] != dataset.labels[:, None]
    return (room.masked_fill(~others, 1).amin(1) > 0).double().tolist()


@pytest.fixture(autouse=True)
def training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attacks that learn find training images."""
    monkeypatch.setattr(evaluation.data, "load", lambda _name, _split: examples())


def measured(name: str, module: nn.Module, dataset: Dataset | None = None, **settings: Any) -> Record:
    return measure(of_module(module, "odd"), dataset or examples(), LINF, quick(name), **settings)


def is_right(made: Record, expected: list[float]) -> bool:
    exact = made.attack.name not in INEXACT
    return made.outcomes.robust == expected if exact else all(a >= b for a, b in zip(made.outcomes.robust, expected, strict=True))


def test_the_optimum_is_neither_all_nor_nothing() -> None:
    assert all(0 < sum(standing(classes)) < 12 for classes in (2, 3, 5))
    assert standing(1) == [1.0] * 12


@every_attack
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_few_classes(name: str, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation.data, "load", lambda _name, _split: examples(classes))
    if classes < LEAST.get(name, 1) and not (classes == 1 and name in IDLE):
        with pytest.raises(UserError, match=rf"^[^\n]*at least {LEAST[name]} classes, and [^\n]*{classes}[^\n]*$"):
            measured(name, linear(classes), examples(classes))
    else:
        assert is_right(measured(name, linear(classes), examples(classes)), standing(classes))


@every_attack
@pytest.mark.parametrize("label", [-1, 5])
def test_labels_out_of_range(name: str, label: int) -> None:
    dataset = examples()
    with pytest.raises(UserError, match=r"^labels span [^\n]*, and there are 5 classes$"):
        measured(name, linear(), replace(dataset, labels=dataset.labels.clone().index_fill(0, torch.tensor([3]), label)))


@every_attack
def test_a_model_in_training_mode_is_attacked_in_evaluation_mode(name: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(SIZE, eps=0), linear()).train()
    made = measured(name, model)
    assert is_right(made, standing())
    assert not model[2].running_mean.any(), "no batch was seen in training mode"  # type: ignore[operator, union-attr]


@every_attack
def test_a_model_that_stays_in_training_mode_is_refused(name: str) -> None:
    with pytest.raises(
        UserError, match=r"^odd stays in training mode after eval\(\) \([^\n]*\), where its answers may depend on the batch$"
    ):
        measured(name, Stuck())


@every_attack
def test_a_model_that_returns_probabilities(name: str) -> None:
    assert is_right(measured(name, After(lambda logits: logits.softmax(1))), standing())


@every_attack
def test_half_precision_inside(name: str) -> None:
    made = measured(name, Half())
    assert made.clean_accuracy.value == 1
    assert is_right(made, standing())


@every_attack
def test_a_model_in_half_precision_that_takes_no_float_images_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^odd fails on images of shape \(12, 3, 6, 6\) of levels: RuntimeError: [^\n]*Half[^\n]*$"):
        measured(name, linear().half())


@pytest.mark.parametrize("name", ["pgd", "fast"])
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_model(name: str) -> None:
    """TorchScript takes no hooks, and hides its layers: it is attacked as the network it is."""
    scripted = torch.jit.script(linear())
    for model in (scripted, Ensemble([scripted], mean_of_logits)):
        made = measured(name, model)
        assert made.cost == measured(name, linear()).cost
        assert is_right(made, standing())


@every_attack
def test_a_batch_of_one(name: str) -> None:
    assert is_right(measured(name, linear(), batch_size=1), standing())


@every_attack
def test_a_model_whose_logits_carry_no_gradient(name: str) -> None:
    """What has only the gradient to go by finds nothing, and its record is marked; the others go on without."""
    model = After(lambda logits: logits.detach())
    if name in REFERENCE:
        with pytest.raises(UserError, match=r"^AutoAttack needs a gradient[^\n]*$"):
            measured(name, model)
        return
    made = measured(name, model)
    (row,) = leaderboard.rows([made])
    assert row.trustworthy is (name not in controls.FOLLOW_GRADIENTS)
    if row.trustworthy:
        assert sum(made.outcomes.robust) < 9
        assert "controls" not in dict(console.outcome(made))
    else:
        assert [failure.control for failure in controls.failures(made)] == ["gradient"]
        assert dict(console.outcome(made))["controls"].startswith("failed: no gradient came back to the image (0 backwards)")


@every_attack
def test_an_honest_model_is_not_said_to_lack_a_gradient(name: str) -> None:
    assert controls.failures(measured(name, linear())) == ()


@every_attack
def test_a_model_that_cannot_be_copied_is_attacked(name: str) -> None:
    assert is_right(measured(name, Hooked()), standing())


def test_a_model_that_remembers_what_it_was_shown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^odd answers images near those it was shown otherwise than a copy of it that was shown none, "):
        measured("pgd", Remembering(), cache=tmp_path)
    assert not list(tmp_path.glob("evaluations/*/*"))


@every_attack
def test_a_model_that_changes_while_attacked_is_refused_and_nothing_of_it_kept(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^odd changes its weights or buffers while it is attacked[^\n]*$"):
        measured(name, Counting(), cache=tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_the_attacks_that_only_follow_gradients_are_those_without_queries() -> None:
    without = {name for name, attack in attacks.registered().items() if "queries" not in attack.defaults()}
    assert set(controls.FOLLOW_GRADIENTS) == without - set(REFERENCE)
