"""Batch norm folded into the convolution before it: the same logits and input gradients, and everything back in its place after."""

import copy

import pytest
import torch
from torch import Tensor, nn

from robench import data, targets, zoo
from robench.attacks import Attack
from robench.defense import Defense
from robench.evaluation import measure
from robench.fingerprint import state_hash
from robench.folding import foldable, folded
from robench.noise import Draw, isolated_generator
from robench.parameters import Value
from robench.recipe import Precision
from robench.threat import ThreatModel


def network(*more: nn.Module) -> nn.Sequential:
    """Return a small network in evaluation mode whose batch norm has statistics that are not the default."""
    with isolated_generator(0):
        made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *more, nn.Flatten(), nn.LazyLinear(5))
        for _ in range(3):
            made(torch.rand(8, 3, 8, 8))
    return made.eval()


def logits_and_gradient(defense: nn.Module, x: Tensor, draw: Draw | None = None) -> tuple[Tensor, Tensor]:
    point = x.clone().requires_grad_()
    logits = defense(point, draw) if isinstance(defense, Defense) else defense(point)
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), point)
    return logits.detach(), gradient


@pytest.mark.parametrize("name", sorted(zoo.entries()))
def test_every_defense_computes_the_same(name: str) -> None:
    defense = zoo.parse(name).build(zoo.Setting("digits", 10, (3, 16, 16), "smoke", 0)).defense
    with isolated_generator(0):
        x = torch.rand(4, 3, 16, 16)
        for module in defense.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    defense.eval()
    draw = Draw(0, torch.arange(4)) if defense.random else None
    usual, before = logits_and_gradient(defense, x, draw), state_hash(defense)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in defense.modules())
    with folded(defense, x, draw):
        assert sum(isinstance(module, nn.BatchNorm2d) for module in defense.modules()) < norms
        alike = logits_and_gradient(defense, x, draw)
    for own, other in zip(usual, alike, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3 * float(own.abs().max()))
    assert state_hash(defense) == before
    assert torch.equal(logits_and_gradient(defense, x, draw)[0], usual[0])


def test_everything_is_back_after_an_error() -> None:
    made = network()
    usual = made[1]

    def fail() -> None:
        with folded(made):
            assert isinstance(made[1], nn.Identity)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert made[1] is usual


def test_a_batch_norm_in_training_mode_stays() -> None:
    made = network().train()
    with folded(made):
        assert isinstance(made[1], nn.BatchNorm2d)


class Branching(nn.Module):
    """The convolution's output is used beside the batch norm's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        total: Tensor = (out + self.norm(out)).mean((2, 3))
        return total


class Twice(Branching):
    """The pair is used on two inputs; the batch norm of one is another's."""

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = (self.norm(self.conv(x)) + self.norm(x.mean(1, keepdim=True).repeat(1, 4, 1, 1)[:, :, 1:-1, 1:-1])).mean((2, 3))
        return total


class Untraceable(Branching):
    """What torch.fx cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)).mean((2, 3))
        return out if float(out.detach().sum()) > 0 else -out


@pytest.mark.parametrize("kind", [Branching, Twice, Untraceable])
def test_what_cannot_be_folded_is_left(kind: type[Branching]) -> None:
    made = kind().eval()
    assert foldable(made) == ()
    with folded(made):
        assert isinstance(made.norm, nn.BatchNorm2d)


class Tapped(Defense):
    """A defense that reads the convolution's output from outside the network."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        found = list[Tensor]()
        handle = self.network[0].register_forward_hook(lambda _m, _i, out: found.append(out))
        logits: Tensor = self.network(x)
        handle.remove()
        return torch.stack([logits, found[0].flatten(1)[:, :5]], dim=1)

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits.mean(1)

    def members(self) -> list[nn.Module]:
        return [self.network]


def test_folding_that_changes_the_logits_is_undone() -> None:
    defense, x = Tapped().eval(), torch.rand(4, 3, 8, 8)
    usual = defense(x)
    with folded(defense):
        assert not torch.allclose(defense(x), usual)
    with folded(defense, x):
        assert torch.equal(defense(x), usual)


class Viewing(nn.Module):
    """Views features of several positions as one row, which only the usual memory layout allows."""

    def __init__(self) -> None:
        super().__init__()
        with isolated_generator(0):
            self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(576, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.conv(x)).view(x.shape[0], -1))
        return logits


def test_what_needs_the_usual_memory_layout_is_left() -> None:
    made, x = Viewing().eval(), torch.rand(4, 3, 8, 8)
    with folded(made):
        assert made.conv.weight.is_contiguous(memory_format=torch.channels_last)
        with pytest.raises(RuntimeError):
            made(x)
    usual = made(x)
    with folded(made, x):
        assert isinstance(made.norm, nn.BatchNorm2d)
        assert torch.equal(made(x), usual)


@pytest.mark.parametrize(("width", "layout"), [(8, torch.contiguous_format), (16, torch.channels_last)])
def test_folded_convolutions_are_in_the_faster_layout(width: int, layout: torch.memory_format) -> None:
    made = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)).eval()
    with folded(made):
        assert made[0].weight.is_contiguous(memory_format=layout)
    assert made[0].weight.is_contiguous()


@pytest.mark.parametrize(("precision", "parameters", "norm"), [
    ("float32", {}, nn.Identity), ("bfloat16", {}, nn.Identity), ("float32", {"batch_size": 4}, nn.BatchNorm2d),
])  # fmt: skip
def test_attacks_but_the_reference_see_batch_norm_folded(precision: Precision, parameters: dict[str, Value], norm: type[nn.Module]) -> None:
    model, dataset, seen = network(), data.from_tensors(torch.rand(4, 3, 8, 8), torch.arange(4), 5), list[type[nn.Module]]()

    def looking(_defense: Defense, x: Tensor, *_: object, **__: object) -> Tensor:
        seen.append(type(model[1]))
        return x.clone()

    attack = Attack("looking", 1, parameters, looking)
    measure(targets.of_module(model), dataset, ThreatModel.parse("Linf:0.1"), attack, precision=precision)
    assert seen[0] is norm
    assert isinstance(model[1], nn.BatchNorm2d)


def test_a_copy_folds_on_its_own() -> None:
    made = network()
    other = copy.deepcopy(made)
    with folded(made):
        assert isinstance(other[1], nn.BatchNorm2d)
