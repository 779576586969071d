"""Recordings of a defense's calls: what they replay is the usual call, and where it is not, nobody is told that it is.

The recorder is replaced by one that keeps a call as it is; on a GPU tests/test_cuda.py runs the real one.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench import noise, replay
from robench.aggregate import mean_of_logits
from robench.attacks.objective import evaluate_point
from robench.cost import Cost, counted
from robench.defense import Defense, Ensemble, Plain
from robench.losses import cross_entropy
from robench.noise import Draw

Y = torch.tensor([0, 1, 2, 3])
X = noise.uniform(Draw(0, Y), "images", (3, 2, 2))
CALLS = replay.WORTHWHILE + 5


class Linear(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        with noise.isolated_generator(seed):
            self.layer = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.flatten(1))
        return logits


class Noisy(Ensemble):
    random = True

    def __init__(self) -> None:
        super().__init__([Linear(0)], mean_of_logits)
        self.random = True

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        assert draw is not None
        return super().predictors(x) + noise.normal(draw, "noise", (1, 5))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record on the CPU, and return what is recorded."""
    recorded = list[Any]()

    def keep(call: Callable[..., Tensor], given: tuple[Tensor, ...], allow_unused_input: bool) -> Callable[..., Tensor]:
        recorded.append(given)
        assert allow_unused_input
        call(*given)

        def replayed(*given: Tensor) -> Tensor:
            with pytest.MonkeyPatch.context() as within:
                # A graph runs no hook, and so counts nothing.
                within.setattr(nn.Module, "__call__", lambda module, *inputs: module.forward(*inputs))
                return call(*given)

        return replayed

    monkeypatch.setattr(replay, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", keep)
    return recorded


def attack(defense: Defense, calls: int = CALLS, x: Tensor = X, *, gradient: bool = True, recorded: bool = True) -> tuple[Cost, list[Any]]:
    points = []
    with counted(defense) as cost:
        if recorded:
            with replay.recording(cost):
                points = [point(defense, i, x, gradient) for i in range(calls)]
        else:
            points = [point(defense, i, x, gradient) for i in range(calls)]
    return cost, points


def point(defense: Defense, number: int, x: Tensor, gradient: bool) -> Any:
    y = Y[: len(x)]
    return evaluate_point(
        defense, x, y, lambda logits: cross_entropy(logits, y), examples=y, seed=3, numbers=range(number, number + 1), gradient=gradient
    )


@pytest.mark.parametrize("gradient", [True, False])
def test_replays_are_the_usual_calls_and_cost_the_same(recorder: list[Any], gradient: bool) -> None:
    defense = Ensemble([Linear(0), Linear(1)], mean_of_logits)
    cost, points = attack(defense, gradient=gradient)
    assert len(recorder) == 1
    usual_cost, usual = attack(defense, gradient=gradient, recorded=False)
    assert (cost.forwards, cost.backwards) == (usual_cost.forwards, usual_cost.backwards)
    assert all(
        torch.equal(one.loss, other.loss) and torch.equal(one.gradient, other.gradient) for one, other in zip(points, usual, strict=True)
    )


def test_another_shape_is_another_recording_and_few_are_kept(recorder: list[Any]) -> None:
    defense = Ensemble([Linear(0)], mean_of_logits)
    with counted(defense) as cost, replay.recording(cost):
        for size in (4, 3, 2, 4):
            for number in range(CALLS):
                point(defense, number, X[:size], True)
    assert [len(given[0]) for given in recorder] == [4, 3, 2, 4], "the first had to go for the third"


def test_few_calls_are_not_recorded(recorder: list[Any]) -> None:
    attack(Ensemble([Linear(0)], mean_of_logits), replay.WORTHWHILE - 1)
    assert not recorder


@pytest.mark.parametrize(
    "defense", [Noisy(), Plain(nn.Sequential(nn.Dropout(), Linear(0)), random=True)], ids=["on the host's word", "generators"]
)
def test_what_draws_otherwise_when_recorded_is_not_replayed(recorder: list[Any], defense: Defense) -> None:
    # On the CPU noise takes the number from the host, as a defense might that knows nothing of recordings.
    _, points = attack(defense)
    _, usual = attack(defense, recorded=False)
    assert all(torch.equal(one.loss, other.loss) for one, other in zip(points, usual, strict=True))


def test_what_cannot_be_recorded_is_called_as_usual_and_not_tried_again(recorder: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tried = list[int]()

    def fail(*_given: Any, **_named: Any) -> None:
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    cost, _ = attack(Ensemble([Linear(0)], mean_of_logits))
    assert (len(tried), cost.forwards, cost.backwards) == (1, 4 * CALLS, 4 * CALLS)


def test_a_defense_that_has_no_gradient_is_not_recorded(recorder: list[Any]) -> None:
    class Vote(Ensemble):
        def aggregate(self, logits: Tensor) -> Tensor:
            return logits.mean(1).detach()

    cost, _ = attack(Vote([Linear(0)], mean_of_logits))
    assert not recorder
    assert (cost.forwards, cost.backwards) == (4 * CALLS, 0), "what was tried does not count"


def test_a_recording_that_turns_false_voids_the_attack(recorder: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    network = Linear(0)

    def keep_weights(_call: object, _given: object, allow_unused_input: bool) -> Callable[..., Tensor]:
        weight, bias = network.layer.weight.clone(), network.layer.bias
        return lambda x: x.flatten(1) @ weight.T + bias

    def attack_what_changes() -> None:
        with replay.recording(Cost()):
            for number in range(CALLS):
                point(defense, number, X, True)
            with torch.no_grad():
                network.layer.weight *= 2

    defense = Ensemble([network], mean_of_logits)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", keep_weights)
    with pytest.raises(RuntimeError, match="void"):
        attack_what_changes()
