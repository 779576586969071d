"""`adaptive` and `fast` on defenses that hide their gradient each in its own way, and the views they differentiate."""

from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robench import attacks, losses
from robench.aggregate import crossmax, majority_vote, mean_of_logits
from robench.attacks.adaptive import compositions
from robench.attacks.ascent import Plan, ascend
from robench.attacks.bare import Ways
from robench.attacks.objective import evaluate_point, image_gradient
from robench.attacks.shattered import turns_away
from robench.attacks.transfer import mean_surrogate
from robench.attacks.views import Smoothed, StraightThrough
from robench.cost import counted
from robench.defense import Defense, Ensemble, as_defense
from robench.errors import UserError
from robench.noise import Draw, normal, uniform
from robench.threat import ThreatModel

CLASSES = 5
SHAPE = (3, 6, 6)
THREAT = ThreatModel.parse("Linf:0.15")
IDS = torch.arange(12)


class Network(nn.Module):
    """Two layers with fixed weights, that every attack with a gradient fools within `THREAT`."""

    def __init__(self, number: int) -> None:
        super().__init__()
        draw, size = Draw(3, torch.tensor([0]), number), 108
        self.first = nn.Parameter(2 * normal(draw, "first", (size, 24))[0] / size**0.5)
        self.second = nn.Parameter(normal(draw, "second", (24, CLASSES))[0])

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh((x - 0.5).flatten(1) @ self.first) @ self.second


class Wrapped(nn.Module):
    """A network on changed images, or with changed logits."""

    def __init__(self, before: Callable[[Tensor], Tensor] = lambda x: x, after: Callable[[Tensor], Tensor] = lambda z: z) -> None:
        super().__init__()
        self.network, self.before, self.after = Network(0), before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.network(self.before(x)))


class Ripples(nn.Module):
    """A network whose logits carry a ripple of small height that turns the gradient within a thousandth of the budget."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network(0)

    def forward(self, x: Tensor) -> Tensor:
        ripple = torch.sin(2e5 * x.flatten(1)[:, : 5 * 21].reshape(len(x), CLASSES, -1)).mean(-1)
        return self.network(x) + 0.02 * ripple


class Noisy(Defense):
    """Three networks under CrossMax that see the image with noise."""

    random = True

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList([Network(number) for number in range(3)])

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        assert draw is not None
        seen = x + 0.2 * normal(draw, "noise", tuple(x.shape[1:]))
        return torch.stack([network(seen) for network in self.networks], dim=1)

    def aggregate(self, logits: Tensor) -> Tensor:
        return crossmax(logits)

    def members(self) -> list[nn.Module]:
        return list(self.networks)


def images() -> Tensor:
    return uniform(Draw(1, IDS), "images", SHAPE)


def predicted(defense: Defense, x: Tensor) -> Tensor:
    with torch.no_grad():
        return defense(x).argmax(1)


def run(name: str, defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel = THREAT) -> attacks.Found:
    return attacks.parse(name).run(defense.eval(), x, y, threat, examples=IDS[: len(x)], seed=0)


class Softmax(Defense):
    """One network whose probabilities are 1 to the last bit, so that they have no gradient; its logits have one."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network(0)

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        return 100 * self.network(x)[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0].softmax(-1)

    def members(self) -> list[nn.Module]:
        return [self.network]


MASKED: dict[str, Callable[[], nn.Module]] = {
    "saturated logits": lambda: Wrapped(after=lambda z: 1e4 * z),
    "rounded logits": lambda: Wrapped(after=lambda z: torch.round(4 * z) / 4),
    "quantised images": lambda: Wrapped(before=lambda x: torch.round(8 * x) / 8),
    "whole numbers": lambda: Wrapped(before=lambda x: (8 * x + 0.5).to(torch.uint8).float() / 8),
    "thermometer code": lambda: Wrapped(before=lambda x: (x[..., None] > torch.linspace(0.05, 0.95, 10)).float().mean(-1)),
    "detached images": lambda: Wrapped(before=lambda x: x.detach()),
    "ripples": Ripples,
    "probabilities": Softmax,
    "vote": lambda: Ensemble([Network(number) for number in range(3)], majority_vote),
    "CrossMax": lambda: Ensemble([Network(number) for number in range(3)], crossmax),
}


