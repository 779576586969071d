"""Attacks where the worst perturbation is known: linear models, in each norm and the box, and a summit inside the ball."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from robench import attacks, losses
from robench.aggregate import mean_of_logits
from robench.attacks.steps import steepest
from robench.defense import Defense, Ensemble
from robench.noise import Draw, normal, uniform
from robench.threat import ThreatModel

SHAPE = (3, 6, 7)
SIZE = 3 * 6 * 7
THREATS = ("Linf:0.1", "Linf:0.6", "L2:1", "L2:4", "L1:3", "L1:20")
"""For each norm a budget at which the box holds back few values, and one at which it holds back most."""


class Linear(nn.Module):
    """Logits ``(-m/2, m/2, -60, -70, -80)`` with ``m = (x - 1/2) @ direction - offset``: only classes 0 and 1 matter."""

    def __init__(self, direction: Tensor, offset: float) -> None:
        super().__init__()
        self.direction = nn.Parameter(direction)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        margin = (x - 0.5).flatten(1) @ self.direction - self.offset
        others = torch.tensor([-60.0, -70.0, -80.0]).expand(len(x), 3)
        return torch.cat([torch.stack([-margin / 2, margin / 2], dim=1), others], dim=1)


def direction_and_images(examples: int = 6) -> tuple[Tensor, Tensor]:
    """Return a direction (SIZE,) and images (B, *SHAPE), some of whose values lie on the edge of the box."""
    ids = torch.arange(examples)
    images = (1.4 * uniform(Draw(0, ids), "images", SHAPE) - 0.2).clamp(0, 1)
    return normal(Draw(0, ids[:1]), "direction", (SIZE,))[0] / SIZE**0.5, images


def optimal_gain(direction: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """Return the most that a perturbation inside budget and box can add to ``x @ direction``: (B, ...) -> (B,), float64."""
    low, high, w = -x.flatten(1).double(), 1 - x.flatten(1).double(), direction.double()
    room = torch.where(w > 0, high, -low)
    gain = w.abs()
    if threat.norm == "Linf":
        return (gain * room.clamp(max=threat.epsilon)).sum(1)
    if threat.norm == "L1":
        # Fill the coordinates of largest |w| up to the box, until the budget is spent.
        order = gain.argsort(descending=True)
        filled = room[:, order]
        spent_before = filled.cumsum(1) - filled
        return (gain[order] * filled.minimum((threat.epsilon - spent_before).clamp(min=0))).sum(1)
    # The optimum is clip(t * w) for the scale t that meets the budget (stationarity of the Lagrangian), or the corner.
    small, large = torch.zeros(len(x), 1).double(), torch.full((len(x), 1), 1e6).double()
    for _ in range(200):
        scale = (small + large) / 2
        inside = (gain * scale).minimum(room).norm(dim=1, keepdim=True) <= threat.epsilon
        small, large = torch.where(inside, scale, small), torch.where(inside, large, scale)
    return (gain * (gain * small).minimum(room)).sum(1)


def share_of_optimum(name: str, text: str, members: int = 1) -> Tensor:
    """Return, per example, the margin that the attack gains as a share of the most that can be gained."""
    threat = ThreatModel.parse(text)
    direction, x = direction_and_images()
    best = optimal_gain(direction, x, threat)
    # Out of reach: an attack that stops at success must still climb to the top.
    offset = float((x - 0.5).flatten(1).matmul(direction).max() + 1.2 * best.max())
    parts = [direction + (i - (members - 1) / 2) * torch.linspace(-0.2, 0.2, SIZE) for i in range(members)]
    defense = Ensemble([Linear(part, offset) for part in parts], mean_of_logits).eval()
    y = torch.zeros(len(x), dtype=torch.int64)
    x_adv = attacks.parse(name)(defense, x, y, threat, examples=torch.arange(len(x)), seed=0)
    assert threat.violation(x_adv, x) is None
    with torch.no_grad():
        gain = losses.margin(defense(x_adv).double(), y) - losses.margin(defense(x).double(), y)
    return gain / best


@pytest.mark.parametrize("text", THREATS)
def test_the_closed_form_is_attained_and_not_passed(text: str) -> None:
    """A projected-gradient solution in float64 comes to the closed form from below."""
    threat = ThreatModel.parse(text)
    direction, x = direction_and_images()
    x, step = x.double(), direction.double().reshape(SHAPE)
    x_adv = x
    for _ in range(300):
        x_adv = threat.project(x_adv + 10 * step, x)
    share = ((x_adv - x).flatten(1) @ direction.double()) / optimal_gain(direction, x, threat)
    assert share.max() < 1 + 1e-9
    assert share.min() > 0.999


def test_an_ascent_in_l2_follows_a_gradient_whose_square_is_zero_in_float32() -> None:
    gradient = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = steepest(gradient, "L2")
    assert torch.equal(wanted.flatten(1).norm(dim=1).round(decimals=5), torch.ones(4))
    for share in (1e-12, 1e-18, 1e-25, 1e-35):
        torch.testing.assert_close(steepest(gradient * share, "L2"), wanted, rtol=1e-3, atol=1e-4)
    assert not steepest(0 * gradient, "L2").any()


@pytest.mark.parametrize("text", THREATS)
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t,targets=2"])
def test_apgd_reaches_the_optimum(name: str, text: str) -> None:
    """In L1 its smallest step is a tenth of the budget, and falls also on values that are at the edge already."""
    share = share_of_optimum(name, text)
    assert share.max() < 1 + 1e-4
    assert share.min() > (0.98 if text == "L1:20" else 0.99)


@pytest.mark.parametrize("text", THREATS[:5])
@pytest.mark.parametrize("name", ["pgd-100", "pgd-100,loss=margin", "mean-transfer-50,finetune=50"])
def test_pgd_reaches_the_optimum(name: str, text: str) -> None:
    """L1 steps of equal size on a fixed share of the values do not settle where the box is met: less near there."""
    share = share_of_optimum(f"{name},step_size={0.2 * ThreatModel.parse(text).epsilon}", text)
    assert share.max() < 1 + 1e-4
    assert share.min() > (0.95 if text == "L1:3" else 0.99)


@pytest.mark.parametrize("text", THREATS[:5])
def test_momentum_reaches_the_optimum(text: str) -> None:
    """Its steps shrink to nothing, so that it settles in the corners of the box; less in L1, as above."""
    share = share_of_optimum("momentum-100", text)
    assert share.max() < 1 + 1e-4
    assert share.min() > (0.95 if text == "L1:3" else 0.99)


class Shaken(Defense):
    """`Linear`, whose direction is another at each draw: mostly noise, around the same mean."""

    random = True

    def __init__(self, direction: Tensor, offset: float) -> None:
        super().__init__()
        self.direction, self.offset = direction, offset

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        draw = draw or Draw(0, torch.arange(len(x)))
        shaken = self.direction + 4 * self.direction.abs().mean() * normal(draw, "shaken", (SIZE,))
        margin = ((x - 0.5).flatten(1) * shaken).sum(1) - self.offset
        return torch.stack([-margin / 2, margin / 2], dim=1)[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        return []


@pytest.mark.parametrize("text", ["Linf:0.1", "L2:1", "L1:3"])
def test_momentum_sees_through_the_noise_of_single_draws(text: str) -> None:
    """On the expected margin it comes nearer to the most that can be gained than APGD and PGD by the same passes."""
    threat, (direction, x) = ThreatModel.parse(text), direction_and_images()
    defense, y = Shaken(direction, 0.0).eval(), torch.zeros(len(x), dtype=torch.int64)
    shares = []
    for name in ("momentum-200", "apgd-ce,steps=200", "apgd-ce,steps=25,draws=8", "pgd-200"):
        x_adv = attacks.parse(name)(defense, x, y, threat, examples=torch.arange(len(x)), seed=0)
        shares.append(float((((x_adv - x).flatten(1).double() @ direction.double()) / optimal_gain(direction, x, threat)).mean()))
    assert shares[0] > max(shares[1:])


@pytest.mark.parametrize("name", ["fast", "adaptive,steps=40,queries=20"])
def test_fast_and_adaptive_follow_the_momentum_on_a_random_defense(name: str) -> None:
    """No single draw's gradient shows the mean direction, and `fast` comes near to it all the same."""
    threat, (direction, x) = ThreatModel.parse("Linf:0.1"), direction_and_images()
    defense, y = Shaken(direction, 0.0).eval(), torch.zeros(len(x), dtype=torch.int64)
    x_adv = attacks.parse(name)(defense, x, y, threat, examples=torch.arange(len(x)), seed=0)
    share = ((x_adv - x).flatten(1).double() @ direction.double()) / optimal_gain(direction, x, threat)
    assert float(share.mean()) > 0.8


