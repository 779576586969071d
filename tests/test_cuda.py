"""On a GPU: the numbers are the CPU's, the same each time, and recorded training steps are the steps they record."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robench import attacks, captured, data, evaluation, noise, replay, targets, zoo
from robench.aggregate import mean_of_logits
from robench.data import Dataset
from robench.defense import Ensemble
from robench.exact import exact_arithmetic
from robench.fingerprint import state_hash
from robench.noise import Draw
from robench.recipe import InnerAttack, Recipe, Stage
from robench.threat import ThreatModel
from robench.training import train

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

PLAIN = Recipe(epochs=2, learning_rate=0.05, batch_size=32, augmentation="crop-flip", precision="bfloat16")
LINF = InnerAttack("Linf:48/255", steps=2, step_size=0.1, start="gaussian")
RECIPES = {
    "plain": PLAIN,
    "float32": dataclasses.replace(PLAIN, precision="float32"),
    "adversarial": dataclasses.replace(PLAIN, attack=LINF, clean_weight=1.0),
    "single-step": dataclasses.replace(PLAIN, attack=dataclasses.replace(LINF, steps=1, start="uniform", mode="training")),
    "L2": dataclasses.replace(PLAIN, attack=InnerAttack("L2:2", 2, 1.0, "uniform")),
    "TRADES": dataclasses.replace(PLAIN, attack=dataclasses.replace(LINF, start="near", objective="divergence"), trades=6.0),
    "predictors": dataclasses.replace(PLAIN, attack=LINF, loss_on="predictors"),
    "averaging": dataclasses.replace(PLAIN, averaging=0.9),
    "Adam": dataclasses.replace(PLAIN, optimiser="adam", learning_rate=1e-3),
}


class Waiting(nn.Module):
    """A network whose forward reads a number from the device."""

    def __init__(self) -> None:
        super().__init__()
        with noise.isolated_generator(0):
            self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 4), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits * (1 if float(logits.detach().abs().max()) >= 0 else 0)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    # Not a multiple of the batch size: the last batch of each epoch is a smaller one.
    return data.load("digits", "train").first(32 * 7 + 5)


def networks(count: int) -> Ensemble:
    setting = zoo.Setting("digits", 10, (3, 16, 16), "smoke", 0)
    return Ensemble([zoo.parse("natural").build(dataclasses.replace(setting, seed=i)).defense for i in range(count)], mean_of_logits)


def zoo_defense(name: str) -> nn.Module:
    return zoo.parse(name).build(zoo.Setting("digits", 10, (3, 16, 16), "smoke", 0)).defense


def trained(recipe: Recipe, digits: Dataset, folder: Path, module: nn.Module | None = None) -> str:
    defense = networks(2) if module is None else Ensemble([module], mean_of_logits)
    train(defense, (Stage(recipe, 0),), digits, folder=folder, device="cuda")
    return state_hash(defense)


@needs_gpu
@pytest.mark.parametrize("name", RECIPES)
def test_recorded_steps_train_the_same_weights(name: str, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[bool]()
    record = captured.Stepper._record

    def watched(self: captured.Stepper, *batch: Any) -> Any:
        found = record(self, *batch)
        made.append(found is not None)
        return found

    monkeypatch.setattr(captured.Stepper, "_record", watched)
    recorded = trained(RECIPES[name], digits, tmp_path / "a")
    assert made == [True]
    assert trained(RECIPES[name], digits, tmp_path / "b") == recorded, "the same command, the same weights"
    monkeypatch.setattr("robench.training.can_record", lambda _module, _device: False)
    assert trained(RECIPES[name], digits, tmp_path / "c") == recorded


@needs_gpu
@pytest.mark.parametrize("name", ["plain", "adversarial", "predictors"])
def test_recorded_steps_of_a_random_defense_draw_what_the_usual_ones_do(
    name: str, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured.Stepper, "_usual", captured.WARM_UP)
    recorded = trained(RECIPES[name], digits, tmp_path / "a", zoo_defense("multires_self_ensemble"))
    monkeypatch.setattr("robench.training.can_record", lambda _module, _device: False)
    assert trained(RECIPES[name], digits, tmp_path / "b", zoo_defense("multires_self_ensemble")) == recorded


@needs_gpu
def test_what_waits_for_the_device_trains_unrecorded(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = trained(PLAIN, digits, tmp_path / "a", Waiting())
    assert bool((torch.rand(3, device="cuda") < 1).all()), "the generator works on"
    monkeypatch.setattr("robench.training.can_record", lambda _module, _device: False)
    assert trained(PLAIN, digits, tmp_path / "b", Waiting()) == tried


@needs_gpu
def test_training_comes_to_what_it_comes_to_on_the_cpu(digits: Dataset, tmp_path: Path) -> None:
    recipe, found = dataclasses.replace(RECIPES["float32"], epochs=6), []
    for device in ("cpu", "cuda"):
        history = train(networks(1), (Stage(recipe, 0),), digits, folder=tmp_path, device=device)
        found.append([epoch.loss for epoch in history[0]])
    assert found[1][0] == pytest.approx(found[0][0], rel=0.01), "the first epoch, before differences in the last bits have grown"
    assert found[1][-1] == pytest.approx(found[0][-1], rel=0.3)


@needs_gpu
def test_noise_is_the_cpus() -> None:
    examples = torch.tensor([0, 1, 7, 2**33 + 5, 49_999])
    for count in (1, 5, 4096):
        cpu, cuda = (noise.words(Draw(3, examples.to(device), 2), {"a": count, "b": 3}) for device in ("cpu", "cuda"))
        assert all(torch.equal(cpu[name], cuda[name].cpu()) for name in cpu)
    normal = [noise.normal(Draw(3, examples.to(device)), "n", (3, 16, 16)).cpu() for device in ("cpu", "cuda")]
    assert torch.allclose(*normal, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_float32_convolutions_are_in_float32() -> None:
    with noise.isolated_generator(0):
        x, weight = torch.randn(8, 64, 16, 16), torch.randn(64, 64, 3, 3)
    exact = functional.conv2d(x.double(), weight.double())

    def error() -> float:
        return float((functional.conv2d(x.cuda(), weight.cuda()).double().cpu() - exact).abs().max() / exact.abs().max())

    with exact_arithmetic():
        assert error() < 1e-5
    assert error() > 1e-5, "TF32, the default, would not show otherwise"


@needs_gpu
@pytest.mark.parametrize("attack", ["apgd-ce,steps=20", "fast", "fab-t,steps=20", "square,queries=200"])
def test_an_attack_on_a_gpu_is_as_strong_as_on_the_cpu(attack: str, digits: Dataset, tmp_path: Path) -> None:
    defense = networks(1)
    train(defense, (Stage(dataclasses.replace(RECIPES["adversarial"], precision="float32", epochs=8), 0),), digits, folder=tmp_path)
    test, threat = data.load("digits", "test").first(100), ThreatModel.parse("Linf:32/255")
    kinds: list[dict[str, Any]] = [{"device": "cpu"}, {"device": "cuda"}, {"device": "cuda", "precision": "float32"}]
    records = [evaluation.measure(targets.of_module(defense, "trained"), test, threat, attacks.parse(attack), **kind) for kind in kinds]
    cpu, half, single = (record.robust_accuracy.value for record in records)
    assert records[1].precision == "bfloat16"
    assert {record.clean_accuracy.value for record in records} == {records[0].clean_accuracy.value}
    assert abs(half - cpu) <= 0.03
    assert abs(single - cpu) <= 0.03


@needs_gpu
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("multires_self_ensemble", "pgd-30,draws=2"),
        ("multires_self_ensemble", "apgd-ce,steps=30,draws=2"),
        ("multires_self_ensemble", "adaptive,steps=25,draws=1,targets=1,queries=20"),
        ("multires_ensemble3", "pgd-15,draws=2"),
        ("ensemble2", "pgd-30"),
        ("ensemble2", "apgd-ce,steps=30"),
    ],
)
def test_replayed_attacks_are_the_usual_ones(name: str, attack: str, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    test, threat = data.load("digits", "test").first(64), ThreatModel.parse("Linf:32/255")
    made, record = list[bool](), replay.record

    def watched(*call: Any) -> Any:
        found = record(*call)
        made.append(found is not None)
        return found

    def measured() -> Any:
        return evaluation.measure(
            targets.of_module(zoo_defense(name), name), test, threat, attacks.parse(attack), device="cuda", precision=precision
        )

    monkeypatch.setattr(replay, "record", watched)
    replayed = measured()
    # APGD lets go of what fell, so that a deterministic defense is seldom asked about as many images again.
    assert all(made)
    assert made or name == "ensemble2"
    monkeypatch.setattr(replay, "DEVICE", "none")
    usual = measured()
    assert replayed.cost == usual.cost
    assert replayed.robust_accuracy.value == pytest.approx(usual.robust_accuracy.value, abs=0.05)


@needs_gpu
def test_what_waits_for_the_device_is_attacked_unrecorded(monkeypatch: pytest.MonkeyPatch) -> None:
    test, target = data.load("digits", "test").first(32), targets.of_module(Waiting(), "waiting")
    found = []
    for device in ("cuda", "none"):
        monkeypatch.setattr(replay, "DEVICE", device)
        found.append(evaluation.measure(target, test, ThreatModel.parse("Linf:32/255"), attacks.parse("pgd-30"), device="cuda"))
        assert bool((torch.rand(3, device="cuda") < 1).all()), "the generator works on"
    assert found[0].outcomes == found[1].outcomes


def test_exact_arithmetic_leaves_the_settings_as_they_were() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def settings() -> tuple[bool, ...]:
        return cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32

    usual = settings()
    with exact_arithmetic():
        assert settings() == (True, False, False, False)
    assert settings() == usual