@pytest.mark.parametrize("kind", MASKED)
def test_adaptive_breaks_what_only_hides_its_gradient(kind: str) -> None:
    defense, x = as_defense(MASKED[kind]()), images()
    y = predicted(defense.eval(), x)
    found = run("adaptive,steps=20,queries=100", defense, x, y)
    fooled = predicted(defense, found.x_adv) != y
    assert THREAT.violation(found.x_adv, x) is None
    assert fooled.sum() >= 11
    # Each example is counted where it fell, and nowhere else.
    assert torch.equal(torch.stack(list(found.stages.values())).sum(0), fooled.long())


@pytest.mark.parametrize("kind", MASKED)
def test_adaptive_is_no_weaker_than_fast(kind: str) -> None:
    defense, x, threat = as_defense(MASKED[kind]()), images(), ThreatModel.parse("Linf:0.04")
    y = predicted(defense.eval(), x)
    standing = [int((predicted(defense, run(name, defense, x, y, threat).x_adv) == y).sum()) for name in ("adaptive,steps=5", "fast")]
    assert standing[0] <= standing[1]


def test_an_honest_model_pays_for_no_view_it_does_not_need() -> None:
    defense, x = as_defense(Network(0)), images()
    found = run("adaptive,steps=5,queries=1", defense, x, predicted(defense.eval(), x), ThreatModel.parse("Linf:0.001"))
    with counted(defense) as cost:
        run("adaptive,steps=5,queries=1", defense, x, predicted(defense, x), ThreatModel.parse("Linf:0.001"))
    with counted(defense) as first:
        run("fast,queries=1", defense, x, predicted(defense, x), ThreatModel.parse("Linf:0.001"))
    # After fast: prediction, three targets, onward: ascents of 6 forwards and a judgement each. The rest decides,
    # on two images of noise too.
    assert not any(bool(first.any()) for first in found.stages.values())
    assert cost.forwards - first.forwards <= len(x) * (1 + 5 * 7 + 5 + 2 + 6) + 6
    assert cost.backwards - first.backwards <= len(x) * (5 * 5 + 5) + 4


def test_adaptive_looks_behind_nested_aggregations_where_there_are_some() -> None:
    """A mean of three votes shows the attacks on its predictors no gradient; some images only the networks behind them give away."""
    votes = [Ensemble([Network(3 * vote + number) for number in range(3)], majority_vote).eval() for vote in range(3)]
    x = images()
    for defense, nested in ((votes[0], False), (Ensemble(votes, mean_of_logits).eval(), True)):
        y = predicted(defense, x)
        found = run("adaptive,steps=10,queries=1", defense, x, y)
        within = [name for name in found.stages if "innermost" in name]
        assert bool(within) == nested
        assert (predicted(defense, found.x_adv) != y).all()
    assert sum(int(found.stages[name].sum()) for name in within) >= 2


def test_an_ascent_on_a_surrogate_that_is_fooled_goes_on() -> None:
    """To fool the mean of the innermost logits is not to fool the vote of votes: where the defense stands, the search is not over."""
    votes = [Ensemble([Network(3 * vote + number) for number in range(3)], majority_vote).eval() for vote in range(3)]
    defense, x = Ensemble(votes, majority_vote).eval(), images()
    surrogate, y = mean_surrogate(defense), predicted(defense, x)
    margins = []
    for composition in compositions(defense, 3, 1, THREAT, 0.0, 0, Ways(None, ())):
        if composition.view is mean_surrogate:
            plan = Plan(lambda logits, y, _: losses.margin(logits, y), 30, stops=composition.stops)
            x_adv = ascend(plan, 0, surrogate, x, y, y, THREAT, x, IDS, 0)
            margins.append(losses.margin(surrogate(x_adv), y).detach())
    far = ascend(Plan(lambda logits, y, _: losses.margin(logits, y), 30, stops=False), 0, surrogate, x, y, y, THREAT, x, IDS, 0)
    assert len(margins) == 3
    assert (losses.margin(surrogate(far), y) > 1).all()
    assert all(torch.equal(found, losses.margin(surrogate(far), y)) for found in margins)


