"""When examples that are done leave the batch changes what an attack costs, not what it finds."""

import pytest
import torch
from torch import Tensor, nn

from robench import attacks, noise
from robench.aggregate import mean_of_logits
from robench.attacks import packing
from robench.cost import counted
from robench.defense import Ensemble
from robench.threat import ThreatModel

COUNT = 24


@pytest.fixture(scope="module")
def defense() -> Ensemble:
    with noise.isolated_generator(0):
        return Ensemble([nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 5))], mean_of_logits).eval()


def attacked(defense: Ensemble, attack: str, threat: str) -> tuple[Tensor, Tensor, int]:
    x = noise.uniform(noise.Draw(0, torch.arange(COUNT)), "images", (3, 4, 4))
    y = defense(x).argmax(1)
    with counted(defense) as cost:
        x_adv = attacks.parse(attack)(defense, x, y, ThreatModel.parse(threat), examples=torch.arange(COUNT), seed=0)
    return x_adv, defense(x_adv).argmax(1) == y, cost.forwards


@pytest.mark.parametrize("threat", ["Linf:0.08", "L2:0.3", "L1:1"])
@pytest.mark.parametrize(
    "attack", ["apgd-ce,steps=35", "apgd-t,steps=35,targets=3", "square,queries=100", "autoattack,steps=20,queries=60"]
)
def test_seldom_looks_find_the_same(defense: Ensemble, attack: str, threat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = attacked(defense, attack, threat)
    assert 0 < int(at_once[1].sum()) < COUNT, "some fall and some stand"
    monkeypatch.setattr(packing, "LOOKS", {"cpu": packing.LOOKS["cuda"]})
    monkeypatch.setattr(packing, "SHARES", {"cpu": packing.SHARES["cuda"]})
    seldom = attacked(defense, attack, threat)
    assert torch.equal(at_once[1], seldom[1])
    assert torch.allclose(at_once[0], seldom[0], atol=1e-6)
    assert at_once[2] < seldom[2]


def test_those_done_leave_a_cpu_at_once_and_a_gpu_when_half_are() -> None:
    done = torch.tensor([True, False, False])
    assert packing.leaving(~done | done, 3).tolist() == [False] * 3  # type: ignore[union-attr]
    assert packing.leaving(done, 3).tolist() == [False, True, True]  # type: ignore[union-attr]
    assert packing.leaving(done & ~done, 3) is None


def test_a_gpu_is_asked_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LOOKS", {"cpu": 10})
    monkeypatch.setattr(packing, "SHARES", {"cpu": 0.5})
    third, half = torch.tensor([True, False, False, False]), torch.tensor([True, True, False, False])
    assert packing.leaving(half, 9) is None
    assert packing.leaving(third, 10) is None
    assert packing.leaving(half, 10).tolist() == [False, False, True, True]  # type: ignore[union-attr]
