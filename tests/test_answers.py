"""Networks wrapped without a word: the answers that a layer gives before the defense's own are found and attacked."""

import pytest
import torch
from torch import Tensor, nn

from robench import attacks
from robench.aggregate import mean_of_logits
from robench.attacks.bare import ways_past
from robench.cost import Cost, counted
from robench.defense import Defense, Ensemble, Plain
from robench.noise import Draw, normal, uniform
from robench.threat import ThreatModel

CLASSES, SHAPE, COUNT = 4, (1, 5, 5), 16
X = 0.1 + 0.8 * uniform(Draw(0, torch.arange(COUNT)), "images", SHAPE)


class Linear(nn.Module):
    """A linear network, of which the worst image within a Linf budget is known."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(Draw(1, torch.arange(1), number), "weight", (25, CLASSES))[0] / 5, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ self.weight


class Wrapped(nn.Module):
    """A network in a module that makes something else of its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.other = Linear(), Linear(1)


class SteepSoftmax(Wrapped):
    """The network's softmax without a slope, beside a small term of another network's."""

    def forward(self, x: Tensor) -> Tensor:
        return (200 * self.network(x)).softmax(1) + 1e-4 * self.other(x)


class AnotherGradient(Wrapped):
    """The network's answer, with the gradient of another's."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            answer = self.network(x)
        near = self.other(x)
        return answer + near - near.detach()


class SurerAtTheBorder(Wrapped):
    """The network's class, of which the module is the surer the less the network is."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        first = torch.zeros_like(logits).scatter(1, logits.argmax(1, keepdim=True), 1.0)
        return 4 * first - logits.log_softmax(1) / 10


class BesideANothing(Wrapped):
    """The network's answer without its gradient, beside another's that adds nothing and has one."""

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.network(x).detach() + 0 * self.other(x)
        return answer


class WhereItIsSure(Wrapped):
    """The network's answer, without its gradient where two classes are near."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        first, second = logits.topk(2, 1).values.unbind(1)
        return torch.where((first - second > 0.02)[:, None], logits, logits.detach() + 0 * self.other(x))


HIDING = (SteepSoftmax, AnotherGradient, SurerAtTheBorder)
WRAPPED = (*HIDING, BesideANothing, WhereItIsSure)


class Scaled(Wrapped):
    """The network's answer in other units, and a layer that nobody asks."""

    def forward(self, x: Tensor) -> Tensor:
        self.other(x)
        return 3 * self.network(x) + 1


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_the_networks_own_answer_is_among_those_found(wrapped: type[Wrapped]) -> None:
    module = wrapped()
    found = {view.place.layer: view for view in ways_past(Plain(module).eval(), X).answers}  # type: ignore[attr-defined]
    view = found[module.network]
    assert torch.equal(view(X), module.network(X))
    point = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(view(point)[:, 1].sum(), point)
    torch.testing.assert_close(gradient.flatten(1), module.network.weight[:, 1].expand(COUNT, -1))


def test_a_defense_within_a_plain_module_is_told_by_none() -> None:
    module = SteepSoftmax()
    inner = Ensemble([Linear(0), Linear(2)], mean_of_logits)
    module.network = inner  # type: ignore[assignment]
    found = [view.place.layer for view in ways_past(Plain(module).eval(), X).answers]  # type: ignore[attr-defined]
    assert found == [*inner.members(), module.other]


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_pass_back_from_within_a_member_costs_one_of_the_member(wrapped: type[Wrapped]) -> None:
    defense = Plain(wrapped()).eval()
    for view in (defense, *ways_past(defense, X).answers):
        point = X.clone().requires_grad_()
        with counted(defense) as outer, counted(defense) as inner:
            torch.autograd.grad(view(point)[:, 1].sum(), point)
        assert outer == inner == Cost(COUNT, COUNT)


@pytest.mark.parametrize("defense", [Plain(Linear()), Plain(Scaled()), Ensemble([Linear(0), Linear(1)], mean_of_logits)])
def test_nothing_is_found_where_the_answer_is_the_defenses_own_or_told_or_unused(defense: Defense) -> None:
    assert ways_past(defense.eval(), X).answers == ()


@pytest.mark.parametrize("name", ["fast,queries=1", "adaptive,steps=40,queries=1"])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_what_is_made_of_a_linear_networks_answer_adds_nothing(wrapped: type[Wrapped], name: str) -> None:
    """Its distance to each class is known: nothing clearly within the budget may stand."""
    defense, threat = Plain(wrapped()).eval(), ThreatModel.parse("Linf:0.1")
    logits, y = Linear()(X), defense(X).argmax(1)
    assert torch.equal(logits.argmax(1), y)
    slope = (Linear().weight[:, :, None] - Linear().weight[:, None]).abs().sum(0)[y]
    gap = (logits.gather(1, y[:, None]) - logits) / slope.clamp(min=1e-9)
    within = gap.scatter(1, y[:, None], torch.inf).amin(1) < 0.08
    assert within.sum() >= 5
    found = attacks.parse(name).run(defense, X, y, threat, examples=torch.arange(COUNT), seed=0)
    assert threat.violation(found.x_adv, X) is None
    assert not (within & (defense(found.x_adv).argmax(1) == y)).any()
    if wrapped in HIDING:
        assert found.stages["fast" if name.startswith("adaptive") else "answer within"].any()


class Sometimes(Wrapped):
    """A flat softmax beside a small term, of a network that is asked of pairs of images alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.other(x) if len(x) != 2 else (200 * self.network(x)).softmax(1) + 1e-4 * self.other(x)


def test_a_layer_that_does_not_answer_for_every_image_ends_no_attack() -> None:
    defense = Plain(Sometimes()).eval()
    views = ways_past(defense, X).answers
    assert views
    assert all(view.predictors(X).shape == (COUNT, 1, CLASSES) for view in views)
    y = defense(X).argmax(1)
    attacks.parse("fast,queries=1").run(defense, X, y, ThreatModel.parse("Linf:0.1"), examples=torch.arange(COUNT), seed=0)
