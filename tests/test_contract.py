"""The contract before any attack: an image's logits are its own. Who mixes the images of a batch is refused, nobody else is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional

from robench import contract, data, noise, targets
from robench.aggregate import crossmax, mean_of_logits
from robench.attacks import Attack, parse
from robench.cli import main
from robench.data import Dataset, as_float
from robench.defense import Defense, Ensemble, Plain
from robench.errors import UserError
from robench.evaluation import measure
from robench.noise import Draw
from robench.threat import ThreatModel

LINF = ThreatModel.parse("Linf:16/255")


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return data.load("digits", "test").first(40)


class Changed(nn.Module):
    """A network with a function before and one after it."""

    def __init__(self, before: Callable[[Tensor], Tensor] = lambda x: x, after: Callable[[Tensor], Tensor] = lambda logits: logits) -> None:
        super().__init__()
        with noise.isolated_generator(0):
            self.network = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 10))
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.network(self.before(x)))


class Noisy(Defense):
    """A network behind noise, and with something done to the noisy images; `places` draws by the place in the batch."""

    random = True

    def __init__(self, before: Callable[[Tensor], Tensor] = lambda x: x, places: bool = False) -> None:
        super().__init__()
        self.network, self.places = Changed(before), places

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        assert draw is not None
        if self.places:
            generator = torch.Generator().manual_seed(draw.seed + draw.number)
            return self.network(x + 0.1 * torch.randn(x.shape, generator=generator))[:, None]
        return self.network(x + 0.1 * noise.normal(draw, "noise", tuple(x.shape[1:])))[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        return [self.network]


def normalised(x: Tensor) -> Tensor:
    """Batch norm by the batch's own statistics, in whatever mode the module is."""
    return functional.batch_norm(x, None, None, training=True)


MIXING: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: Changed(normalised),
    "mean image": lambda: Changed(lambda x: x - 0.2 * x.mean(0)),
    "mean brightness": lambda: Changed(lambda x: x - x.mean((0, 2, 3), keepdim=True)),
    "contrast": lambda: Changed(lambda x: x / x.std()),
    "mean logits": lambda: Changed(after=lambda logits: logits - logits.mean(0)),
    "neighbour": lambda: Changed(lambda x: x + 0.3 * x.roll(1, 0)),
    "a member": lambda: Ensemble([Changed(), Changed(normalised)], mean_of_logits),
    "random": lambda: Noisy(lambda x: x - x.mean(0)),
    "random, by a library": lambda: Plain(nn.Sequential(Changed(normalised), Changed(before=nn.Identity()).network[2]), random=True),
}


def refusing(*_: object, **__: object) -> Tensor:
    raise AssertionError("an attack was run")


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("count", [40, 3, 2])
def test_what_mixes_the_images_of_a_batch_is_refused_before_any_attack(digits: Dataset, kind: str, count: int) -> None:
    with pytest.raises(UserError, match=r"^model answers an image by the others in its batch \([^\n]*\)[^\n]*$"):
        measure(targets.of_module(MIXING[kind](), "model"), digits.first(count), LINF, Attack("refusing", 1, {}, refusing))


class Dropped(nn.Module):
    """Dropout in evaluation mode too, by torch's global generator."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.2, training=True)


class Routed(nn.Module):
    """Two networks, each on its part of the batch, whose size the other images decide."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList([convolutions(), Changed()])

    def forward(self, x: Tensor) -> Tensor:
        dark, logits = x.mean((1, 2, 3)) < x.new_tensor(0.3), x.new_zeros(len(x), 10)
        for network, part in zip(self.networks, (dark, ~dark), strict=True):
            logits[part] = network(x[part])
        return logits


def convolutions() -> nn.Module:
    """A network with batch norm in evaluation mode whose running statistics are not its batches'."""
    with noise.isolated_generator(0):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten())


HONEST: dict[str, Callable[[], nn.Module]] = {
    "network": lambda: Changed(),
    "convolutions": convolutions,
    "half precision": lambda: Changed(after=lambda logits: 100 * logits.bfloat16().float()),
    "signs": lambda: Changed(after=lambda logits: (50 * logits).round().sign() + logits / 1000),
    "own contrast": lambda: Changed(lambda x: (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)),
    "two networks, by the image": lambda: Routed(),
    "CrossMax": lambda: Ensemble([Changed(), convolutions()], crossmax),
    "random": lambda: Noisy(),
    "random by the place": lambda: Noisy(places=True),
    "random, by a library": lambda: Plain(nn.Sequential(Dropped(), Changed()), random=True),
}


