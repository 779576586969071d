"""Modules of a shape that others write: weights or networks of two names, weights made at each call, what cannot be copied."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robench import data, overfitting, targets, throughput, training, zoo
from robench.adversarial import train_step
from robench.defense import Defense, Plain
from robench.fingerprint import reference_logits
from robench.folding import folded
from robench.noise import Draw
from robench.recipe import InnerAttack, Recipe, Stage

TRAIN = data.load("digits", "train").first(64)
RECIPE = Recipe(1, 0.05, augmentation="none")
ATTACK = InnerAttack("Linf:8/255", steps=1, step_size=0.03, start="uniform")


class TiedWeights(nn.Module):
    """Two layers of the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(768, 768), nn.Linear(768, 768)
        self.second.weight = self.first.weight
        self.head = nn.Linear(768, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.first(x.flatten(1)).relu()).relu())
        return logits


class OneNetworkTwice(nn.Module):
    """A network of two names, asked of an image and of its mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.left = self.right = nn.Sequential(nn.Flatten(), nn.Linear(768, 10), nn.BatchNorm1d(10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.left(x) + self.right(x.flip(3))
        return logits


class WeightsOfAHook(nn.Module):
    """A convolution whose weights a hook makes anew at each call, before a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)
        torch.nn.utils.spectral_norm(self.convolution)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.convolution(x)).mean((2, 3)))
        return logits


class NoBlankImages(nn.Module):
    """What ends in an error where it is copied, or shown an image without any contrast."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(768, 10)

    def forward(self, x: Tensor) -> Tensor:
        if not bool(x.flatten(1).std(1).all()):
            raise ValueError("an image without contrast")
        logits: Tensor = self.head(x.flatten(1))
        return logits


@pytest.mark.parametrize("module", [TiedWeights, OneNetworkTwice, WeightsOfAHook, NoBlankImages])
@pytest.mark.parametrize("recipe", [RECIPE, replace(RECIPE, attack=ATTACK), replace(RECIPE, attack=ATTACK, precision="bfloat16")])
def test_it_trains_and_is_read_back(module: type[nn.Module], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "TELLING_SECONDS", 0.0)
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        defense = Plain(module()).eval()
        before = [(name, parameter) for name, parameter in defense.named_parameters()]
        reference_logits(defense, TRAIN)
        assert [(name, parameter) for name, parameter in defense.named_parameters()] == before, "the parameters are as they were"
        training.train(defense, (Stage(recipe, seed=0),), TRAIN, folder=tmp_path)
        made.append(reference_logits(defense, TRAIN))
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(*made)


def test_a_convolution_whose_weights_a_hook_makes_is_not_folded() -> None:
    with folded(Plain(WeightsOfAHook()).eval()) as any_pair:
        assert not any_pair


def test_operations_that_cannot_be_counted_are_none() -> None:
    module = Plain(NoBlankImages())
    assert throughput.step_operations(module, RECIPE, (3, 16, 16), "cpu", ()) == 0
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="without contrast"):
        train_step(module, optimiser, RECIPE, torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.long), Draw(0, torch.arange(2)))


class Dropped(nn.Module):
    """A network with dropout, which shows in training alone."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.dropout, self.head = nn.Dropout(rate), nn.Linear(768, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(x.flatten(1)))
        return logits


def dropped(setting: zoo.Setting, *, rate: float = 0.0) -> zoo.Specimen:
    """A linear network behind dropout."""
    return zoo.Specimen(Plain(Dropped(rate)), (Stage(RECIPE, setting.seed),))


def test_a_parameter_that_shows_in_training_alone_tells_trainings_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = zoo.Entry("dropped", dropped, 1, zoo.entries()["natural"].paper, "here")
    monkeypatch.setitem(zoo._ENTRIES, "dropped", entry)
    made = [targets.trained(zoo.parse(f"dropped,rate={rate}"), TRAIN, scale="smoke", cache=tmp_path) for rate in (0.0, 0.9)]
    first, second = (reference_logits(target.defense, TRAIN) for target in made)
    assert not torch.equal(first, second)
    assert zoo.parse("natural").trained_as == zoo.entries()["natural"].version


@pytest.mark.parametrize("averaging", [0.0, 0.9])
def test_what_is_watched_for_overfitting_is_what_is_kept(averaging: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    defense = Plain(nn.Sequential(nn.Flatten(), nn.Linear(768, 10))).eval()
    recipe = replace(RECIPE, epochs=3, batch_size=8, attack=ATTACK, averaging=averaging)
    (history,) = training.train(defense, (Stage(recipe, seed=0),), TRAIN, folder=tmp_path)
    few = TRAIN.first(min(len(TRAIN), overfitting.EXAMPLES))
    draw = Draw(0, torch.arange(len(few)), recipe.epochs - 1)
    assert (history[-1].own, history[-1].strong) == overfitting.accuracies(defense, data.as_float(few.images), few.labels, ATTACK, draw)


class Watched(Defense):
    """A random defense that tells which draws it was asked for."""

    random = True

    def __init__(self) -> None:
        super().__init__()
        self.network, self.asked = nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), list[tuple[int, int]]()

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        assert draw is not None
        self.asked.append((draw.seed, draw.number))
        return self.network(x)[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]


def test_a_random_defense_is_not_trained_on_the_noise_that_its_images_were_made_for() -> None:
    defense, recipe = Watched(), replace(RECIPE, attack=replace(ATTACK, steps=3))
    x, y = data.as_float(TRAIN.images[:4]), TRAIN.labels[:4]
    train_step(defense, torch.optim.SGD(defense.parameters(), lr=0.1), recipe, x, y, Draw(5, torch.arange(4), 7))
    *attacked, trained = defense.asked
    assert trained == (5, 7)
    assert len(attacked) == len({*attacked, trained}) - 1 == 3