@pytest.mark.parametrize("name", ["adaptive,steps=10,draws=3,queries=20", "fast,steps=10,draws=2"])
def test_a_random_defense_keeps_the_image_that_fails_on_most_draws(name: str) -> None:
    defense, x, judges = Noisy().eval(), images(), range(2**20, 2**20 + 40)

    def failures(at: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.stack([defense(at, Draw(9, IDS, number)).argmax(1) != y for number in judges]).float().mean()

    with torch.no_grad():
        y = torch.stack([defense(x, Draw(9, IDS, number)) for number in judges]).mean(0).argmax(1)
    found = run(name, defense, x, y)
    direct = run("apgd-ce,steps=10,draws=3", defense, x, y)
    assert failures(found.x_adv) >= failures(direct.x_adv) > failures(x)
    kept = torch.stack(list(found.stages.values())).sum(0)
    assert int(kept.max()) == 1


@pytest.mark.parametrize("name", ["adaptive", "fast"])
def test_two_classes_are_enough_and_one_is_refused(name: str) -> None:
    class First(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.classes = classes

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, : self.classes]

    x = images()
    defense = as_defense(First(2))
    y = predicted(defense, x)
    found = run(f"{name},steps=10", defense, x, y, ThreatModel.parse("Linf:0.5"))
    assert (predicted(defense, found.x_adv) != y).all()
    with pytest.raises(UserError, match="at least 2 classes"):
        run(name, as_defense(First(1)), x, torch.zeros_like(y))


def test_fast_spends_little_on_what_cannot_fall() -> None:
    """Far out of reach: the first ascent and one towards the nearest target, or less, and three looks at the gradient."""
    defense, x = as_defense(Network(0)), images()
    y = predicted(defense.eval(), x)
    with counted(defense) as cost:
        found = run("fast", defense, x, y, ThreatModel.parse("Linf:0.0001"))
    assert (predicted(defense, found.x_adv) == y).all()
    assert cost.forwards <= len(x) * (1 + 22 + 1 + 1 + 12 + 3)


@pytest.mark.parametrize("kind", ["quantised images", "whole numbers", "detached images", "thermometer code"])
def test_fast_goes_straight_through_where_there_is_no_gradient(kind: str) -> None:
    defense, x = as_defense(MASKED[kind]()), images()
    y = predicted(defense.eval(), x)
    found = run("fast,queries=1", defense, x, y, ThreatModel.parse("Linf:0.06"))
    assert int(found.stages["straight-through"].sum()) >= 6
    assert (predicted(defense, found.x_adv) == y).sum() <= 2


class Turned(torch.autograd.Function):
    """The identity; a part of its gradient is right, and the rest comes back elsewhere."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(_ctx: object, gradient: Tensor) -> Tensor:
        return 0.3 * gradient + gradient.roll((3, 3), dims=(-2, -1))


def test_fast_goes_without_a_gradient_that_misleads() -> None:
    defense, x, threat = as_defense(Wrapped(before=Turned.apply)), images(), ThreatModel.parse("Linf:0.045")  # type: ignore[arg-type]
    y = predicted(defense.eval(), x)
    idle, found = (run(f"fast,queries={queries}", defense, x, y, threat) for queries in (1, 300))
    standing = [int((predicted(defense, at.x_adv) == y).sum()) for at in (idle, found)]
    assert int(found.stages["square"].sum()) == standing[0] - standing[1] >= 2
    for name, marks in idle.stages.items():
        assert torch.equal(marks, found.stages[name]) or name == "square"


@pytest.mark.parametrize("threat", ["Linf:0.001", "Linf:0.02", "Linf:0.06", "L2:0.2", "L1:1"])
def test_fast_doubts_no_honest_gradient(threat: str) -> None:
    """So that no query is spent: with one and with many its images and passes are the same."""
    for number in range(3):
        defense, x = as_defense(Network(number)).eval(), images()
        y, results = predicted(defense, x), []
        for queries in (1, 300):
            with counted(defense) as cost:
                found = run(f"fast,queries={queries}", defense, x, y, ThreatModel.parse(threat))
            results.append((found.x_adv, cost))
        assert torch.equal(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]


@pytest.mark.parametrize("kind", MASKED)
def test_fast_is_no_weaker_than_a_few_steps_on_the_prediction(kind: str) -> None:
    defense, x = as_defense(MASKED[kind]()), images()
    y = predicted(defense.eval(), x)
    standing = [int((predicted(defense, run(name, defense, x, y).x_adv) == y).sum()) for name in ("fast", "pgd-20")]
    assert standing[0] <= standing[1]


@pytest.mark.parametrize("kind", MASKED)
def test_a_view_sees_what_the_defense_does(kind: str) -> None:
    defense, x = as_defense(MASKED[kind]()).eval(), images()
    view = StraightThrough(defense)
    with torch.no_grad():
        assert torch.equal(view(x), defense(x))
        assert torch.equal(view(x.clone().requires_grad_()), defense(x))
        assert torch.equal(Smoothed(defense, 0.0)(x, Draw(0, IDS)), defense(x))
    assert view.members() == defense.members()


STRANGE: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "numpy": (lambda x: torch.from_numpy(x.detach().cpu().numpy().round()), False),
    "numpy's asarray": (lambda x: torch.from_numpy(numpy.asarray(x.detach()).round()), False),
    "detached and written to": (lambda x: x.detach().mul_(1.0), True),
    "detached, without gradient": (lambda x: x.detach().requires_grad_(False) * 1.0, True),
    "compared by name": (lambda x: torch.gt(x, other=torch.tensor(0.5)).float(), True),
    "asked for what only a leaf has": (lambda x: x.detach() if x.detach().is_leaf else 1 / 0, False),
}
"""Steps that are at odds with tensors that keep a gradient, and whether one comes through all the same."""


@pytest.mark.parametrize("kind", STRANGE)
def test_straight_through_survives_what_a_defense_does_with_its_tensors(kind: str) -> None:
    step, passes = STRANGE[kind]
    defense, x = as_defense(Wrapped(before=step)).eval(), images()
    kept, point = x.clone(), x.clone().requires_grad_()
    through = StraightThrough(defense)(point)
    assert torch.equal(through, defense(x))
    assert torch.equal(point.detach(), kept)
    assert bool(image_gradient(through.square().sum(1), point).any()) == passes
    found = run("adaptive,steps=5,queries=20", defense, x, predicted(defense, x))
    assert THREAT.violation(found.x_adv, x) is None


@pytest.mark.parametrize("cast", [torch.Tensor.int, torch.Tensor.long, torch.Tensor.byte, lambda x: x.to(torch.int16)])
def test_straight_through_goes_through_whole_numbers(cast: Callable[[Tensor], Tensor]) -> None:
    x = images().requires_grad_()
    whole = StraightThrough(as_defense(Wrapped(before=lambda at: cast(4 * at).double().float())))
    rounded = StraightThrough(as_defense(Wrapped(before=lambda at: torch.trunc(4 * at))))
    gradients = [torch.autograd.grad(view(x)[:, 0].sum(), x)[0] for view in (whole, rounded)]
    assert gradients[0].any()
    torch.testing.assert_close(*gradients)


def test_straight_through_is_the_identitys_gradient_and_ends_with_the_pass() -> None:
    x = images().requires_grad_()
    plain, rounded = as_defense(Network(0)), as_defense(Wrapped(before=torch.round))
    at = torch.round(images()).requires_grad_()
    (expected,) = torch.autograd.grad(losses.margin(plain(at), predicted(plain, at)).sum(), at)
    (gradient,) = torch.autograd.grad(losses.margin(StraightThrough(rounded)(x), predicted(rounded, x)).sum(), x)
    torch.testing.assert_close(gradient, expected)
    (after,) = torch.autograd.grad(torch.round(x).sum(), x)
    assert not after.any()


def test_a_smoothed_gradient_is_the_wider_landscapes() -> None:
    """Where the ripples' own has nothing to do with it."""
    rippled, x, y = as_defense(Ripples()), images(), torch.zeros_like(IDS)

    def gradient(defense: Defense, draws: int = 1) -> Tensor:
        point = evaluate_point(defense, x, y, lambda z: losses.margin(z, y), examples=IDS, seed=0, numbers=range(draws))
        return point.gradient.flatten(1)

    true = gradient(as_defense(Network(0)))
    own, smoothed = gradient(rippled), gradient(Smoothed(rippled, 0.02), draws=2000)
    assert float(functional.cosine_similarity(own, true).abs().mean()) < 0.2
    assert float(functional.cosine_similarity(smoothed, true).mean()) > 2 * float(functional.cosine_similarity(own, true).abs().mean())


class Rippled(nn.Module):
    """A linear classifier of two classes behind a ripple, of which the worst images are known: its period is half the budget."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        weight = normal(Draw(5, torch.tensor([0])), "linear", (108,))[0] / 108
        self.weight = nn.Parameter(torch.stack([weight, -weight]))
        self.height, self.frequency = slope / 160, 160.0

    def forward(self, x: Tensor) -> Tensor:
        seen = x + self.height * torch.sin(self.frequency * x)
        return (seen - 0.5).flatten(1) @ self.weight.T


COARSE = ThreatModel.parse("Linf:0.08")


def nearest(model: Rippled) -> tuple[Tensor, Tensor]:
    """Return the 12 images (B, C, H, W) of many that lie nearest to the border, and their labels."""
    x = 0.1 + 0.8 * uniform(Draw(2, torch.arange(200)), "images", SHAPE)
    logits = model(x).detach()
    index = (logits[:, 0] - logits[:, 1]).abs().argsort()[:12]
    return x[index], logits[index].argmax(1)


@pytest.mark.parametrize(("slope", "turned"), [(0.0, 0), (0.1, 0), (3.0, 12), (10.0, 12)])
def test_a_gradient_turns_away_where_a_ripple_is_steep(slope: float, turned: int) -> None:
    model = Rippled(slope)
    found = turns_away(as_defense(model).eval(), COARSE, 0, *nearest(model), IDS)
    assert int(found.sum()) == turned


def test_no_random_defense_is_said_to_turn_its_gradient() -> None:
    assert not turns_away(Noisy().eval(), THREAT, 0, images(), torch.zeros_like(IDS), IDS).any()


@pytest.mark.parametrize("name", ["fast,queries=1", "adaptive,queries=1"])
@pytest.mark.parametrize("slope", [3.0, 10.0])
def test_a_ripple_as_wide_as_the_budget_hides_nothing(name: str, slope: float) -> None:
    """Half the budget takes what the linear classifier sees over the border."""
    model = Rippled(slope)
    defense, (x, y) = as_defense(model).eval(), nearest(model)
    gap = model(x).detach().diff(dim=1).abs()
    assert float(gap.max()) < COARSE.epsilon / 2 * float(model.weight.detach().diff(dim=0).abs().sum())
    assert (predicted(defense, run(name, defense, x, y, COARSE).x_adv) != y).all()


def test_smoothing_averages_over_its_draws() -> None:
    """Of a linear function it leaves the mean as it is, of a quadratic one it adds the variance."""

    class Quadratic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(1)
            return torch.stack([flat.mean(1), ((flat - 0.5) ** 2).mean(1)], dim=1)

    defense, x = Smoothed(as_defense(Quadratic()), 0.05), 0.4 + 0.2 * images()
    mean = torch.stack([defense(x, Draw(0, IDS, number)) for number in range(400)]).mean(0)
    torch.testing.assert_close(mean - defense.defense(x), torch.tensor([0.0, 0.0025]).expand(12, 2), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="needs a draw"):
        defense(x)


def test_the_mean_of_logits_is_attacked_only_where_it_is_not_the_prediction() -> None:
    networks, x = [Network(0), Network(1), Network(2)], images()
    passes = []
    for aggregator in (mean_of_logits, crossmax):
        defense = Ensemble(networks, aggregator)
        with counted(defense) as cost:
            run("adaptive,steps=3,queries=1,targets=1", defense, x, predicted(defense.eval(), x), ThreatModel.parse("Linf:0.0001"))
        with counted(defense) as first:
            run("fast,queries=1", defense, x, predicted(defense, x), ThreatModel.parse("Linf:0.0001"))
        passes.append(cost.backwards - first.backwards)
    assert passes[1] - passes[0] == 3 * 3 * len(x)
