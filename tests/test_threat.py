"""Threat models: exact text, projection against independent solutions, membership."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from robench.errors import UserError
from robench.threat import NORMS, TOLERANCE, ThreatModel

every_norm = pytest.mark.parametrize("norm", NORMS)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Text


@pytest.mark.parametrize(
    ("text", "norm", "budget", "written"),
    [
        ("Linf:8/255", "Linf", Fraction(8, 255), "Linf:8/255"),
        ("Linf:16/510", "Linf", Fraction(8, 255), "Linf:8/255"),
        ("Linf:51/255", "Linf", Fraction(1, 5), "Linf:51/255"),
        ("Linf:0.03", "Linf", Fraction(3, 100), "Linf:0.03"),
        ("L2:0.5", "L2", Fraction(1, 2), "L2:0.5"),
        ("L2:128/255", "L2", Fraction(128, 255), "L2:128/255"),
        ("L2:0.1", "L2", Fraction(1, 10), "L2:0.1"),
        ("L1:12", "L1", Fraction(12), "L1:12"),
        ("L1: 12 ", "L1", Fraction(12), "L1:12"),
        ("Linf:0", "Linf", Fraction(0), "Linf:0"),
        ("Linf:1", "Linf", Fraction(1), "Linf:1"),
        ("L2:1e-9", "L2", Fraction(1, 10**9), "L2:1e-09"),
        ("L2:1/3", "L2", Fraction(1, 3), "L2:1/3"),
    ],
)
def test_budgets_are_read_exactly(text: str, norm: str, budget: Fraction, written: str) -> None:
    threat = ThreatModel.parse(text)
    assert (threat.norm, threat.budget, str(threat)) == (norm, budget, written)
    assert threat.epsilon == float(budget)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "NORM:BUDGET"),
        ("Linf", "NORM:BUDGET"),
        ("8/255", "NORM:BUDGET"),
        ("L3:1", "Linf, L2, L1"),
        ("linf:8/255", "Linf, L2, L1"),
        ("Linf:", "'' is no number"),
        ("Linf:eight", "'eight' is no number"),
        ("Linf:8/0", "'8/0' is no number"),
        ("Linf:8/255/2", "is no number"),
        ("Linf:nan", "is no number"),
        ("Linf:inf", "is no number"),
        ("L2:1e400", "is no number"),
        ("Linf:1e99999999", "is no number"),
        ("L2:1e200", "the budget must be at most 100,000,000; no image is as large"),
        ("Linf:-8/255", "at least 0"),
    ],
)
def test_what_is_no_threat_model_is_refused(text: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        ThreatModel.parse(text)
    assert part in str(caught.value)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


BUDGETS = st.one_of(
    st.fractions(0, 1000),
    st.integers(0, 600).map(lambda n: Fraction(n, 255)),
    st.floats(0, 1e6, allow_nan=False).map(lambda value: Fraction(str(value))),
)


@given(st.sampled_from(NORMS), BUDGETS)
def test_text_and_threat_model_mean_the_same(norm, budget: Fraction) -> None:
    threat = ThreatModel(norm, budget)
    assert ThreatModel.parse(str(threat)) == threat


@given(st.sampled_from(NORMS), BUDGETS, st.fractions(0, 10))
def test_scaling_is_exact(norm, budget: Fraction, factor: Fraction) -> None:
    assert ThreatModel(norm, budget).scaled(factor) == ThreatModel(norm, budget * factor)


# Norms


def test_sizes_are_the_norms() -> None:
    delta = torch.tensor([[[[3.0, -4.0], [0.0, 0.0]]], [[[1.0, 1.0], [1.0, -1.0]]]])
    expected = {"Linf": [4, 1], "L2": [5, 2], "L1": [7, 4]}
    for norm in NORMS:
        assert ThreatModel(norm, Fraction(1)).size(delta).tolist() == expected[norm]


# Projection


def support(norm: str, gradient: np.ndarray, x: np.ndarray, epsilon: float) -> float:
    """Return the maximum of <gradient, q - x> over all q of the threat model around x, in closed form or by bisection.

    Values move with the sign of the gradient as far as the box lets them. Linf: each by epsilon; L1: the steepest first (a
    fractional knapsack); L2: each in proportion to its gradient, cut at the box, with the multiplier that spends the budget.
    """
    slope, room = np.abs(gradient), np.where(gradient > 0, 1 - x, x)
    if norm == "Linf":
        return float((slope * np.minimum(room, epsilon)).sum())
    if norm == "L1":
        order = np.argsort(-slope)
        spent = np.minimum(np.cumsum(room[order]), epsilon)
        return float((slope[order] * np.diff(spent, prepend=0)).sum())
    reachable = room * (slope > 0)
    if np.linalg.norm(reachable) <= epsilon:
        return float((slope * reachable).sum())
    low, high = 0.0, (epsilon + 2) / slope[slope > 0].min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(np.minimum(middle * slope, reachable)) <= epsilon else (low, middle)
    return float((slope * np.minimum(low * slope, reachable)).sum())


def test_the_support_function_bounds_every_feasible_point() -> None:
    # The check's own check: no point of the set passes the bound, and for each norm some nearly reach it.
    generator = np.random.default_rng(0)
    x, gradient = generator.random(3), generator.normal(size=3)
    steps = np.linspace(0, 1, 81)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3) - x
    for norm, order in (("Linf", np.inf), ("L2", 2), ("L1", 1)):
        inside = grid[np.linalg.norm(grid, ord=order, axis=1) <= 0.6]
        bound, best = support(norm, gradient, x, 0.6), float((inside @ gradient).max())
        assert best <= bound + 1e-12
        assert best >= bound - 0.03 * np.abs(gradient).sum()


def images(seed: int, count: int, values: int) -> Tensor:
    """Return images (count, 1, 1, values), some values at the ends of [0, 1] as in real images."""
    x = torch.rand(count, 1, 1, values, generator=rng(seed)) * 1.6 - 0.3
    return x.clamp(0, 1)


def points(seed: int, x: Tensor, reach: float) -> Tensor:
    return x + reach * torch.randn(x.shape, generator=rng(seed + 1))


@settings(deadline=None, max_examples=150)
@given(
    norm=st.sampled_from(NORMS),
    budget=st.sampled_from(["0", "1e-9", "1/255", "8/255", "0.5", "1", "2", "5", "100"]),
    values=st.sampled_from([1, 2, 12, 192]),
    reach=st.sampled_from([0.0, 0.01, 0.3, 3.0, 300.0]),
    seed=st.integers(0, 2**32),
    double=st.booleans(),
)
def test_the_projection_is_the_nearest_point_of_the_set(norm, budget, values, reach, seed, double) -> None:
    threat, x = ThreatModel.parse(f"{norm}:{budget}"), images(seed, 5, values)
    z = points(seed, x, reach)
    if double:
        x, z = x.double(), z.double()
    p = threat.project(z, x)
    assert p.dtype == z.dtype
    assert threat.violation(p, x) is None
    # What is rounded: the image plus its perturbation, value by value; in float64, the 40 bisections of L1 are coarser.
    rounding = (1e-11 if double else 1e-7) * (1 + reach)
    size = threat.size(p.double() - x.double())
    assert bool((size <= threat.epsilon + rounding * values).all())
    # p is the projection of z on a convex set if and only if <z - p, q - p> <= 0 for every q of the set.
    for x_, z_, p_ in zip(x, z, p, strict=True):
        x_, z_, p_ = (one.flatten().double().numpy() for one in (x_, z_, p_))
        worst = support(norm, z_ - p_, x_, threat.epsilon) - float((z_ - p_) @ (p_ - x_))
        # The duality gap is first order in the rounding, weighted by the distance.
        assert worst <= 20 * rounding * values * (1 + np.abs(z_ - p_).max())
    again = threat.project(p, x)
    assert bool(((again - p).abs() <= 4 * rounding * (1 + values**0.5)).all())


@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("budget", ["0.05", "0.4", "1.1"])
def test_the_projection_agrees_with_a_general_solver(norm: str, budget: str) -> None:
    threat, x = ThreatModel.parse(f"{norm}:{budget}"), images(3, 6, 4).double()
    z = points(3, x, 0.7)
    found = threat.project(z, x).flatten(1).numpy()
    for x_, z_, p_ in zip(x.flatten(1).numpy(), z.flatten(1).numpy(), found, strict=True):
        # Variables: how far each value rises and how far it falls; then both norms are smooth.
        def distance(moves: np.ndarray, x_=x_, z_=z_) -> float:
            return float(((x_ + moves[:4] - moves[4:] - z_) ** 2).sum())

        def unspent(moves: np.ndarray) -> float:
            return threat.epsilon - moves.sum() if norm == "L1" else threat.epsilon**2 - ((moves[:4] - moves[4:]) ** 2).sum()

        bounds = [(0, room) for room in (*(1 - x_), *x_)]
        start = np.full(8, 1e-3)
        solved = minimize(
            distance,
            start,
            bounds=bounds,
            constraints={"type": "ineq", "fun": unspent},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        # 8: SLSQP can go no lower at this ftol, which some BLAS threadings end with; the comparison below judges its point.
        assert solved.status in (0, 8)
        assert p_ == pytest.approx(x_ + solved.x[:4] - solved.x[4:], abs=1e-4)
        assert float(((p_ - z_) ** 2).sum()) <= solved.fun + 1e-8


@pytest.mark.parametrize("budget", ["0", "1e-9", "8/255", "2"])
def test_linf_projection_is_a_clamp(budget: str) -> None:
    threat, x = ThreatModel.parse(f"Linf:{budget}"), images(5, 20, 30)
    z = points(5, x, 0.2)
    near = x.double().numpy()
    expected = np.clip(z.double().numpy(), np.maximum(near - threat.epsilon, 0), np.minimum(near + threat.epsilon, 1))
    assert np.abs(threat.project(z, x).double().numpy() - expected).max() < 6e-8


@every_norm
def test_points_of_the_set_stay(norm: str) -> None:
    threat, x = ThreatModel.parse(f"{norm}:100"), images(6, 4, 12)
    inside = torch.rand(x.shape, generator=rng(8))
    assert (threat.project(inside, x) - inside).abs().max() < 1e-7
    assert (threat.project(x, x) - x).abs().max() == 0


@every_norm
def test_budget_zero_is_the_image(norm: str) -> None:
    threat, x = ThreatModel.parse(f"{norm}:0"), images(7, 4, 12)
    assert torch.equal(threat.project(points(7, x, 1.0), x), x)
    assert torch.equal(threat.random_start(x, torch.arange(4), seed=0), x)
    assert threat.violation(x, x) is None


@every_norm
def test_the_projection_of_one_image_does_not_depend_on_the_others(norm: str) -> None:
    threat, x = ThreatModel.parse(f"{norm}:0.7"), images(8, 6, 27)
    z = points(8, x, torch.tensor([0.01, 0.1, 1, 3, 30, 300]).reshape(6, 1, 1, 1))
    alone = torch.cat([threat.project(z[i : i + 1], x[i : i + 1]) for i in range(6)])
    assert (threat.project(z, x) - alone).abs().max() < 1e-6


@every_norm
def test_fewer_rounds_stay_inside_the_threat_model(norm: str) -> None:
    threat, x = ThreatModel.parse(f"{norm}:2"), images(9, 8, 192)
    z = points(9, x, 1.0)
    for rounds in (0, 1, 2):
        assert threat.violation(threat.project(z, x, rounds=rounds), x) is None


def test_l2_projection_spends_the_whole_budget_where_the_box_lets_it() -> None:
    # Scaling and then clipping does not, and makes an attack weaker than its threat model.
    threat, x = ThreatModel.parse("L2:2"), images(10, 8, 192)
    z = points(10, x, 1.0)
    assert bool((threat.size(threat.project(z, x) - x) > 2 - 1e-5).all())
    assert bool((threat.size(threat.project(z, x, rounds=0) - x) < 1.9).any())


def test_l2_projection_is_exact_where_values_meet_the_box_one_after_another() -> None:
    # Bright images far outside the box at a large budget: the scale has to be solved for more often than elsewhere.
    threat = ThreatModel.parse("L2:10")
    x = 1 - torch.rand(16, 3072, generator=rng(0), dtype=torch.float64) ** 16
    z = x + 100 * torch.randn(x.shape, generator=rng(1), dtype=torch.float64).abs()
    delta, low, high = z - x, torch.zeros(16, 1, dtype=torch.float64), torch.ones(16, 1, dtype=torch.float64)
    for _ in range(100):
        middle = (low + high) / 2
        inside = (delta * middle).clamp(-x, 1 - x).norm(dim=1, keepdim=True) <= 10
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    exact = x + (delta * low).clamp(-x, 1 - x)
    assert (threat.project(z, x) - exact).norm(dim=1).max() < 1e-9


@every_norm
def test_an_empty_batch_has_an_empty_projection(norm: str) -> None:
    threat, x = ThreatModel.parse(f"{norm}:0.5"), torch.empty(0, 3, 4, 4)
    assert threat.project(x, x).shape == x.shape
    assert threat.violation(x, x) is None
    assert threat.size(x).shape == (0,)


@every_norm
def test_an_empty_batch_has_an_empty_random_start(norm: str) -> None:
    threat, x = ThreatModel.parse(f"{norm}:0.5"), torch.empty(0, 3, 4, 4)
    assert threat.random_start(x, torch.empty(0, dtype=torch.int64), seed=0).shape == x.shape


# Random starts


@settings(deadline=None, max_examples=40)
@given(
    norm=st.sampled_from(NORMS),
    budget=st.sampled_from(["0", "1e-9", "8/255", "0.5", "3", "100"]),
    seed=st.integers(-(2**40), 2**40),
)
def test_random_starts_lie_in_the_threat_model(norm, budget, seed) -> None:
    threat, x = ThreatModel.parse(f"{norm}:{budget}"), images(11, 6, 48).reshape(6, 3, 4, 4)
    start = threat.random_start(x, torch.arange(6), seed)
    assert start.dtype == x.dtype
    assert threat.violation(start, x) is None


@every_norm
def test_a_random_start_depends_on_the_example_and_not_on_the_batch(norm: str) -> None:
    threat, x = ThreatModel.parse(f"{norm}:0.5"), images(12, 6, 48).reshape(6, 3, 4, 4)
    examples = torch.tensor([4, 0, 2**33, 7, 1, 9])
    start = threat.random_start(x, examples, seed=3)
    order = torch.tensor([5, 3, 0, 1, 4, 2])
    assert torch.equal(threat.random_start(x[order], examples[order], seed=3), start[order])
    assert torch.equal(threat.random_start(x[2:3], examples[2:3], seed=3)[0], start[2])
    for other in (threat.random_start(x, examples, 4), threat.random_start(x, examples, 3, "restart"), x):
        assert not torch.isclose(start, other, atol=1e-6).flatten(1).all(1).any()
    same = threat.random_start(x[:1].expand(6, -1, -1, -1), examples, seed=3)
    assert len(torch.unique(same, dim=0)) == 6


def test_random_starts_fill_the_ball() -> None:
    x, examples = torch.full((400, 3, 4, 4), 0.5), torch.arange(400)
    linf = (ThreatModel.parse("Linf:0.2").random_start(x, examples, 0) - x).double().flatten()
    # Uniform on [-0.2, 0.2]: mean 0 and standard deviation 0.2 / sqrt(3), within 4.5 standard errors.
    assert abs(float(linf.mean())) < 4.5 * 0.2 / (3 * len(linf)) ** 0.5
    assert float(linf.std()) == pytest.approx(0.2 / 3**0.5, rel=0.02)
    for norm in ("L2", "L1"):
        threat = ThreatModel.parse(f"{norm}:0.3")
        sizes = threat.size(threat.random_start(x, examples, 0) - x)
        # A uniform share of the budget.
        assert float(sizes.mean()) == pytest.approx(0.15, abs=4.5 * 0.3 / (12 * 400) ** 0.5)
        assert float(sizes.min()) < 0.02
        assert float(sizes.max()) > 0.28


# Membership


@every_norm
def test_every_kind_of_violation_is_told(norm: str) -> None:
    threat, x = ThreatModel.parse(f"{norm}:0.25"), torch.full((3, 3, 4, 4), 0.5)
    moved = x.clone()
    moved[1, 0, 0, 0] = 0.75
    assert threat.violation(moved, x) is None
    for value in (0.76, 0.24):
        moved[1, 0, 0, 0] = value
        message = threat.violation(moved, x)
        assert message is not None
        assert norm in message
        assert "the budget is 0.25" in message
        assert "0.26" in message
    for value in (float("nan"), float("inf"), -float("inf")):
        moved[1, 0, 0, 0] = value
        assert "not finite" in str(threat.violation(moved, x))
    assert "shape (2, 3, 4, 4)" in str(threat.violation(x[:2], x))
    wide = ThreatModel.parse(f"{norm}:100")
    for value in (-1e-6, 1.000001):
        moved[1, 0, 0, 0] = value
        assert "outside [0, 1]" in str(wide.violation(moved, x))


@every_norm
def test_a_violation_in_any_example_is_found(norm: str) -> None:
    threat, x = ThreatModel.parse(f"{norm}:0.01"), torch.full((5, 3, 4, 4), 0.5)
    for i in range(5):
        moved = x.clone()
        moved[i, 2, 3, 3] += 0.011
        assert threat.violation(moved, x) is not None


def test_only_rounding_is_forgiven() -> None:
    x = torch.full((1, 3, 32, 32), 0.5, dtype=torch.float64)
    assert ThreatModel.parse("Linf:8/255").violation(x + 8 / 255 + 0.9 * TOLERANCE, x) is None
    assert ThreatModel.parse("Linf:8/255").violation(x + 8 / 255 + 1.1 * TOLERANCE, x) is not None
    # 0.5 spread over 3072 values; each value of an image is rounded by up to 6e-8 in float32.
    for norm, each, excess in (("L2", 0.5 / 3072**0.5, 2e-5), ("L1", 0.5 / 3072, 5e-4)):
        assert ThreatModel.parse(f"{norm}:0.5").violation(x + each, x) is None
        assert ThreatModel.parse(f"{norm}:0.5").violation(x + each * (1 + 2 * excess), x) is not None
