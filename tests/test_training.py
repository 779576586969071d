"""Training: the inner attack, what learns and what does not, stages that are shared, kept and resumed to the same weights."""

import contextlib
import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from robench import data, fingerprint, noise, training, zoo
from robench.adversarial import attack_batch, train_step
from robench.adversarial import losses as loss_of_each
from robench.aggregate import mean_of_logits, mean_of_probabilities
from robench.batches import AT_ONCE, augmented, batches
from robench.data import Dataset
from robench.defense import Defense, Ensemble
from robench.errors import UserError
from robench.fingerprint import state_hash
from robench.layout import memory_format
from robench.noise import Draw
from robench.recipe import InnerAttack, Recipe, Stage, learning_rate
from robench.threat import ThreatModel
from robench.training import train

PLAIN = Recipe(epochs=2, learning_rate=0.05, batch_size=32, augmentation="none")
LINF = InnerAttack("Linf:48/255", steps=2, step_size=0.2, start="gaussian")
ADVERSARIAL = dataclasses.replace(PLAIN, attack=LINF, clean_weight=1.0)


class Small(nn.Module):
    """A convolution with batch norm and a linear head, on 16 x 16 images."""

    def __init__(self, seed: int, width: int = 4) -> None:
        super().__init__()
        with noise.isolated_generator(seed):
            self.body = nn.Sequential(nn.Conv2d(3, width, 3, 4), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten())
            self.head = nn.Linear(width * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


def ensemble(*seeds: int) -> Ensemble:
    return Ensemble([Small(seed) for seed in seeds], mean_of_logits)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits", "train").first(128)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits are compared, so the sums must be taken in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def losses(lines: list[str]) -> list[float]:
    return [float(line.partition("loss ")[2].partition(",")[0]) for line in lines if "loss" in line]


@pytest.mark.parametrize(
    "recipe",
    [
        dataclasses.replace(PLAIN, epochs=3),
        dataclasses.replace(PLAIN, epochs=3, optimiser="adam", learning_rate=0.01, schedule="constant"),
        dataclasses.replace(PLAIN, epochs=3, precision="bfloat16", augmentation="crop"),
        dataclasses.replace(ADVERSARIAL, epochs=3, loss_on="predictors"),
    ],
    ids=["sgd", "adam", "bfloat16", "adversarial"],
)
def test_the_loss_falls(recipe: Recipe, digits: Dataset, tmp_path: Path) -> None:
    defense, lines = ensemble(0), list[str]()
    train(defense, (Stage(recipe, 0),), digits, folder=tmp_path, progress=lines.append)
    assert len(losses(lines)) == 3
    assert losses(lines)[-1] < losses(lines)[0] - 0.1
    x, y = data.as_float(digits.images), digits.labels
    assert not defense.training
    assert functional.cross_entropy(defense(x), y) < functional.cross_entropy(ensemble(0).eval()(x), y)
    assert all(parameter.requires_grad for parameter in defense.parameters())


def test_batches_augmented_together_are_the_batches(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(PLAIN, augmentation="crop-flip", batch_size=24)

    def made() -> list[tuple[Tensor, ...]]:
        return list(batches(digits.images, digits.labels, recipe, 3, 1, torch.contiguous_format))

    one_by_one = made()
    monkeypatch.setitem(AT_ONCE, "cpu", 4)
    together = made()
    assert [len(x) for _, x, _ in together] == [24, 24, 24, 24, 24, 8]
    assert all(torch.equal(a, b) for own, other in zip(one_by_one, together, strict=True) for a, b in zip(own, other, strict=True))


# The inner attack


@pytest.mark.parametrize(
    ("threat", "start"),
    [("Linf:16/255", "clean"), ("Linf:16/255", "uniform"), ("Linf:16/255", "gaussian"), ("L2:0.8", "clean"), ("L2:0.8", "uniform")],
)
def test_the_inner_attack_stays_in_the_budget_and_raises_the_loss(threat: str, start: Any, digits: Dataset) -> None:
    defense = ensemble(0, 1).eval()
    x, y = data.as_float(digits.images[:32]), digits.labels[:32]
    attack = InnerAttack(threat, steps=3, step_size=ThreatModel.parse(threat).epsilon / 2, start=start)
    x_adv = attack_batch(defense, x, y, attack, Draw(0, torch.arange(32)))
    assert ThreatModel.parse(threat).violation(x_adv, x) is None
    with torch.no_grad():
        before, after = (functional.cross_entropy(defense(images), y, reduction="none") for images in (x, x_adv))
    assert bool((after > before).all())
    assert all(parameter.grad is None for parameter in defense.parameters())
    assert not x_adv.requires_grad


def test_the_inner_attack_starts_where_it_says(digits: Dataset) -> None:
    x, y, draw = data.as_float(digits.images[:64]), digits.labels[:64], Draw(0, torch.arange(64))
    inside = torch.full_like(x, 0.5)

    def start(kind: Any, number: int = 0) -> Tensor:
        attack = InnerAttack("Linf:0.1", steps=0, step_size=0.1, start=kind)
        return attack_batch(ensemble(0), inside, y, attack, dataclasses.replace(draw, number=number)) - inside

    assert not start("clean").any()
    assert float(start("uniform").std()) == pytest.approx(0.1 / math.sqrt(3), rel=0.03)
    # Normal of standard deviation 0.05, clipped at two of them: 0.05 times the root of 0.9205 (numerically integrated).
    truth = torch.randn(10**6, generator=torch.Generator().manual_seed(0)).clamp(-2, 2).std() * 0.05
    assert float(start("gaussian").std()) == pytest.approx(float(truth), rel=0.03)
    for kind in ("uniform", "gaussian"):
        assert torch.equal(start(kind), start(kind))
        assert not torch.equal(start(kind), start(kind, number=1))


def test_one_step_of_the_inner_attack_is_fgsm_on_a_linear_model() -> None:
    with noise.isolated_generator(0):
        linear = nn.Linear(12, 2)
    x, y = torch.full((4, 3, 2, 2), 0.5), torch.tensor([0, 1, 0, 1])
    defense = Ensemble([nn.Sequential(nn.Flatten(), linear)], mean_of_logits).eval()
    x_adv = attack_batch(defense, x, y, InnerAttack("Linf:0.1", 1, 0.1, "clean"), Draw(0, torch.arange(4)))
    direction = (linear.weight[1] - linear.weight[0]).sign().reshape(1, 3, 2, 2)
    towards_other = torch.where(y == 0, 1.0, -1.0).reshape(-1, 1, 1, 1)
    assert torch.allclose(x_adv, x + 0.1 * direction * towards_other)


# What learns


def test_only_the_named_parts_learn(digits: Dataset, tmp_path: Path) -> None:
    defense = ensemble(0)
    before = {name: tensor.clone() for name, tensor in defense.state_dict().items()}
    train(defense, (Stage(ADVERSARIAL, 0, "networks.0", trainable=("head",)),), digits, folder=tmp_path)
    changed = {name for name, tensor in defense.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"networks.0.head.weight", "networks.0.head.bias"}


def test_a_whole_module_learns_with_its_statistics_and_nothing_else(digits: Dataset, tmp_path: Path) -> None:
    defense = ensemble(0, 1)
    before = {name: tensor.clone() for name, tensor in defense.state_dict().items()}
    train(defense, (Stage(PLAIN, 0, "networks.1"),), digits, folder=tmp_path)
    changed = {name for name, tensor in defense.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith("networks.1.")}


def test_the_clean_weight_is_that_of_the_clean_half(digits: Dataset) -> None:
    """The step's loss is the mean of the adversarial and the clean loss at equal weight, in one forward of both halves."""
    x, y, draw = data.as_float(digits.images[:32]), digits.labels[:32], Draw(0, torch.arange(32))
    defense = ensemble(0)
    x_adv = attack_batch(defense.eval(), x, y, LINF, draw)
    logits = ensemble(0).train()(torch.cat([x_adv, x])).detach()
    adversarial, clean = (functional.cross_entropy(part, y) for part in logits.split(32))
    for weight in (0.5, 1.0):
        module = ensemble(0)
        optimiser = torch.optim.SGD(module.parameters(), lr=0.0)
        loss = train_step(module, optimiser, dataclasses.replace(ADVERSARIAL, clean_weight=weight), x, y, draw)
        assert float(loss) == pytest.approx(float((adversarial + weight * clean) / (1 + weight)), rel=1e-5)


def test_the_loss_on_predictors_is_each_ones_own(digits: Dataset) -> None:
    x, y = data.as_float(digits.images[:16]), digits.labels[:16]
    defense = ensemble(0, 1).eval()
    predictors = defense.predictors(x)
    own = loss_of_each(defense, predictors, y, dataclasses.replace(PLAIN, loss_on="predictors"))
    parts = [functional.cross_entropy(predictors[:, i], y, reduction="none") for i in range(2)]
    assert torch.allclose(own, (parts[0] + parts[1]) / 2)
    joint = loss_of_each(defense, predictors, y, PLAIN)
    assert torch.allclose(joint, functional.cross_entropy(predictors.mean(1), y, reduction="none"))


def test_training_leaves_the_global_generator_alone(digits: Dataset, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    train(ensemble(0), (Stage(ADVERSARIAL, 0),), digits, folder=tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_library_noise_inside_a_network_is_the_same_each_time(digits: Dataset, tmp_path: Path) -> None:
    def trained(folder: str) -> str:
        with noise.isolated_generator(0):
            network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(768, 10))
        defense = Ensemble([network], mean_of_logits)
        train(defense, (Stage(PLAIN, 0),), digits, folder=tmp_path / folder)
        return state_hash(defense)

    first = trained("a")
    torch.rand(3)
    assert trained("b") == first


def test_averaging_keeps_the_moving_average_of_weights_and_statistics(digits: Dataset, tmp_path: Path) -> None:
    """Of the weights after each step, the first ones to begin with, by a plain loop."""
    recipe = dataclasses.replace(PLAIN, averaging=0.8)
    trained, module = ensemble(0), ensemble(0)
    train(trained, (Stage(recipe, 0),), digits, folder=tmp_path)
    parameters = list(module.parameters())
    optimiser = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    average: dict[str, Tensor] = {}
    step = 0
    for epoch in range(recipe.epochs):
        for indices, x, y in batches(digits.images, digits.labels, recipe, 0, epoch, torch.contiguous_format):
            optimiser.param_groups[0]["lr"] = learning_rate(recipe, step, 8)
            train_step(module, optimiser, recipe, x, y, Draw(0, indices, epoch))
            now = {name: tensor.clone() for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
            average = {name: 0.8 * average[name] + 0.2 * tensor for name, tensor in now.items()} if average else now
            step += 1
    state = trained.state_dict()
    assert step == 8
    for name, tensor in average.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(state["networks.0.head.weight"], now["networks.0.head.weight"], atol=1e-3)


# Stages that are kept


def test_a_stage_is_trained_once(digits: Dataset, tmp_path: Path) -> None:
    first, second, lines = ensemble(0, 1), ensemble(0, 1), list[str]()
    stages = (Stage(ADVERSARIAL, 0, "networks.0"), Stage(PLAIN, 1, "networks.1"))
    train(first, stages, digits, folder=tmp_path)
    train(second, stages, digits, folder=tmp_path, progress=lines.append)
    assert lines == ["stage 1/2 already trained", "stage 2/2 already trained"]
    assert state_hash(first) == state_hash(second)
    assert not second.training
    assert len(list(tmp_path.iterdir())) == 2, "no checkpoint or temporary file stays"


def test_another_version_of_a_defense_is_trained_again(digits: Dataset, tmp_path: Path) -> None:
    stages = (Stage(dataclasses.replace(PLAIN, epochs=1), 0),)
    for version, already in ((1, False), (1, True), (2, False), (2, True), (1, True)):
        lines = list[str]()
        train(ensemble(0), stages, digits, folder=tmp_path, version=version, progress=lines.append)
        assert ("already trained" in lines[0]) == already


def test_what_is_read_back_behaves_bit_for_bit_as_what_was_trained(digits: Dataset, tmp_path: Path) -> None:
    """Otherwise a second evaluation, with the weights from the cache, would be another measurement."""
    setting = zoo.Setting("digits", 10, (3, 16, 16), "smoke", 0)
    first, second = (zoo.parse("natural").build(setting).defense for _ in range(2))
    for defense in (first, second):
        train(defense, (Stage(dataclasses.replace(PLAIN, epochs=1), 0),), digits, folder=tmp_path)
    x = data.as_float(digits.images)
    with torch.no_grad():
        assert torch.equal(first(x), second(x))


def test_two_defenses_share_a_stage(digits: Dataset, tmp_path: Path) -> None:
    alone, pair, lines = ensemble(0), ensemble(0, 1), list[str]()
    train(alone, (Stage(PLAIN, 0, "networks.0"),), digits, folder=tmp_path)
    train(pair, (Stage(PLAIN, 0, "networks.0"), Stage(PLAIN, 1, "networks.1")), digits, folder=tmp_path, progress=lines.append)
    assert lines[0] == "stage 1/2 already trained"
    assert lines[1].startswith("stage 2/2 epoch 1/2: loss ")
    assert state_hash(pair.networks[0]) == state_hash(alone.networks[0])


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"recipe": dataclasses.replace(PLAIN, learning_rate=0.06)}, {"trainable": ("networks.0.head",)},
        {"recipe": ADVERSARIAL},
    ],
    ids=["seed", "rate", "trainable", "attack"],
)  # fmt: skip
def test_another_stage_is_trained_anew(change: dict[str, Any], digits: Dataset, tmp_path: Path) -> None:
    stage = Stage(PLAIN, 0)
    hashes = set()
    for wanted, examples in ((stage, digits), (dataclasses.replace(stage, **change), digits), (stage, digits.first(100))):
        defense = ensemble(0)
        train(defense, (wanted,), examples, folder=tmp_path)
        hashes.add(state_hash(defense))
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("natural,backbone=resnet8-16s2", "natural,backbone=resnet8-16"),
        ("multires,variant=as_published", "multires,variant=as_described"),
    ],
)
def test_equal_weights_that_compute_something_else_are_trained_anew(one: str, other: str, digits: Dataset) -> None:
    setting = zoo.Setting("digits", 10, (3, 16, 16), "smoke", 0)
    defenses = [zoo.parse(text).build(setting).defense for text in (one, other)]
    assert state_hash(defenses[0]) == state_hash(defenses[1])
    hashes = [fingerprint.behaviour_hash(defense, digits) for defense in defenses]
    assert hashes[0] != hashes[1]
    assert hashes == [fingerprint.behaviour_hash(defense, digits) for defense in defenses]
    assert all(parameter.dtype == torch.float32 for parameter in defenses[0].parameters())
    assert fingerprint.behaviour_hash(defenses[0].to(memory_format=torch.channels_last), digits) == hashes[0]