@pytest.mark.parametrize("text", ["Linf:0.1", "Linf:0.6"])
def test_adam_reaches_the_optimum_of_linf(text: str) -> None:
    assert share_of_optimum("pgd-adam-300", text).min() > 0.99


@pytest.mark.parametrize("name", ["fgsm", "ifgsm-10"])
@pytest.mark.parametrize("text", ["Linf:0.1", "Linf:0.6"])
def test_sign_steps_are_exact_for_linf(name: str, text: str) -> None:
    assert share_of_optimum(name, text).min() > 1 - 1e-4


def test_a_mean_of_linear_members_is_linear() -> None:
    assert share_of_optimum("apgd-ce", "L2:1", members=3).min() > 0.99
    assert share_of_optimum("fgsm", "Linf:0.1", members=4).min() > 1 - 1e-4


@pytest.mark.parametrize("text", ["Linf:0.1", "L2:1", "L1:3"])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t"])
def test_success_is_found_exactly_up_to_the_reachable_margin(name: str, text: str) -> None:
    """With the decision at 0.99 of each example's optimal gain every example falls, and at 1.001 none does."""
    threat = ThreatModel.parse(text)
    direction, x = direction_and_images(1)
    start, best = float((x - 0.5).flatten() @ direction), float(optimal_gain(direction, x, threat))
    y, fooled = torch.zeros(1, dtype=torch.int64), []
    for share in (0.99, 1.001):
        defense = Ensemble([Linear(direction, start + share * best)], mean_of_logits).eval()
        x_adv = attacks.parse(name)(defense, x, y, threat, examples=torch.arange(1), seed=0)
        fooled.append(bool(defense(x_adv).argmax(1) != y))
    assert fooled == [True, False]


