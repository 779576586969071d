"""The parts of Square and FAB that have an answer of their own: windows, patterns, projections, and what a run costs."""

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from robench import attacks
from robench.attacks.fab import to_hyperplane
from robench.attacks.square import pattern, side
from robench.cost import counted
from robench.defense import Defense, as_defense
from robench.noise import Draw, normal, uniform
from robench.threat import NORMS, Norm, ThreatModel


class Network(nn.Module):
    """A random network of two layers."""

    def __init__(self) -> None:
        super().__init__()
        draw = Draw(3, torch.tensor([0]))
        self.first, self.second = normal(draw, "first", (48, 16))[0] / 3, normal(draw, "second", (16, 5))[0]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh((x - 0.5).flatten(1) @ self.first) @ self.second


def network_and_images(count: int) -> tuple[Defense, Tensor, Tensor, Tensor]:
    """Return a defense, images, its predictions, of which the third is made wrong, and identities."""
    defense, examples = as_defense(Network()).eval(), torch.arange(count)
    x = uniform(Draw(1, examples), "images", (3, 4, 4))
    with torch.no_grad():
        y = defense(x).argmax(1)
    y[2] = (y[2] + 1) % 5
    return defense, x, y, examples


def test_the_window_follows_the_papers_schedule() -> None:
    at = (0, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 6001, 9999)
    assert [side("Linf", query, 0.8, 32, 32) for query in at] == [29, 29, 20, 20, 14, 10, 7, 5, 4, 3, 2, 1]
    assert [side("L2", query, 0.8, 32, 32) for query in at] == [29, 29, 21, 21, 15, 11, 7, 5, 5, 3, 3, 3]
    assert [side("L1", 0, 0.8, height, width) for height, width in ((1, 1), (2, 9), (5, 5))] == [1, 2, 5]


def test_the_pattern_is_equation_2() -> None:
    """Two halves; a value adds 1 / k^2 for each k from its distance to the middle, counted from 1, to the farthest."""
    one, quarter, ninth = 1.0, 1 / 4, 1 / 9
    upper = torch.tensor([[ninth, quarter + ninth, quarter + ninth, quarter + ninth, ninth]] * 2).double()
    upper[1, 2] = one + quarter + ninth
    lower = torch.tensor([[ninth, quarter + ninth, quarter + ninth, quarter + ninth, ninth]] * 3).double()
    lower[1, 2] = one + quarter + ninth
    expected = torch.cat([upper / upper.norm(), -lower / lower.norm()]) / 2**0.5
    torch.testing.assert_close(pattern(5, "L2"), expected)
    for size in range(1, 9):
        assert float(pattern(size, "L2").norm()) == pytest.approx(1)
        assert float(pattern(size, "L1").abs().sum()) == pytest.approx(1)


@pytest.mark.parametrize("queries", [1, 70])
def test_a_linf_square_sits_on_the_ball(queries: int) -> None:
    defense, x, y, examples = network_and_images(6)
    x_adv = attacks.parse(f"square,queries={queries}")(defense, x, y, ThreatModel.parse("Linf:0.02"), examples=examples, seed=0)
    attacked = torch.arange(6) != 2
    edges = torch.stack([(x - 0.02).clamp(0, 1), (x + 0.02).clamp(0, 1)])
    assert bool((edges == x_adv)[:, attacked].any(0).all())
    assert torch.equal(x_adv[2], x[2])


@pytest.mark.parametrize(("name", "text"), [("square,queries=150", "Linf:0.03"), ("square,queries=150", "L2:0.3"), ("fab-t", "Linf:0.02")])
def test_the_fooled_drop_out_and_the_survivors_are_packed(name: str, text: str) -> None:
    """The passes are those of each example alone, and none is spent on what is misclassified as it is."""
    defense, x, y, examples = network_and_images(8)
    attack, threat = attacks.parse(name), ThreatModel.parse(text)
    with counted(defense) as whole:
        x_adv = attack(defense, x, y, threat, examples=examples, seed=0)
    with torch.no_grad():
        fooled = defense(x_adv).argmax(1) != y
    costs = []
    for i in range(8):
        with counted(defense) as cost:
            attack(defense, x[i : i + 1], y[i : i + 1], threat, examples=examples[i : i + 1], seed=0)
        costs.append(cost)
    full = (1 + 151 + 1, 0) if name.startswith("square") else (1 + 4 * (101 + 1), 4 * 100)
    assert sum(c.forwards for c in costs) == whole.forwards
    assert sum(c.backwards for c in costs) == whole.backwards
    assert (costs[2].forwards, costs[2].backwards) == (1, 0)
    assert [(c.forwards, c.backwards) == full for c in costs] == (~fooled).tolist()
    assert 1 < int(fooled.sum()) < 8


