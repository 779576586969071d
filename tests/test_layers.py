"""Where the gradient is lost inside a network, and that the way past it is the network's own but for what loses it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.decoy_defenses import Scrambled
from robench import attacks, zoo
from robench.aggregate import mean_of_logits
from robench.attacks.answers import answers
from robench.attacks.bare import ALIKE, ways_past
from robench.attacks.layers import Detour, LedPast, Place, detours, forward
from robench.defense import Defense, Ensemble
from robench.noise import Draw, isolated_generator, normal, uniform
from robench.threat import ThreatModel
from robench.zoo import Setting

CLASSES, SHAPE, COUNT, FEATURES = 4, (1, 5, 5), 16, 30
X = 0.1 + 0.8 * uniform(Draw(0, torch.arange(COUNT)), "images", SHAPE)


class Step(nn.Module):
    """A step as a layer."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x)


class TwoLayers(nn.Module):
    """Linear layers with a step between them, which is a layer too or not; an open step makes a linear network of them."""

    def __init__(self, step: Callable[[Tensor], Tensor], layer: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(25, FEATURES), nn.Linear(FEATURES, CLASSES)
        with torch.no_grad():
            for number, one in enumerate((self.first, self.last)):
                one.weight.copy_(normal(Draw(1, torch.arange(1), number), "weight", tuple(one.weight.shape))[0] / 5)
                one.bias.zero_()
        self.step = Step(step) if layer else step

    def weight(self) -> Tensor:
        return self.last.weight @ self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.step(self.first((x - 0.5).flatten(1))))
        return logits


def tabulated(x: Tensor) -> Tensor:
    """Values looked up in a table."""
    levels = torch.arange(-500, 501) / 100
    return levels[(100 * x + 500.5).long().clamp(0, 1000)]


def reversed_by_a_hook(x: Tensor) -> Tensor:
    """The identity, whose gradient is turned round by a hook on the tensor."""
    same = x * 1
    if same.requires_grad:
        same.register_hook(torch.neg)
    return same


def in_place(x: Tensor) -> Tensor:
    """Values rounded where they stand, which leaves them no gradient."""
    return x.mul_(100).round_().div_(100)


LOSING: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "a table, in a layer": (tabulated, True),
    "a table, between layers": (tabulated, False),
    "a wrong gradient, in a layer": (Scrambled().forward, True),
    "a wrong gradient, between layers": (Scrambled().forward, False),
    "a hook, in a layer": (reversed_by_a_hook, True),
    "rounding in place, in a layer": (in_place, True),
    "a detached tensor, between layers": (lambda x: x.detach(), False),
    "a ripple, in a layer": (lambda x: x + 1e-3 * torch.sin(1e5 * x), True),
}
HONEST: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "nothing": (lambda x: x, True),
    "a ReLU": (functional.relu, True),
    "a ReLU between layers": (functional.relu, False),
    "a ReLU in place": (lambda x: x.relu_(), True),
    "a sigmoid": (torch.sigmoid, True),
    "a constant": (torch.zeros_like, True),
    "the largest ten": (lambda x: torch.where(x >= x.topk(10, dim=1).values[:, -1:], x, 0), True),
    "half precision": (lambda x: x.half().float(), True),
    "an autograd function that is right": (lambda x: RightRelu.apply(x), True),
    "an autograd function that is right, between layers": (lambda x: RightRelu.apply(x), False),
    "a constant between layers": (torch.zeros_like, False),
    "noise of its own": (lambda x: x + torch.rand(()) / 100, True),
}


class SmallToken(nn.Module):
    """Layer normalisation of tokens one of which is small beside the others, as a class token is: it is steep about that one."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        with isolated_generator(0):
            self.first, self.norm, self.last = nn.Linear(25, 17 * 64), nn.LayerNorm(64), nn.Linear(17 * 64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = 10 * self.first((x - 0.5).flatten(1)).reshape(len(x), 17, 64)
        tokens = torch.cat([self.share * tokens[:, :1], tokens[:, 1:]], dim=1)
        logits: Tensor = self.last(self.norm(tokens).flatten(1))
        return logits


class RightRelu(torch.autograd.Function):
    """A ReLU by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (ctx.saved_tensors[0] > 0)


