"""AutoAttack on our own attacks: the stages, what each counts, and that it leaves as many robust as the reference."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import robench
from robench import attacks, losses
from robench.aggregate import majority_vote, mean_of_logits
from robench.attacks.autoattack import FIRST_JUDGING_DRAW
from robench.attacks.objective import evaluate_point
from robench.cost import counted
from robench.defense import Defense, Ensemble, as_defense
from robench.noise import Draw, isolated_generator, normal, uniform
from robench.threat import ThreatModel

QUICK = "autoattack,steps=10,queries=60"
LINF = ThreatModel.parse("Linf:0.02")


class Network(nn.Module):
    """A random network of two layers, for images (B, 3, 4, 4)."""

    def __init__(self, classes: int = 5, number: int = 0) -> None:
        super().__init__()
        draw = Draw(3, torch.tensor([0]), number)
        self.first = nn.Parameter(normal(draw, "first", (48, 16))[0] / 3)
        self.second = nn.Parameter(normal(draw, "second", (16, classes))[0])
        self.trainable: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.trainable |= {parameter.requires_grad for parameter in self.parameters()}
        return torch.tanh((x - 0.5).flatten(1) @ self.first) @ self.second


class Noisy(Defense):
    """The network on the image with Gaussian noise."""

    random = True

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        assert draw is not None
        return self.network(x + 0.2 * normal(draw, "noise", (3, 4, 4)))[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return mean_of_logits(logits)

    def members(self) -> list[nn.Module]:
        return [self.network]


def predicted(defense: Defense, x: Tensor) -> Tensor:
    with torch.no_grad():
        return defense(x).argmax(1)


def labelled(defense: Defense, count: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, what the defense predicts, made wrong in the third, and identities."""
    examples = torch.arange(count)
    x = uniform(Draw(1, examples), "images", (3, 4, 4))
    y = predicted(defense, x)
    y[2] = (y[2] + 1) % 2
    return x, y, examples


def test_the_stages_share_out_what_is_fooled_in_their_order() -> None:
    """The first stage fools what APGD-CE alone does; an example misclassified as it is counts for none."""
    defense = as_defense(Network()).eval()
    x, y, examples = labelled(defense)
    found = attacks.parse(QUICK).run(defense, x, y, LINF, examples=examples, seed=0)
    assert list(found.stages) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    fooled, clean = predicted(defense, found.x_adv) != y, predicted(defense, x) == y
    assert torch.equal(torch.stack(list(found.stages.values())).sum(0), (fooled & clean).long())
    alone = attacks.parse("apgd-ce,steps=10")(defense, x, y, LINF, examples=examples, seed=0)
    first = found.stages["apgd-ce"]
    assert torch.equal(first, (predicted(defense, alone) != y) & clean)
    assert torch.equal(found.x_adv[first], alone[first])
    assert 0 < int(first.sum()) < 11
    assert LINF.violation(found.x_adv, x) is None


def test_a_stage_sees_only_what_those_before_it_did_not_fool() -> None:
    """Out of reach, all stages; within easy reach, none but the first: an example costs one pass for each look and stage."""
    defense = as_defense(Network()).eval()
    x, y, examples = labelled(defense)
    with counted(defense) as cost:
        found = attacks.parse(QUICK).run(defense, x, y, ThreatModel.parse("Linf:1e-6"), examples=examples, seed=0)
    assert not any(bool(first.any()) for first in found.stages.values())
    stages = (1 + 12) + (1 + 4 * 12) + (1 + 4 * 12) + (1 + 61 + 1)
    assert cost.forwards == 1 + 12 + 11 * (stages + 4)
    assert cost.backwards == 11 * 10 * 9
    found = attacks.parse(QUICK).run(defense, x, y, ThreatModel.parse("Linf:0.5"), examples=examples, seed=0)
    assert [int(first.sum()) for first in found.stages.values()] == [11, 0, 0, 0]


@pytest.mark.parametrize("name", [QUICK, "autoattack-rand,steps=5,draws=2"])
@pytest.mark.parametrize("kind", [lambda: as_defense(Network()), Noisy])
def test_parameters_take_no_gradient_during_the_attack(name: str, kind: type[Defense]) -> None:
    defense = kind().eval()
    examples, network = torch.arange(5), defense.members()[0]
    x, parameters = uniform(Draw(1, examples), "images", (3, 4, 4)), list(network.parameters())
    assert isinstance(network, Network)
    y = predicted(as_defense(network), x)
    attacks.parse(name)(defense, x, y, LINF, examples=examples, seed=0)
    assert network.trainable == {False}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize(("classes", "stages", "rand"), [
    (2, ["apgd-ce", "fab-t", "square"], ["apgd-ce"]),
    (3, ["apgd-ce", "apgd-dlr", "fab-t", "square"], ["apgd-ce", "apgd-dlr"]),
    (4, ["apgd-ce", "apgd-t", "fab-t", "square"], ["apgd-ce", "apgd-dlr"]),
])  # fmt: skip
@pytest.mark.parametrize("text", ["Linf:0", "Linf:0.1", "L1:1"])
def test_stages_that_too_few_classes_leave_undefined_are_left_out(classes: int, stages: list[str], rand: list[str], text: str) -> None:
    defense = as_defense(Network(classes)).eval()
    x, y, examples = labelled(defense, 4)
    for name, expected in ((QUICK, stages), ("autoattack-rand,steps=5", rand)):
        found = attacks.parse(name).run(defense, x, y, ThreatModel.parse(text), examples=examples, seed=0)
        assert list(found.stages) == expected
        if text == "Linf:0":
            assert torch.equal(found.x_adv, x)
            assert not any(bool(first.any()) for first in found.stages.values())


