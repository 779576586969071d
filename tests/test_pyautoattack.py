"""The adapter to pyautoattack: the same results as a direct call, and nothing of the process changed by it."""

import logging
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from robench import attacks
from robench.aggregate import mean_of_logits
from robench.defense import Defense, FreshDraws, as_defense
from robench.errors import UserError
from robench.noise import Draw, isolated_generator, normal
from robench.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("error")


def digits() -> tuple[Tensor, Tensor]:
    """Return all digits as images (1797, 3, 8, 8) in [0, 1] and their labels."""
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)
    return images[:, None].repeat(1, 3, 1, 1), torch.tensor(data.target, dtype=torch.int64)


@pytest.fixture(scope="module")
def trained() -> Defense:
    """A small network trained on all digits but the last 297, in a few seconds."""
    images, labels = (part[:1500] for part in digits())
    with isolated_generator(0):
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, 48), nn.ReLU(), nn.Linear(48, 10))
        optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
        for _ in range(150):
            noisy = (images + 0.1 * torch.randn_like(images)).clamp(0, 1)
            optimiser.zero_grad(set_to_none=True)
            functional.cross_entropy(network(noisy), labels).backward()
            optimiser.step()
    for parameter in network.parameters():
        parameter.grad = None
    return as_defense(network).eval()


def held_out(count: int) -> tuple[Tensor, Tensor, Tensor]:
    images, labels = digits()
    return images[-count:], labels[-count:], torch.arange(len(images) - count, len(images))


def direct(defense: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int, batch_size: int, **settings: Any) -> Tensor:
    """Call pyautoattack as its documentation says."""
    from pyautoattack import AutoAttack

    with torch.random.fork_rng(devices=[]):
        attack = AutoAttack(defense, norm=threat.norm, eps=threat.epsilon, seed=seed, device="cpu", **settings)
        return attack.run_standard_evaluation(x, y, batch_size=batch_size)[0]


