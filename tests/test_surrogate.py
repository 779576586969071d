"""Surrogates that a defense declares: the output stays the step's, the gradient is theirs, and attacks find them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.decoy_defenses import DECOYS
from robench import attacks, data
from robench.aggregate import majority_vote, mean_of_logits
from robench.attacks.adaptive import compositions
from robench.attacks.bare import Ways
from robench.attacks.views import Declared
from robench.data import as_float
from robench.defense import Defense, Ensemble, Plain, as_defense
from robench.errors import UserError
from robench.evaluation import measure
from robench.noise import Draw, normal
from robench.surrogate import Substitute, active, declares
from robench.targets import of_module
from robench.threat import ThreatModel

LINF = ThreatModel.parse("Linf:32/255")


def rounded(x: Tensor) -> Tensor:
    return (8 * x).long().to(x.dtype) / 8


def looked_up(x: Tensor) -> Tensor:
    return (torch.arange(9, dtype=x.dtype) / 8)[(8 * x).long()]


def gradient(module: nn.Module, x: Tensor) -> Tensor:
    point = x.clone().requires_grad_()
    out = module(point)
    if not out.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(out.sum(), point)[0]


def test_the_output_is_the_steps_and_the_gradient_the_surrogates() -> None:
    step, x = Substitute(rounded, lambda x: x**2), torch.tensor([[0.1, 0.6, 0.9]])
    assert torch.equal(gradient(step, x), torch.zeros_like(x)), "no attack has asked"
    with active():
        assert torch.equal(step(x.clone().requires_grad_()), rounded(x))
        torch.testing.assert_close(gradient(step, x), 2 * x)
        with torch.no_grad():
            assert torch.equal(step(x), rounded(x))
    assert not step(x.clone().requires_grad_()).requires_grad, "and no longer does"


def test_a_surrogate_of_another_shape_is_one_clear_line() -> None:
    with active(), pytest.raises(UserError, match=r"^a surrogate returns shape \(1, 1\) for a step that returns \(1, 3\)$"):
        Substitute(rounded, lambda x: x[:, :1])(torch.rand(1, 3).requires_grad_())


def test_a_defense_declares_through_its_submodules(networks: list[nn.Module]) -> None:
    assert not declares(as_defense(networks[0]))
    assert declares(as_defense(nn.Sequential(Substitute(rounded, lambda x: x), networks[0])))
    vote = Ensemble(networks, Substitute(majority_vote, mean_of_logits))
    assert declares(vote)
    x = as_float(data.load("digits", "test").first(4).images)
    assert torch.equal(Declared(vote)(x), vote(x))
    torch.testing.assert_close(gradient(Declared(vote), x), gradient(Ensemble(networks, mean_of_logits), x))


def undeclared(networks: list[nn.Module]) -> Defense:
    """The decoy without its word."""
    defense = DECOYS["palette"].build(networks).eval()
    step = defense.before
    assert isinstance(step, Substitute)
    hidden = step.step
    del defense.before
    defense.before = hidden
    return defense


class OfUnseenNetworks(nn.Module):
    """A decoy in one module that shows nothing but the step before its networks: else they would be attacked without that step."""

    def __init__(self, defense: Defense) -> None:
        super().__init__()
        self.before, self.unseen = defense.before, [defense]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.unseen[0](x)
        return logits


@pytest.mark.parametrize("name", ["fast,queries=50", "adaptive,steps=10,queries=50"])
def test_an_attack_is_stronger_with_the_surrogate_that_is_declared(networks: list[nn.Module], name: str) -> None:
    split = data.load("digits", "test").first(40)
    silent, open_ = (
        measure(of_module(Plain(OfUnseenNetworks(defense))), split, LINF, attacks.parse(name))
        for defense in (undeclared(networks), DECOYS["palette"].build(networks))
    )
    assert open_.outcomes.clean == silent.outcomes.clean
    assert sum(open_.outcomes.robust) < sum(silent.outcomes.robust) - 4
    assert "declared surrogate" not in silent.stages
    # `adaptive` counts what falls to the `fast` that it begins with as fast's.
    assert open_.stages.get("fast", 0) + open_.stages["declared surrogate"] > 4


@pytest.mark.parametrize("name", ["fast,queries=1", "adaptive,steps=10,queries=1"])
def test_a_useless_surrogate_takes_nothing_from_an_attack(networks: list[nn.Module], name: str) -> None:
    """The word of a defense is used beside what is found without it, not in its place."""

    def quantised(x: Tensor, _draw: Draw | None) -> Tensor:
        return (7 * x).round() / 7

    split = data.load("digits", "test").first(20)
    misled, plain = DECOYS["quantised_input"].build(networks), DECOYS["quantised_input"].build(networks)
    del misled.before
    misled.before = Substitute(quantised, lambda x, _draw: 1 - x)
    lost = [measure(of_module(defense), split, LINF, attacks.parse(name)) for defense in (misled, plain)]
    assert sum(lost[0].outcomes.robust) <= sum(lost[1].outcomes.robust)


class Stepped(nn.Module):
    """A network behind a step that takes the noise too."""

    def __init__(self, network: nn.Module, step: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network = network
        self.step = step

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        logits: Tensor = self.network(self.step(x, noise))
        return logits


class Mirror(nn.Module):
    """The mirror image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)


class Noisy(Defense):
    """A random network on looked-up pixels of the mirror image, so that the gradient of what it sees is no gradient of the image."""

    random = True

    def __init__(self, network: nn.Module, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
        super().__init__()
        self.stepped = Stepped(nn.Sequential(Mirror(), network), wrap(lambda x, noise: looked_up((x + noise).clamp(0, 1)).flip(-1)))

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        assert draw is not None
        logits: Tensor = self.stepped(x, 0.05 * normal(draw, "noise", tuple(x.shape[1:])))
        return logits[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        return [self.stepped]


@pytest.mark.parametrize("name", ["fast,steps=5", "adaptive,steps=5,draws=2,queries=20,targets=1"])
def test_a_random_defenses_surrogate_is_used_too(networks: list[nn.Module], name: str) -> None:
    split = data.load("digits", "test").first(20)
    x, examples, left = as_float(split.images), torch.arange(20), []
    for wrap in (lambda step: step, lambda step: Substitute(step, lambda x, noise: (x + noise).flip(-1))):
        defense = Noisy(networks[0], wrap).eval()
        x_adv = attacks.parse(name)(defense, x, split.labels, LINF, examples=examples, seed=0)
        left.append(int((defense(x_adv, Draw(9, examples)).argmax(1) == split.labels).sum()))
    assert left[1] < left[0] - 5


def test_a_defense_that_declares_nothing_is_attacked_as_before(networks: list[nn.Module]) -> None:
    names = [c.name for c in compositions(as_defense(networks[0]), 1, 1, LINF, 0.1, 0, Ways(None, ()))]
    assert not [name for name in names if "declared" in name]
    names = [
        c.name for c in compositions(Ensemble(networks, Substitute(majority_vote, mean_of_logits)), 3, 1, LINF, 0.1, 0, Ways(None, ()))
    ]
    assert [name for name in names if "declared" in name] == ["declared surrogate", "declared surrogate, mean of logits"]
