"""The gradient of networks that a defense hides: where there is one to take, and that attacks by it break what hides every other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robench import attacks
from robench.aggregate import crossmax, majority_vote, mean_of_logits
from robench.attacks.bare import ways_past
from robench.defense import Defense, Ensemble, Plain
from robench.noise import Draw, normal, uniform
from robench.threat import ThreatModel

CLASSES, SHAPE, COUNT = 4, (1, 5, 5), 16
X = 0.1 + 0.8 * uniform(Draw(0, torch.arange(COUNT)), "images", SHAPE)


class Linear(nn.Module):
    """A linear network, of which the worst image within a Linf budget is known."""

    def __init__(self, number: int = 0, features: int = 25) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(Draw(1, torch.arange(1), number), "weight", (features, CLASSES))[0] / 5)

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ self.weight


class Behind(Defense):
    """A network behind a step on the image that gives no gradient which helps."""

    def __init__(self, network: nn.Module, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.step = network, step

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        return self.network(self.step(x))[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        return [self.network]


def backwards_elsewhere(x: Tensor) -> Tensor:
    """The image itself, with the gradient of the mirrored image's negative."""
    mirrored = -x.flip(-1)
    return mirrored + (x - mirrored).detach()


def on_a_copy(x: Tensor) -> Tensor:
    """Pixels rounded by code that is no tensor's."""
    return torch.from_numpy((50 * x.detach().cpu().numpy()).round() / 50)


def near_a_grid(x: Tensor) -> Tensor:
    """Pixels near one of a few levels at that level, and the others as they are."""
    level = (50 * x).round() / 50
    return torch.where((x - level).abs() < 0.008, level, x)


class Stepped(nn.Module):
    """The same in a plain module, which tells nothing."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.step = Linear(), step

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(self.step(x))
        return logits


HIDING: dict[str, Callable[[], Defense]] = {
    "no gradient": lambda: Behind(Linear(), lambda x: x.detach()),
    "a wrong gradient": lambda: Behind(Linear(), backwards_elsewhere),
    "a ripple": lambda: Behind(Linear(), lambda x: x + 0.01 * torch.sin(1e4 * x)),
    "code that is no tensor's": lambda: Behind(Linear(), on_a_copy),
    "no gradient, in half precision": lambda: Behind(Linear().half(), lambda x: x.detach().half()),
    "levels by a condition, in a plain module": lambda: Plain(Stepped(near_a_grid)),
    "a vote of hidden networks": lambda: Ensemble([Behind(Linear(k), lambda x: x.detach()) for k in range(3)], majority_vote),
}
OPEN: dict[str, Callable[[], Defense]] = {
    "one network": lambda: Plain(Linear()),
    "an image that is normalised": lambda: Behind(Linear(), lambda x: (x - 0.4) / 0.2),
    "an image that is normalised in a plain module": lambda: Plain(Stepped(lambda x: (x - 0.4) / 0.2)),
    "half precision": lambda: Behind(Linear().half(), lambda x: x.half()),
    "the mean": lambda: Ensemble([Linear(0), Linear(1)], mean_of_logits),
    "CrossMax, whose predictors show their gradient": lambda: Ensemble([Linear(k) for k in range(3)], crossmax),
    "a network of the image and its mirror image": lambda: Behind(Linear(0, 50), lambda x: torch.cat([x, x.flip(-1)], dim=1)),
    "a network called on the image and on half of it": lambda: Twice(Linear()),
}


class Twice(Behind):
    """A network's mean over two calls, one of which has more images than were given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, lambda x: x)

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        both = self.network(torch.cat([x, x / 2])).reshape(2, len(x), CLASSES)
        return both.transpose(0, 1)

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits.mean(1)


@pytest.mark.parametrize("kind", HIDING)
def test_a_hidden_gradient_is_found_and_passed_over(kind: str) -> None:
    defense = HIDING[kind]().eval()
    found = ways_past(defense, X).networks
    assert found is not None
    assert torch.equal(found(X), defense(X))
    point = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(found.predictors(point)[..., 1].float().mean(1).sum(), point)
    weights = torch.stack([network.weight[:, 1] for network in defense.modules() if isinstance(network, Linear)]).float()
    torch.testing.assert_close(gradient.flatten(1), weights.mean(0).expand(COUNT, -1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", OPEN)
def test_nothing_is_found_where_there_is_nothing_to_gain(kind: str) -> None:
    assert ways_past(OPEN[kind]().eval(), X).networks is None


def test_looking_leaves_nothing_behind() -> None:
    defense, state = HIDING["a wrong gradient"]().eval(), torch.get_rng_state()
    found = ways_past(defense, X).networks
    assert found is not None
    found(X)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in defense.modules())
    assert all(parameter.grad is None for parameter in defense.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["fast,queries=1", "adaptive,steps=40,queries=1"])
@pytest.mark.parametrize("kind", [kind for kind in HIDING if "vote" not in kind])
def test_what_hides_a_linear_networks_gradient_adds_nothing(kind: str, name: str) -> None:
    """A linear network's distance to each class is known: nothing clearly within the budget may stand, whatever rounds or ripples it."""
    defense, threat = HIDING[kind]().eval(), ThreatModel.parse("Linf:0.1")
    (network,) = [network for network in defense.modules() if isinstance(network, Linear)]
    weight, y = network.weight.float(), defense(X).argmax(1)
    gap = defense(X).gather(1, y[:, None]) - defense(X)
    slope = (weight[:, :, None] - weight[:, None]).abs().sum(0)[y]
    within = ((gap / slope.clamp(min=1e-9)).scatter(1, y[:, None], torch.inf).amin(1) < 0.08).detach()
    assert within.sum() >= 5
    found = attacks.parse(name).run(defense, X, y, threat, examples=torch.arange(COUNT), seed=0)
    assert threat.violation(found.x_adv, X) is None
    assert not (within & (defense(found.x_adv).argmax(1) == y)).any()
    # `adaptive` begins with `fast`, whose stages it does not tell apart.
    assert name.startswith("adaptive") or kind != "a wrong gradient" or found.stages["bare networks"].any()
