"""Catastrophic overfitting and the speed of training: what is measured, and what is said of it."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robench import data, noise, overfitting, throughput, training
from robench.aggregate import mean_of_logits
from robench.defense import Defense, Ensemble
from robench.noise import Draw
from robench.overfitting import Epoch, accuracies, report
from robench.recipe import InnerAttack, Recipe, Stage
from robench.training import train


class Wave(Defense):
    """Two logits, whose margin is a cosine of the first value's distance from one half; a step of its period finds nothing changed."""

    def __init__(self, period: float) -> None:
        super().__init__()
        self.period = period

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        margin = (2 * math.pi / self.period * (x[:, 0, 0, 0] - 0.5) + 0.3).cos()
        return torch.stack([margin, -margin], 1)[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        return [self]


@pytest.mark.parametrize(("period", "overfitted"), [(0.1, True), (10.0, False)], ids=["masked", "flat"])
def test_what_withstands_one_step_and_not_ten_is_overfitted(period: float, overfitted: bool) -> None:
    x, draw = torch.full((64, 1, 1, 1), 0.5), Draw(0, torch.arange(64))
    own, strong = accuracies(Wave(period), x, torch.zeros(64, dtype=torch.long), InnerAttack("Linf:0.1", 1, 0.1, "clean"), draw)
    assert own == 1.0
    assert strong == pytest.approx(0.0 if overfitted else 1.0, abs=0.1)
    assert Epoch(1.0, own, strong).overfitted == overfitted


def test_the_report_says_when_it_began_and_where_it_ended() -> None:
    sound, fallen = Epoch(1.0, 0.5, 0.45), Epoch(0.5, 0.9, 0.02)
    assert report([[sound, sound], [Epoch(1.0)], []]) == {}
    assert report([[sound], [sound, fallen, fallen]]) == {
        "stage 2 overfitting": "catastrophic from epoch 2 of 3; at the end 90% of training images withstand the training's own step and "
        "2% PGD-10"
    }


def small() -> Ensemble:
    with noise.isolated_generator(0):
        return Ensemble([nn.Sequential(nn.Flatten(), nn.Linear(768, 10))], mean_of_logits)


SINGLE = Recipe(2, 0.05, batch_size=32, attack=InnerAttack("Linf:0.1", 1, 0.1, "uniform"), augmentation="none")


def test_single_step_training_keeps_both_accuracies_and_several_steps_none(tmp_path: Path) -> None:
    digits, lines = data.load("digits", "train").first(256), list[str]()
    (first,) = train(small(), (Stage(SINGLE, 0),), digits, folder=tmp_path)
    (again,) = train(small(), (Stage(SINGLE, 0),), digits, folder=tmp_path, progress=lines.append)
    assert lines == ["stage 1/1 already trained"]
    assert again == first
    assert len(first) == 2
    assert all(epoch.own is not None and epoch.strong is not None and 0 <= epoch.strong <= 1 for epoch in first)
    several = dataclasses.replace(SINGLE, attack=InnerAttack("Linf:0.1", 2, 0.1, "uniform"))
    (epochs,) = train(small(), (Stage(several, 0),), digits, folder=tmp_path)
    assert [epoch.own for epoch in epochs] == [None, None]


def test_progress_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overfitting, "accuracies", lambda *_: (0.9, 0.1))
    lines: list[str] = []
    train(small(), (Stage(SINGLE, 0),), data.load("digits", "train").first(64), folder=tmp_path, progress=lines.append)
    assert all(line.endswith("; catastrophic overfitting: 90% withstand its own step, 10% PGD") for line in lines)


# Speed


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_a_step_counts_two_passes_for_each_attack_step_and_the_update(steps: int) -> None:
    """A linear layer takes 2 x 768 x 10 operations forward, as many for its images and as many for its weights."""
    attack = InnerAttack("Linf:0.1", steps, 0.1, "clean") if steps else None
    counted = throughput.step_operations(small(), Recipe(1, 0.1, attack=attack), (3, 16, 16), "cpu", ())
    assert counted == 2 * 768 * 10 * (2 * steps + 2)


def test_seven_steps_on_a_deep_network_take_seventeen_forwards() -> None:
    """Seven attack steps of two forwards' worth and one update of three; with gradients of the weights in each step it would be 24."""
    with noise.isolated_generator(0):
        layers = [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()) for _ in range(20)]
        deep = Ensemble([nn.Sequential(nn.Conv2d(3, 16, 1), *layers, nn.Flatten(), nn.Linear(4096, 10))], mean_of_logits)
    recipe = Recipe(1, 0.1, attack=InnerAttack("Linf:0.1", 7, 0.1, "clean"))
    forward = 16 * 16 * (20 * 16 * 16 * 9 + 3 * 16) * 2 + 4096 * 10 * 2
    assert throughput.step_operations(deep, recipe, (3, 16, 16), "cpu", ()) / forward == pytest.approx(17, rel=0.002)


def test_counting_changes_nothing() -> None:
    module = small()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    throughput.step_operations(module, SINGLE, (3, 16, 16), "cpu", ())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_long_epochs_are_told_with_their_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "TELLING_SECONDS", 0.0)
    lines: list[str] = []
    train(small(), (Stage(SINGLE, 0),), data.load("digits", "train").first(64), folder=tmp_path, progress=lines.append)
    assert all(" TFLOP/s (" in line and line.endswith("% of this device's measured peak)") for line in lines)
    assert throughput.described(1000, 2e9, 8e12) == "1000 images/s, 2 TFLOP/s (25% of this device's measured peak)"
    assert throughput.peak("cpu", "float32") > 1e9