@pytest.mark.parametrize("text", THREATS)
def test_fab_finds_the_least_distance_within_a_hundredth(text: str) -> None:
    """The decision lies at the budget exactly: it is out of reach of 0.999 of the budget, and found with 1.01 of it."""
    threat = ThreatModel.parse(text)
    direction, x = direction_and_images(1)
    offset = float((x - 0.5).flatten() @ direction) + float(optimal_gain(direction, x, threat))
    defense = Ensemble([Linear(direction, offset)], mean_of_logits).eval()
    y, fooled = torch.zeros(1, dtype=torch.int64), []
    for share in (Fraction(1010, 1000), Fraction(999, 1000)):
        x_adv = attacks.parse("fab-t")(defense, x, y, threat.scaled(share), examples=torch.arange(1), seed=0)
        fooled.append(bool(defense(x_adv).argmax(1) != y))
    assert fooled == [True, False]


@pytest.mark.parametrize(("text", "least"), [("Linf:0.1", 0.95), ("Linf:0.6", 0.95), ("L2:1", 0.4), ("L2:4", 0.4), ("L1:3", 0.4)])
def test_square_comes_near_the_optimum_and_not_past_it(text: str, least: float) -> None:
    """Its L2 and L1 patterns cannot take the shape of a dense random direction."""
    share = share_of_optimum(f"square,queries={300 if text == 'L1:3' else 1000}", text)
    assert share.max() < 1 + 1e-4
    assert share.min() > least


@pytest.mark.parametrize(("text", "queries", "reach"), [("Linf:0.1", 1000, 0.8), ("L2:1", 500, 0.3), ("L1:3", 500, 0.4)])
def test_square_fools_what_is_easily_in_reach_and_nothing_out_of_it(text: str, queries: int, reach: float) -> None:
    threat = ThreatModel.parse(text)
    direction, x = direction_and_images(1)
    start, best = float((x - 0.5).flatten() @ direction), float(optimal_gain(direction, x, threat))
    y, fooled = torch.zeros(1, dtype=torch.int64), []
    for share in (reach, 1.001):
        defense = Ensemble([Linear(direction, start + share * best)], mean_of_logits).eval()
        x_adv = attacks.parse(f"square,queries={queries}")(defense, x, y, threat, examples=torch.arange(1), seed=0)
        fooled.append(bool(defense(x_adv).argmax(1) != y))
    assert fooled == [True, False]


SUMMITS = pytest.mark.parametrize(("text", "reach"), [("Linf:0.2", 0.2), ("L2:1", 1 / SIZE**0.5)])


class Hill(nn.Module):
    """A margin that is highest, at -1, in one point near the image, so that no attack fools it."""

    def __init__(self, x: Tensor, reach: float) -> None:
        super().__init__()
        self.summit = x + reach * (uniform(Draw(1, torch.arange(1)), "summit", SHAPE) - 0.5)
        self.reach = reach

    def forward(self, x: Tensor) -> Tensor:
        margin = -(((x - self.summit) / self.reach) ** 2).flatten(1).mean(1) - 1
        return torch.cat([torch.stack([-margin / 2, margin / 2], dim=1), torch.tensor([[-60.0, -70.0, -80.0]])], dim=1)


def climb(name: str, text: str, reach: float) -> tuple[Hill, Tensor, Tensor]:
    """Return a hill, the image (1, *SHAPE) and where the attack ends."""
    x, zero = 0.3 + 0.4 * uniform(Draw(0, torch.arange(1)), "images", SHAPE), torch.tensor([0])
    hill = Hill(x, reach)
    defense = Ensemble([hill], mean_of_logits).eval()
    return hill, x, attacks.parse(name)(defense, x, zero, ThreatModel.parse(text), examples=zero, seed=0)