def test_square_goes_on_where_there_is_no_gradient() -> None:
    voters = Ensemble([Network(5, number) for number in range(3)], majority_vote).eval()
    x, y, examples = labelled(voters)
    found = attacks.parse("autoattack,steps=5,queries=300").run(voters, x, y, ThreatModel.parse("Linf:0.15"), examples=examples, seed=0)
    assert int(found.stages["square"].sum()) > 0
    assert int(found.stages["fab-t"].sum()) == 0


def test_a_random_defense_keeps_the_image_of_highest_mean_loss_over_common_draws() -> None:
    defense = Noisy().eval()
    x, examples = uniform(Draw(1, torch.arange(8)), "images", (3, 4, 4)), torch.arange(8)
    y = predicted(as_defense(defense.network), x)

    def mean_loss(at: Tensor) -> Tensor:
        numbers = range(FIRST_JUDGING_DRAW, FIRST_JUDGING_DRAW + 10)
        point = evaluate_point(
            defense, at, y, lambda logits: losses.cross_entropy(logits, y), examples=examples, seed=0, numbers=numbers, gradient=False
        )
        return point.loss

    settings = ",steps=8,draws=3"
    found, *parts = (
        attacks.parse(name + settings)(defense, x, y, LINF, examples=examples, seed=0)
        for name in ("autoattack-rand", "apgd-ce", "apgd-dlr")
    )
    torch.testing.assert_close(mean_loss(found), torch.stack([mean_loss(part) for part in [x, *parts]]).amax(0))
    with counted(defense) as cost:
        attacks.parse(f"autoattack-rand{settings}")(defense, x, (y + 1) % 5, LINF, examples=examples, seed=0)
    # Misclassified as they are, and attacked to the end all the same; nine steps and their judge, and a look after each.
    assert cost.forwards == 1 + 8 * (10 + 2 * (3 * (1 + 9 + 1) + 10))


def test_a_record_keeps_the_counts_of_the_stages() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).mean(1)[:, :10] * 10

    record = robench.evaluate(Mean(), dataset="digits", threat="Linf:0.05", attack="autoattack,steps=3,queries=10", n=20, batch_size=8)
    assert list(record.stages) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    fooled = sum(record.outcomes.clean) - sum(record.outcomes.robust)
    assert sum(record.stages.values()) == fooled
    assert record.attack.version == 2


def digits() -> tuple[Tensor, Tensor]:
    """Return all digits as images (1797, 1, 8, 8) in [0, 1] and their labels."""
    data = load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target, dtype=torch.int64)


@pytest.fixture(scope="module")
def trained() -> Defense:
    """A small convolutional network trained on all digits but the last 297, against one step of noise and gradient sign."""
    images, labels = (part[:1500] for part in digits())
    with isolated_generator(0):
        network = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(256, 10),
        )  # fmt: skip
        optimiser = torch.optim.Adam(network.parameters(), lr=0.005)
        for _ in range(200):
            chosen = torch.randint(0, 1500, (128,))
            x, y = images[chosen], labels[chosen]
            moved = (x + 0.1 * (2 * torch.rand_like(x) - 1)).requires_grad_()
            (gradient,) = torch.autograd.grad(functional.cross_entropy(network(moved), y), moved)
            moved = (x + (moved.detach() + 0.1 * gradient.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)
            optimiser.zero_grad(set_to_none=True)
            functional.cross_entropy(network(moved), y).backward()
            optimiser.step()
    for parameter in network.parameters():
        parameter.grad = None
    return as_defense(network).eval()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["Linf:0.1", "L2:0.6", "L1:2"])
def test_leaves_as_many_robust_as_the_reference(trained: Defense, text: str) -> None:
    images, labels = digits()
    x, y, examples, threat = images[-100:], labels[-100:], torch.arange(100), ThreatModel.parse(text)
    ours, theirs = (attacks.parse(name)(trained, x, y, threat, examples=examples, seed=0) for name in ("autoattack", "pyautoattack"))
    assert threat.violation(ours, x) is None
    counts = [int((predicted(trained, at) == y).sum()) for at in (ours, theirs)]
    assert 10 < counts[1] < 90
    assert abs(counts[0] - counts[1]) <= 1