@pytest.mark.parametrize("kind", HONEST)
@pytest.mark.parametrize("count", [40, 1])
def test_honest_logits_hardly_move_and_are_measured(digits: Dataset, kind: str, count: int) -> None:
    target = targets.of_module(HONEST[kind](), "model")
    x = as_float(digits.images[: min(count, contract.TRIED)])
    draw = Draw(0, torch.arange(len(x))) if target.defense.random else None
    assert float(contract.moved_by_others(target, x, draw, digits).amax()) < contract.MOVED / 100
    assert measure(target, digits.first(count), LINF, Attack("idle", 1, {}, lambda _, x, *__, **___: x)).dataset.n == count


def test_noise_that_no_seed_holds_says_nothing_of_the_batch(digits: Dataset) -> None:
    generator = torch.Generator()
    generator.seed()
    target = targets.of_module(Plain(Changed(lambda x: x + 0.1 * torch.randn(x.shape, generator=generator)), random=True))
    x = as_float(digits.images[:16])
    assert not contract.moved_by_others(target, x, Draw(0, torch.arange(16)), digits).any()


def test_the_check_costs_a_few_passes_of_a_few_images(digits: Dataset) -> None:
    module, seen = Changed(), list[int]()
    module.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    contract.honest_logits(targets.of_module(module), as_float(digits.images[: contract.TRIED]), None, digits)
    assert seen == [16] * 8


MODELS = """
from torch import nn

class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))

    def forward(self, x):
        return self.network(x - x.mean(0))
"""


class Writing(nn.Module):
    """Works on the images it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.1).flatten(1)[:, :10]


def test_what_writes_into_its_images_is_refused(digits: Dataset) -> None:
    with pytest.raises(UserError, match=r"^model writes into the images that it is given; it has to work on a copy of them$"):
        measure(targets.of_module(Writing(), "model"), digits.first(3), LINF, Attack("refusing", 1, {}, refusing))


class Outside(nn.Module):
    """A linear classifier outside torch, which takes no image that takes a gradient."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.from_numpy(x.numpy()))


@pytest.mark.parametrize("name", ["fast", "adaptive,queries=300", "autoattack,queries=300,steps=5", "pgd-5"])
def test_what_fails_on_images_that_take_a_gradient_is_attacked_without(name: str, digits: Dataset, linear_network: nn.Module) -> None:
    few, threat = digits.first(20), ThreatModel.parse("Linf:64/255")
    torch_own, outside = (
        measure(targets.of_module(m, "model"), few, threat, parse(name)) for m in (linear_network, Outside(linear_network))
    )
    assert torch_own.robust_accuracy.value == 0
    assert outside.clean_accuracy == torch_own.clean_accuracy
    assert outside.cost.backwards == 0
    assert (outside.robust_accuracy.value < 0.3) == (name != "pgd-5")


class TwoFaced(nn.Module):
    """A classifier that gives an attack's forwards other logits."""

    def __init__(self, linear: nn.Module, other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.other = linear, other

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x)
        return self.other(logits) if x.requires_grad else logits


@pytest.mark.parametrize("other", [lambda logits: logits.flip(1), lambda logits: logits * torch.nan], ids=["other classes", "NaN"])
def test_what_answers_an_attack_otherwise_is_refused(digits: Dataset, linear_network: nn.Module, other: Callable[[Tensor], Tensor]) -> None:
    """NaN would pass for a success at once, and end every search where it began."""
    target = targets.of_module(TwoFaced(linear_network, other), "model")
    with pytest.raises(UserError, match=r"^model answers images that take a gradient otherwise than the same images without[^\n]*$"):
        measure(target, digits.first(3), LINF, Attack("refusing", 1, {}, refusing))


class Refusing(Ensemble):
    """A defense that tells its structure and refuses images that take a gradient."""

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        if x.requires_grad:
            raise ValueError("for inference\nonly")
        return super().predictors(x, draw)


def test_a_defense_that_fails_on_images_that_take_a_gradient_is_refused(digits: Dataset, linear_network: nn.Module) -> None:
    defense = Refusing([linear_network], mean_of_logits)
    with pytest.raises(UserError, match=r"^model fails on images that take a gradient: ValueError: for inference; it may detach[^\n]*$"):
        measure(targets.of_module(defense, "model"), digits.first(3), LINF, Attack("refusing", 1, {}, refusing))


def test_the_command_ends_with_2_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODELS)
    arguments = ["evaluate", "models.py:Mixing", "--attack", "fgsm", "--n", "20", "--device", "cpu", "--cache-dir", "cache"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("robench: error: models.py:Mixing answers an image by the others in its batch")