@SUMMITS
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t,targets=1"])
def test_apgd_settles_on_a_summit_inside_the_ball(name: str, text: str, reach: float) -> None:
    """Its first step is twice the budget: only halving at the checkpoints comes to rest."""
    hill, x, x_adv = climb(name, text, reach)
    assert float((x_adv - hill.summit).norm() / (x - hill.summit).norm()) < 0.03


@SUMMITS
@pytest.mark.parametrize("rho", [0.75, 0.35])
def test_apgd_is_algorithm_1(text: str, reach: float, rho: float) -> None:
    """The paper's algorithm written out for one image (arXiv 2003.01690, Algorithm 1) ends in the same point."""
    hill, x, x_adv = climb(f"apgd-ce,rho={rho}", text, reach)
    threat, checkpoints = ThreatModel.parse(text), [0, 22, 41, 57, 70, 80, 87, 93, 99]

    def ascend(at: Tensor) -> tuple[float, Tensor]:
        at = at.clone().requires_grad_()
        loss = losses.cross_entropy(hill(at), torch.tensor([0]))
        (gradient,) = torch.autograd.grad(loss.sum(), at)
        return float(loss.detach()), gradient.sign() if threat.norm == "Linf" else gradient / gradient.norm()

    eta = 2 * threat.epsilon
    points = [threat.random_start(x, torch.tensor([0]), 0, "start/0/0")]
    values = [ascend(points[0])[0]]
    points.append(threat.project(points[0] + eta * ascend(points[0])[1], x))
    best, highest, rises, halved, highest_before = points[0], values[0], 0, False, values[0]
    for k in range(1, 101):
        value = ascend(points[k])[0]
        rises += value > values[k - 1]
        values.append(value)
        if value > highest:
            best, highest = points[k], value
        if k in checkpoints:
            interval = k - checkpoints[checkpoints.index(k) - 1]
            halved = rises < rho * interval or (not halved and highest == highest_before)
            rises, highest_before = 0, highest
            if halved:
                eta, points[k], values[k] = eta / 2, best, highest
        z = threat.project(points[k] + eta * ascend(points[k])[1], x)
        points.append(threat.project(points[k] + 0.75 * (z - points[k]) + 0.25 * (points[k] - points[k - 1]), x))
    torch.testing.assert_close(x_adv, best, rtol=0, atol=1e-5)


class Spoilt(Linear):
    """The same logits; the first values' gradients come back as NaN and infinity."""

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(_context, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_context, gradient: Tensor) -> Tensor:
            spoilt = gradient.clone()
            spoilt.flatten(1)[:, :2] = torch.tensor([torch.nan, torch.inf])
            return spoilt

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.Spoil.apply(x))


@pytest.mark.parametrize("name", ["fgsm", "pgd-20", "pgd-adam-20", "apgd-ce,steps=20", "fab-t,steps=20", "fast", "adaptive,steps=20"])
@pytest.mark.parametrize("threat", ["Linf:0.1", "L2:1", "L1:3"])
def test_values_whose_gradient_is_not_finite_do_not_end_the_search(name: str, threat: str) -> None:
    direction, x = direction_and_images()
    within, examples = ThreatModel.parse(threat), torch.arange(len(x))
    gain = optimal_gain(direction, x, within)
    # Three quarters of what is within reach: without two of its 126 values a gradient still gets there.
    defenses = [
        Ensemble([kind(direction, float(((x - 0.5).flatten(1) @ direction + 0.75 * gain).min()))], mean_of_logits).eval()
        for kind in (Linear, Spoilt)
    ]
    y = torch.zeros(len(x), dtype=torch.long)
    left = []
    for defense in defenses:
        x_adv = attacks.parse(name)(defense, x, y, within, examples=examples, seed=0)
        assert within.violation(x_adv, x) is None
        left.append(int((defense(x_adv).argmax(1) == y).sum()))
    assert left[1] <= left[0] < len(x)


@pytest.mark.parametrize("name", ["pgd-5", "apgd-ce,steps=5", "fab-t,steps=5", "fast", "adaptive,steps=5"])
def test_gradients_that_a_caller_turned_off_are_turned_on(name: str) -> None:
    direction, x = direction_and_images()
    defense, y = Ensemble([Linear(direction, 0.5)], mean_of_logits).eval(), torch.zeros(len(x), dtype=torch.long)
    arguments = (defense, x, y, ThreatModel.parse("Linf:0.1"))
    wanted = attacks.parse(name)(*arguments, examples=torch.arange(len(x)), seed=0)
    with torch.no_grad():
        assert torch.equal(attacks.parse(name)(*arguments, examples=torch.arange(len(x)), seed=0), wanted)
