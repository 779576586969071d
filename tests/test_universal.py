"""The universal perturbation where the best one is known, and its way through an evaluation."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench import attacks, data, noise, provenance, targets
from robench.aggregate import majority_vote, mean_of_logits
from robench.attacks import Attack
from robench.attacks.universal import add
from robench.defense import Defense, Ensemble
from robench.errors import UserError
from robench.evaluation import measure
from robench.noise import Draw, normal
from robench.record import Record
from robench.threat import ThreatModel

SHAPE = (3, 4, 4)
SIZE = 48
IDS = torch.arange(30)


class Linear(nn.Module):
    """Three classes with fixed weights; the gradient of a loss on class 0 is the same for all images up to its size."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.direction = nn.Parameter(normal(Draw(0, torch.tensor([number])), "direction", (SIZE,))[0] / SIZE)

    def forward(self, x: Tensor) -> Tensor:
        score = (x - 0.5).flatten(1) @ self.direction
        return torch.stack([-score, score, torch.full_like(score, -30.0)], dim=1)


def images() -> Tensor:
    """Return images far from the edges of the box."""
    return 0.4 + 0.2 * noise.uniform(Draw(1, IDS), "images", SHAPE)


def fit(text: str, defense: Defense, threat: ThreatModel, y: Tensor | None = None) -> Attack:
    return attacks.parse(text).fitted(defense.eval(), images(), torch.zeros_like(IDS) if y is None else y, threat, seed=0)


@pytest.mark.parametrize(("text", "dual"), [("Linf:0.1", 1), ("L2:0.5", 2), ("L1:0.5", float("inf"))])
def test_it_is_the_dual_direction_of_a_linear_model(text: str, dual: float) -> None:
    network, threat = Linear(), ThreatModel.parse(text)
    attack = fit("universal,steps=200", Ensemble([network], mean_of_logits), threat)
    assert attack.learnt is not None
    direction = network.direction.detach()
    gain, best = float(attack.learnt.flatten() @ direction), threat.epsilon * float(direction.norm(p=dual))
    # A step of L1 raises several values at once, of which the heaviest alone would be best.
    assert 0.99 * best * (0.75 if threat.norm == "L1" else 1) < gain <= best * (1 + 1e-5)


def test_every_image_takes_the_same_perturbation_as_far_as_the_box_lets_it() -> None:
    threat, defense = ThreatModel.parse("Linf:0.1"), Ensemble([Linear()], mean_of_logits)
    attack = fit("universal,steps=20", defense, threat)
    assert attack.learnt is not None
    x = (1.5 * noise.uniform(Draw(2, IDS), "others", SHAPE) - 0.25).clamp(0, 1)
    x_adv = attack(defense, x, torch.zeros_like(IDS), threat, examples=IDS, seed=0)
    torch.testing.assert_close(x_adv, (x + attack.learnt).clamp(0, 1))
    assert threat.violation(x_adv, x) is None


def test_a_target_class_draws_images_of_every_class_to_it() -> None:
    defense, threat = Ensemble([Linear()], mean_of_logits), ThreatModel.parse("Linf:0.3")
    for target in (0, 1):
        attack = fit(f"universal,steps=50,target={target}", defense, threat, y=IDS % 3)
        x_adv = attack(defense, images(), IDS % 3, threat, examples=IDS, seed=0)
        assert (defense(x_adv).argmax(1) == target).all()


def test_a_member_is_fooled_alone_and_heads_together() -> None:
    networks, threat = [Linear(0), Linear(1)], ThreatModel.parse("Linf:0.1")
    defense = Ensemble(networks, mean_of_logits)
    learnt: dict[str, Tensor] = {}
    for setting in ("member=0", "member=1", "heads=true"):
        delta = fit(f"universal,steps=200,{setting}", defense, threat).learnt
        assert delta is not None
        learnt[setting] = torch.stack([delta.flatten() @ network.direction for network in networks]).detach()
    assert learnt["member=0"][0] > learnt["heads=true"][0] > learnt["member=1"][0]
    assert learnt["member=1"][1] > learnt["heads=true"][1] > learnt["member=0"][1]
    assert (learnt["heads=true"] > 0).all()