def test_another_aggregation_is_trained_anew(digits: Dataset, tmp_path: Path) -> None:
    first, second, lines = ensemble(0, 1), ensemble(0, 1), list[str]()
    second.aggregator = mean_of_probabilities
    train(first, (Stage(PLAIN, 0),), digits, folder=tmp_path)
    train(second, (Stage(PLAIN, 0),), digits, folder=tmp_path, progress=lines.append)
    assert losses(lines)
    assert state_hash(first) != state_hash(second)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimiser": "sgd"},
        {"optimiser": "adam"},
        {"averaging": 0.9},
        {"attack": InnerAttack("Linf:48/255", 1, 0.2, "uniform", mode="training")},
    ],
    ids=["sgd", "adam", "averaging", "single-step"],
)
@pytest.mark.parametrize("after", [1, 2, 3])
def test_interrupted_training_goes_on_to_the_same_weights(
    changes: dict[str, Any], after: int, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    recipe = dataclasses.replace(ADVERSARIAL, epochs=3, learning_rate=0.02, augmentation="crop", **changes)
    stages = (Stage(recipe, 0),)
    whole = ensemble(0)
    history = train(whole, stages, digits, folder=tmp_path / "whole")
    lines: list[str] = []

    def impatient(line: str) -> None:
        lines.append(line)
        if len(lines) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(ensemble(0), stages, digits, folder=tmp_path / "parts", progress=impatient)
    resumed, lines = ensemble(0), []
    assert train(resumed, stages, digits, folder=tmp_path / "parts", progress=lines.append) == history
    # The epoch whose line was being told is not yet kept.
    assert [line.split(":")[0] for line in lines] == [f"stage 1/1 epoch {epoch}/3" for epoch in range(after, 4)]
    assert state_hash(resumed) == state_hash(whole)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [path.name for path in (tmp_path / "whole").iterdir()]


def test_a_checkpoint_without_a_history_is_not_gone_on_from(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an earlier release: its weights are those after two epochs, and nothing says what these came to."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    stages, whole = (Stage(dataclasses.replace(PLAIN, epochs=3), 0),), ensemble(0)
    train(whole, stages, digits, folder=tmp_path / "whole")

    def impatient(line: str) -> None:
        if "epoch 3" in line:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        train(ensemble(0), stages, digits, folder=tmp_path, progress=impatient)
    (path,) = tmp_path.glob("*.checkpoint")
    path.write_bytes(safetensors.torch.save(safetensors.torch.load(path.read_bytes())))
    resumed, lines = ensemble(0), list[str]()
    train(resumed, stages, digits, folder=tmp_path, progress=lines.append)
    assert len(losses(lines)) == 3
    assert state_hash(resumed) == state_hash(whole)


def test_checkpoints_are_not_written_after_every_short_epoch(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 1e9)
    seen: list[bool] = []
    recipe = dataclasses.replace(PLAIN, epochs=3)
    train(ensemble(0), (Stage(recipe, 0),), digits, folder=tmp_path, progress=lambda _: seen.append(any(tmp_path.glob("*.checkpoint"))))
    assert seen == [False] * 3


KILLED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from robench import data, training
from robench.recipe import Stage
sys.path.insert(0, {tests!r})
from test_training import ADVERSARIAL, Small
from robench.defense import Ensemble
from robench.aggregate import mean_of_logits
import dataclasses
training.CHECKPOINT_SECONDS = 0.0
recipe = dataclasses.replace(ADVERSARIAL, epochs=40)
defense = Ensemble([Small(0)], mean_of_logits)
torch.optim.SGD(defense.parameters())  # imports what takes seconds
print("ready", flush=True)
training.train(defense, (Stage(recipe, 0),), data.load("digits", "train").first(128), folder=Path(sys.argv[1]),
               progress=lambda line: print(line, flush=True))
print("finished", flush=True)
"""


def training_process(folder: Path) -> "subprocess.Popen[str]":
    """Start the training above in a process of its own and return it when it has begun."""
    source = KILLED.format(tests=str(Path(__file__).parent))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", source, str(folder)], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_training_that_is_killed_at_any_moment_goes_on_to_the_same_file(tmp_path: Path) -> None:
    """SIGKILL a few times, wherever it strikes (a step, a checkpoint half written), until the training is through."""
    whole = training_process(tmp_path / "whole")
    started = time.monotonic()
    output, _ = whole.communicate()
    duration = time.monotonic() - started
    assert output.endswith("finished\n")
    moments = random.Random(0)
    kills = 0
    while True:
        process = training_process(tmp_path / "parts")
        try:
            output, _ = process.communicate(timeout=None if kills == 3 else moments.uniform(0.1, 0.4) * duration)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            output, _ = process.communicate()
            kills += 1
            continue
        assert process.returncode == 0
        break
    assert kills
    (expected,), (found,) = (list((tmp_path / name).glob("*.safetensors")) for name in ("whole", "parts"))
    assert found.name == expected.name
    assert found.read_bytes() == expected.read_bytes()
    assert not list((tmp_path / "parts").glob("*.checkpoint"))


# Bad files and bad recipes


@pytest.mark.parametrize("content", [b"", b"not weights", None], ids=["empty", "text", "cut off"])
@pytest.mark.parametrize("suffix", [".safetensors", ".checkpoint"])
def test_a_corrupt_file_is_an_error_of_one_line(
    suffix: str, content: bytes | None, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)

    def stop(line: str) -> None:
        if suffix == ".checkpoint" and "epoch 2" in line:
            raise KeyboardInterrupt

    stages = (Stage(PLAIN, 0),)
    with contextlib.suppress(KeyboardInterrupt):
        train(ensemble(0), stages, digits, folder=tmp_path, progress=stop)
    (path,) = tmp_path.glob(f"*{suffix}")
    path.write_bytes(path.read_bytes()[:-5] if content is None else content)
    with pytest.raises(UserError, match=r"^weights file .* is corrupt or unreadable \(.*\); delete it to train again$"):
        train(ensemble(0), stages, digits, folder=tmp_path)
    path.unlink()
    train(ensemble(0), stages, digits, folder=tmp_path)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("", r"^training failed in epoch 1: .* logits that are not finite .*; if it diverged, lower the learning rate$"),
        ("networks.0", r"^training diverged in epoch 1: the loss is (nan|inf); lower the recipe's learning rate$"),
    ],
)
def test_a_diverging_training_is_an_error_of_one_line(module: str, message: str, digits: Dataset, tmp_path: Path) -> None:
    recipe = dataclasses.replace(PLAIN, learning_rate=1e30, schedule="constant")
    with pytest.raises(UserError, match=message):
        train(ensemble(0), (Stage(recipe, 0, module),), digits, folder=tmp_path)
    assert not list(tmp_path.iterdir()), "what diverged is not kept"


def test_a_folder_that_cannot_be_written_is_an_error(digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^cannot write "):
        train(ensemble(0), (Stage(PLAIN, 0),), digits, folder=tmp_path / "file" / "folder")


# Augmentation, layout


def windows(image: Tensor, padding: int) -> list[Tensor]:
    """Return every crop (C, H, W) of an image padded with zeros."""
    _, height, width = image.shape
    padded = functional.pad(image, (padding,) * 4)
    return [padded[:, i : i + height, j : j + width] for i in range(2 * padding + 1) for j in range(2 * padding + 1)]


@pytest.mark.parametrize("kind", ["crop", "crop-flip"])
def test_augmentation_shifts_up_to_an_eighth_and_mirrors_half(kind: str) -> None:
    count = 1500
    image = torch.randint(1, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = augmented(image.expand(count, -1, -1, -1), kind, Draw(0, torch.arange(count), 4))
    assert (made.shape, made.dtype) == ((count, 3, 16, 16), torch.uint8)
    crops = windows(image, 2)
    choices = torch.stack([*crops, *(crop.flip(2) for crop in crops)] if kind == "crop-flip" else crops)
    found = (made[:, None] == choices[None]).flatten(2).all(2)
    assert bool((found.sum(1) == 1).all()), "each is exactly one of the crops"
    counts = found.sum(0)
    expected = count / len(choices)
    assert float(((counts - expected) ** 2 / expected).sum()) < 1.8 * len(choices), "each crop is as likely as any other"
    if kind == "crop-flip":
        assert abs(int(counts[25:].sum()) / count - 0.5) < 0.05


def test_augmentation_depends_on_seed_example_and_epoch_alone() -> None:
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(64)

    def some_augmented(chosen: Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
        return augmented(images[chosen], "crop-flip", Draw(seed, ids[chosen], epoch))

    whole, some = some_augmented(ids), torch.tensor([40, 3, 17])
    assert torch.equal(some_augmented(some), whole[some])
    assert not torch.equal(some_augmented(ids, seed=1), whole)
    assert not torch.equal(some_augmented(ids, epoch=1), whole)
    assert torch.equal(augmented(images, "none", Draw(0, ids)), images)


def test_an_epoch_sees_every_image_once_in_an_order_of_its_own(digits: Dataset) -> None:
    def order(seed: int, epoch: int) -> Tensor:
        made = list(batches(digits.images, digits.labels, PLAIN, seed, epoch, torch.channels_last))
        for indices, x, y in made:
            assert torch.equal(x, data.as_float(digits.images[indices]))
            assert torch.equal(y, digits.labels[indices])
        return torch.cat([indices for indices, _, _ in made])

    assert torch.equal(order(0, 0).sort().values, torch.arange(128))
    assert torch.equal(order(0, 0), order(0, 0))
    assert not torch.equal(order(0, 0), order(0, 1))
    assert not torch.equal(order(0, 0), order(1, 0))


@pytest.mark.parametrize(("width", "layout"), [(15, torch.contiguous_format), (16, torch.channels_last)])
def test_narrow_convolutions_are_trained_in_the_contiguous_layout(width: int, layout: torch.memory_format) -> None:
    assert memory_format(Ensemble([Small(0, width)], mean_of_logits), "cpu") == layout
    assert memory_format(Ensemble([Small(0, width)], mean_of_logits), "cuda") == torch.channels_last


class Jitter(Defense):
    """A linear network behind noise of its draw."""

    random = True

    def __init__(self) -> None:
        super().__init__()
        with noise.isolated_generator(0):
            self.network = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
        self.seen: list[Draw | None] = []

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        self.seen.append(draw)
        logits: Tensor = self.network(x if draw is None else x + 0.1 * noise.normal(draw, "jitter", tuple(x.shape[1:])))
        return logits[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        return [self.network]


def test_a_random_defense_trains_on_the_noise_of_example_and_epoch(digits: Dataset, tmp_path: Path) -> None:
    first, second = Jitter(), Jitter()
    for defense, folder in ((first, "a"), (second, "b")):
        train(defense, (Stage(ADVERSARIAL, 7),), digits, folder=tmp_path / folder)
    assert state_hash(first) == state_hash(second)
    draws = [draw for draw in first.seen if draw is not None]
    assert len(draws) == len(first.seen)
    assert {draw.number for draw in draws if draw.seed == 7} == {0, 1}, "two epochs"