def made(kind: tuple[Callable[[Tensor], Tensor], bool]) -> tuple[TwoLayers, Defense]:
    network = TwoLayers(*kind)
    return network, Ensemble([network], mean_of_logits).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", LOSING)
def test_the_gradient_led_past_what_loses_it_is_the_linear_networks(kind: str) -> None:
    network, defense = made(LOSING[kind])
    found = ways_past(defense, X).networks
    assert isinstance(found, LedPast)
    assert torch.equal(found(X), defense(X))
    point = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(found(point)[:, 1].sum(), point)
    torch.testing.assert_close(gradient.flatten(1), network.weight()[1].expand(COUNT, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.1, 0.03, 0.01])
def test_normalising_a_small_token_loses_no_gradient(share: float) -> None:
    assert ways_past(Ensemble([SmallToken(share)], mean_of_logits).eval().requires_grad_(False), X).networks is None


@pytest.mark.parametrize("kind", HONEST)
def test_an_honest_step_is_left_as_it_is(kind: str) -> None:
    assert ways_past(made(HONEST[kind])[1], X).networks is None


@pytest.mark.parametrize("kind", LOSING)
def test_looking_leaves_nothing_behind(kind: str) -> None:
    (network, defense), state = made(LOSING[kind]), torch.get_rng_state()
    before = defense(X)
    found = ways_past(defense, X).networks
    assert found is not None
    found(X)
    assert torch.equal(defense(X), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in defense.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["fast,queries=1", "adaptive,steps=40,queries=1"])
@pytest.mark.parametrize("kind", LOSING)
def test_what_loses_a_gradient_inside_a_network_adds_nothing(kind: str, name: str) -> None:
    """A linear network's distance to each class is known: nothing clearly within the budget may stand."""
    network, defense = made(LOSING[kind])
    threat, y = ThreatModel.parse("Linf:0.1"), defense(X).argmax(1)
    gap = defense(X).gather(1, y[:, None]) - defense(X)
    slope = (network.weight()[:, None] - network.weight()[None]).abs().sum(2)[y]
    within = (gap / slope.clamp(min=1e-9)).scatter(1, y[:, None], torch.inf).amin(1) < 0.08
    assert within.sum() >= 5
    found = attacks.parse(name).run(defense, X, y, threat, examples=torch.arange(COUNT), seed=0)
    assert threat.violation(found.x_adv, X) is None
    assert not (within & (defense(found.x_adv).argmax(1) == y)).any()


def test_of_layers_within_each_other_only_the_innermost_is_passed_over() -> None:
    inner = Step(tabulated)
    outer = nn.Sequential(nn.Sequential(nn.ReLU(), inner), nn.ReLU())
    network = nn.Sequential(nn.Flatten(), nn.Linear(25, FEATURES), outer, nn.Linear(FEATURES, CLASSES))
    defense = Ensemble([network], mean_of_logits).eval()
    _, seen = forward(defense, X[:2].clone().requires_grad_(), None)
    assert detours(seen) == [Detour(Place(inner, False), Place(inner, True))]


def test_recording_changes_no_gradient() -> None:
    _, defense = made(HONEST["a ReLU in place"])
    point = X.clone().requires_grad_()
    (usual,) = torch.autograd.grad(defense(point)[:, 1].sum(), point)
    (again,) = torch.autograd.grad(forward(defense, point, None)[0][:, 0, 1].sum(), point)
    assert torch.equal(usual, again)


@pytest.mark.parametrize("name", sorted(zoo.entries()))
def test_no_defense_of_the_zoo_loses_its_gradient_inside_or_answers_twice(name: str) -> None:
    with isolated_generator(0):
        defense = zoo.parse(name).build(Setting("digits", 10, (3, 16, 16), "smoke", 0)).defense.eval()
    x, draw = uniform(Draw(0, torch.arange(2)), "images", (3, 16, 16)), Draw(0, torch.arange(2)) if defense.random else None
    logits, seen = forward(defense, x.requires_grad_(), draw)
    assert len(seen.sights) > 10
    assert not detours(seen)
    assert not answers(seen, logits, ALIKE)