def test_heads_are_all_that_a_nested_ensemble_has_within() -> None:
    """Two pairs and a network alone count as five networks; the pairs' votes have no gradient to give."""
    threat, networks = ThreatModel.parse("Linf:0.1"), [Linear(number) for number in range(5)]
    pairs = [Ensemble(networks[:2], majority_vote), Ensemble(networks[2:4], majority_vote)]
    nested, flat = Ensemble([*pairs, networks[4]], mean_of_logits), Ensemble(networks, mean_of_logits)
    learnt, expected = (fit("universal,steps=50,heads=true", defense, threat).learnt for defense in (nested, flat))
    assert learnt is not None
    assert expected is not None
    assert torch.equal(learnt, expected)


@pytest.mark.parametrize(("settings", "says"), [
    ("target=3", "a class from 0 to 2"), ("target=-2", "a class from 0 to 2"),
    ("member=1", "from 0 to 0"), ("member=0,heads=true", "exclude"),
])  # fmt: skip
def test_what_does_not_exist_is_refused(settings: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        fit(f"universal,{settings}", Ensemble([Linear()], mean_of_logits), ThreatModel.parse("Linf:0.1"))


def test_it_has_to_be_fitted_first() -> None:
    with pytest.raises(UserError, match="fitted on training images first"):
        attacks.parse("universal")(
            Ensemble([Linear()], mean_of_logits), images(), 0 * IDS, ThreatModel.parse("Linf:0.1"), examples=IDS, seed=0
        )


class Digits(nn.Module):
    """A linear classifier of digits: the nearest class mean of some training images."""

    def __init__(self) -> None:
        super().__init__()
        train = data.load("digits", "train").first(500)
        x = data.as_float(train.images).flatten(1)
        means = torch.stack([x[train.labels == c].mean(0) for c in range(10)])
        self.weight, self.bias = nn.Parameter(10 * means), nn.Parameter(-5 * (means**2).sum(1))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def test_an_evaluation_fits_on_training_images_and_counts_what_that_costs() -> None:
    settings: dict[str, Any] = {"threat": ThreatModel.parse("Linf:64/255"), "attack": attacks.parse("universal,steps=40,images=300")}
    target, test = targets.of_module(Digits()), data.load("digits", "test").first(100)
    made = measure(target, test, **settings)
    assert made.robust_accuracy.value < made.clean_accuracy.value - 0.2
    assert (made.cost.forwards, made.cost.backwards) == (40.0 + 0.01, 40.0)
    assert made.attack.parameters == {"steps": 40, "images": 300, "batch": 100, "target": -1, "member": -1, "heads": False}
    smaller = measure(target, test, **settings, batch_size=7)
    assert smaller.outcomes == made.outcomes


def test_the_time_that_learning_takes_is_the_attacks() -> None:
    """The record's, and that of a budget of time."""

    def slow(defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, *, seed: int, **_: Any) -> Tensor:
        time.sleep(0.5)
        return torch.zeros_like(x[0])

    attack, test = Attack("slow", 1, {"images": 10}, slow, apply=add), data.load("digits", "test").first(20)

    def run(budget: float | None) -> Record:
        threat = ThreatModel.parse("Linf:8/255")
        return measure(targets.of_module(Digits()), test, threat, attack, batch_size=10, max_seconds=budget)

    assert 0.5 <= run(None).timing.seconds < 60
    stopped, ample = run(0.5), run(60.0)
    assert stopped.dataset.n == 10
    assert stopped.partial is not None
    assert (ample.dataset.n, ample.partial) == (20, None)


def test_what_learnt_is_part_of_what_made_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that attacks nothing itself, since chunks are kept, has still learnt the perturbation and spent the time on it."""
    threat, attack, test = ThreatModel.parse("Linf:8/255"), attacks.parse("universal,steps=2"), data.load("digits", "test").first(20)
    made = measure(targets.of_module(Digits()), test, threat, attack, cache=tmp_path)
    assert made.other_provenance == []
    later = made.provenance.model_copy(update={"processor": "another processor"})
    monkeypatch.setattr(provenance, "of_this_process", lambda _device: later)
    again = measure(targets.of_module(Digits()), test, threat, attack, cache=tmp_path)
    assert sorted(p.processor for p in (again.provenance, *again.other_provenance)) == sorted(
        p.processor for p in (made.provenance, later)
    )  # fmt: skip
    assert again.outcomes == made.outcomes


def test_a_data_set_without_training_images_is_an_error_of_one_line() -> None:
    own = data.from_tensors(torch.rand(5, 3, 16, 16), torch.arange(5), 10, "own")
    with pytest.raises(UserError, match="own"):
        measure(targets.of_module(Digits()), own, ThreatModel.parse("Linf:0.1"), attacks.parse("universal"))