def fooled(defense: Defense, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return defense(x).argmax(1) != y


@pytest.mark.slow
@pytest.mark.parametrize("text", ["Linf:0.08", "L2:0.6", "L1:3"])
def test_the_adapter_equals_a_direct_call(trained: Defense, text: str) -> None:
    (x, y, examples), threat = held_out(8), ThreatModel.parse(text)
    ours = attacks.parse("pyautoattack,batch_size=5")(trained, x, y, threat, examples=examples, seed=3)
    theirs = direct(trained, x, y, threat, 3, 5, version="standard")
    assert torch.equal(ours, theirs)
    assert threat.violation(ours, x) is None
    assert 0 < int(fooled(trained, ours, y).sum()) < 8


def test_the_adapter_equals_a_direct_call_of_rand() -> None:
    """For a random defense too: each pass takes the next draw, in the same order."""

    class Noisy(Defense):
        random = True

        def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
            assert draw is not None
            return (x + 0.1 * normal(draw, "noise", tuple(x.shape[1:]))).flatten(2)

        def aggregate(self, logits: Tensor) -> Tensor:
            return mean_of_logits(logits)

        def members(self) -> list[nn.Module]:
            return [self]

    x, threat = torch.rand(4, 2, 1, 4, generator=torch.Generator().manual_seed(0)), ThreatModel.parse("Linf:0.2")
    y = x.flatten(2).mean(1).argmax(1)
    defense = Noisy().eval()
    ours = attacks.parse("pyautoattack-rand,batch_size=4")(defense, x, y, threat, examples=torch.arange(4), seed=8)
    assert torch.equal(ours, direct(FreshDraws(defense, 8), x, y, threat, 8, 4, version="rand"))
    assert not torch.equal(ours, x)


@pytest.mark.parametrize(("name", "text"), [
    ("apgd-ce", "Linf:0.08"), ("apgd-ce", "L2:0.6"), ("apgd-ce", "L1:3"),
    ("apgd-dlr", "Linf:0.08"), ("apgd-dlr", "L2:0.6"), ("apgd-t", "Linf:0.08"), ("apgd-t", "L2:0.6"),
])  # fmt: skip
def test_our_apgd_leaves_as_many_robust_as_the_reference(trained: Defense, name: str, text: str) -> None:
    (x, y, examples), threat = held_out(64), ThreatModel.parse(text)
    restarts = 1 if name == "apgd-t" else 5
    ours = attacks.parse(f"{name},restarts={restarts}")(trained, x, y, threat, examples=examples, seed=0)
    theirs = direct(trained, x, y, threat, 0, 64, version="custom", attacks=[name])
    assert threat.violation(ours, x) is None
    ours_fooled, theirs_fooled = fooled(trained, ours, y), fooled(trained, theirs, y)
    assert 10 < int(theirs_fooled.sum()) < 54
    assert int((ours_fooled != theirs_fooled).sum()) <= 1


def test_undoes_what_it_does_to_the_process(trained: Defense, caplog: pytest.LogCaptureFixture) -> None:
    from pyautoattack import checks

    x, y, examples = held_out(2)
    calls = []

    def trace(frame: FrameType, event: str, _argument: object) -> Callable[..., Any] | None:
        calls.append((frame.f_code.co_name, event))
        return None

    check, counts, before = checks.check_dynamic, dict(checks.funcs), sys.gettrace()
    logger, state = logging.getLogger("auto-attack"), torch.get_rng_state()
    sys.settrace(trace)
    try:
        with caplog.at_level(logging.DEBUG):
            # Out of reach of any model: all points fall at once.
            attacks.parse("pyautoattack")(trained, x, y, ThreatModel.parse("Linf:1"), examples=examples, seed=0)
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after is trace
    assert ("run_standard_evaluation", "call") in calls
    assert checks.check_dynamic is check
    assert checks.funcs == counts
    assert not caplog.records
    assert not logger.disabled
    assert torch.equal(torch.get_rng_state(), state)


def test_takes_channels_last_images_and_gives_the_same(trained: Defense) -> None:
    x, y, examples = held_out(3)
    attack, threat = attacks.parse("pyautoattack-rand"), ThreatModel.parse("Linf:0.3")
    plain = attack(trained, x, y, threat, examples=examples, seed=0)
    last = attack(trained, x.to(memory_format=torch.channels_last), y, threat, examples=examples, seed=0)
    assert torch.equal(plain, last)


def test_refuses_images_on_which_square_fails() -> None:
    attack, defense = attacks.parse("pyautoattack"), as_defense(nn.Flatten())
    x, zero = torch.ones(1, 1, 4, 4), torch.tensor([0])
    for text in ("L2:1", "L1:1"):
        with pytest.raises(UserError, match="at least 5 pixels high"):
            attack(defense, x, zero, ThreatModel.parse(text), examples=zero, seed=0)


def test_an_image_moved_out_of_the_budget_is_projected_back() -> None:
    """On images of one value the reference's L1 projection returns points far outside."""

    class Ramp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) * torch.tensor([4.0, 1.0, 0.5, 0.2]) + torch.tensor([0.0, 1.0, 0.5, 0.2])

    x, y, threat = torch.ones(8, 1, 1, 1), torch.zeros(8, dtype=torch.int64), ThreatModel.parse("L1:0.03")
    assert "in L1; the budget is" in str(threat.violation(direct(Ramp(), x, y, threat, 0, 8, version="rand"), x))
    ours = attacks.parse("pyautoattack-rand")(as_defense(Ramp()).eval(), x, y, threat, examples=torch.arange(8), seed=0)
    assert threat.violation(ours, x) is None


def test_restores_the_process_after_an_error(trained: Defense) -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 1:
                raise RuntimeError("broken")
            return x.flatten(1) * self.weight

    model, (x, y, examples), state = Breaks(), held_out(2), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        attacks.parse("pyautoattack")(as_defense(model).eval(), x, y, ThreatModel.parse("Linf:0.1"), examples=examples, seed=0)
    assert model.weight.requires_grad
    assert not logging.getLogger("auto-attack").disabled
    assert torch.equal(torch.get_rng_state(), state)