def test_square_takes_two_passes_a_draw_of_a_random_defense() -> None:
    class Noisy(Defense):
        random = True

        def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
            assert draw is not None
            return (x + 0.1 * normal(draw, "noise", tuple(x.shape[1:]))).flatten(2)

        def aggregate(self, logits: Tensor) -> Tensor:
            return logits.mean(1)

        def members(self) -> list[nn.Module]:
            return [self.member]

        def __init__(self) -> None:
            super().__init__()
            self.member = nn.Identity()

        def forward(self, x: Tensor, draw: Draw | None = None) -> Tensor:
            return self.aggregate(self.predictors(self.member(x), draw))

    defense, x = Noisy().eval(), torch.rand(4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    with counted(defense) as cost:
        attacks.parse("square,queries=30,draws=3")(
            defense, x, torch.tensor([0, 1, 2, 3]), ThreatModel.parse("Linf:0.1"), examples=torch.arange(4), seed=0
        )
    assert cost.forwards == 4 * 3 * (1 + 1 + 2 * 30 + 1)


def exact_move(x: Tensor, normal: Tensor, needed: float, norm: Norm) -> Tensor:
    """Solve by scipy for L1 and Linf, and for L2 by bisection on the multiplier of the hyperplane, all in float64."""
    x, normal, count = x.double(), normal.double(), len(x)
    if norm == "L2":
        low, high = -1e6, 1e6
        for _ in range(200):
            middle = (low + high) / 2
            reached = float(((x + middle * normal).clamp(0, 1) - x) @ normal)
            low, high = (middle, high) if reached < needed else (low, middle)
        return (x + low * normal).clamp(0, 1) - x
    if norm == "Linf":
        # The last variable bounds every move.
        bounded = torch.cat([torch.cat([torch.eye(count), -torch.eye(count)]), -torch.ones(2 * count, 1)], dim=1).numpy()
        solved = linprog(
            [0.0] * count + [1.0], A_ub=bounded, b_ub=[0.0] * (2 * count), A_eq=[[*normal.tolist(), 0.0]], b_eq=[needed],
            bounds=[*((-float(v), 1 - float(v)) for v in x), (0, None)],
        )  # fmt: skip
        return torch.tensor(solved.x[:-1])
    both = [*normal.tolist(), *(-normal).tolist()]
    bounds = [*((0, 1 - float(v)) for v in x), *((0, float(v)) for v in x)]
    solved = linprog([1.0] * (2 * count), A_eq=[both], b_eq=[needed], bounds=bounds)
    return torch.tensor(solved.x[:count] - solved.x[count:])


@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_is_the_nearest_point_of_the_hyperplane_in_the_box(norm: Norm) -> None:
    draw = Draw(5, torch.arange(12))
    x = (1.4 * uniform(draw, "points", (20,)) - 0.2).clamp(0, 1)
    weights = normal(draw, "normals", (20,)) * 10 ** (12 * uniform(draw, "scales", (1,)) - 10)
    weights[:, 3] = 0
    # From a small share of what the box allows to nearly all of it, upwards and downwards.
    most = torch.where(weights > 0, 1 - x, -x) * weights
    least = torch.where(weights > 0, -x, 1 - x) * weights
    share = torch.linspace(0.02, 0.99, 12)
    needed = torch.where(torch.arange(12) % 2 == 0, share * most.sum(1), share * least.sum(1))
    moves = to_hyperplane(x, weights, needed, norm)
    assert bool(((x + moves >= -1e-6) & (x + moves <= 1 + 1e-6)).all())
    torch.testing.assert_close((moves * weights).sum(1) / needed, torch.ones(12), rtol=0, atol=1e-4)
    threat = ThreatModel.parse(f"{norm}:1")
    for i in range(12):
        exact = exact_move(x[i], weights[i] / weights[i].abs().max(), float(needed[i] / weights[i].abs().max()), norm)
        assert float(threat.size(moves[i : i + 1])[0]) == pytest.approx(float(threat.size(exact[None])[0]), rel=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_an_unreachable_hyperplane_is_approached_to_the_corner_and_no_normal_moves_nothing(norm: Norm) -> None:
    x, weights = torch.tensor([[0.2, 0.7, 0.5], [0.1, 0.2, 0.3]]), torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    moves = to_hyperplane(x, weights, torch.tensor([100.0, 1.0]), norm)
    torch.testing.assert_close(moves, torch.tensor([[0.8, -0.7, 0.0], [0.0, 0.0, 0.0]]))
