"""The weights of MORA are the derivative that they should be, and its loss prefers what moves the ensemble."""

import pytest
import torch
from torch import Tensor, nn

from robench import attacks, data
from robench.aggregate import Aggregator, crossmax, majority_vote, mean_of_logits, mean_of_probabilities
from robench.attacks.reweighing import reweighed, weights
from robench.data import as_float
from robench.defense import Ensemble
from robench.noise import Draw, normal
from robench.threat import ThreatModel

IDS = torch.arange(20)
Y = IDS % 6


def logits() -> Tensor:
    return 3 * normal(Draw(0, IDS), "logits", (4, 6))


def test_weights_are_the_derivative_of_the_ensembles_log_ratio() -> None:
    shown = logits().double().requires_grad_()
    mean = shown.softmax(-1).mean(1)
    wrong = mean.detach().scatter(1, Y[:, None], -1).argmax(1)
    ratio = mean.gather(1, wrong[:, None]).log() - mean.gather(1, Y[:, None]).log()
    (slope,) = torch.autograd.grad(ratio.sum(), shown)
    expected = 4 * slope.gather(2, wrong[:, None, None].expand(-1, 4, 1))[..., 0]
    torch.testing.assert_close(weights(logits(), Y).double(), expected, rtol=1e-4, atol=1e-6)
    assert (weights(logits(), Y) >= 0).all()


def test_saturated_members_leave_the_loss_and_its_gradient_finite() -> None:
    shown = (1e4 * logits()).requires_grad_()
    loss = reweighed(shown, Y, mean_of_probabilities, 1.0)
    (slope,) = torch.autograd.grad(loss.sum(), shown)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(slope).all()
    assert slope.flatten(1).any(1).all()


@pytest.mark.parametrize(("aggregate", "takes_part"), [(majority_vote, False), (crossmax, False), (mean_of_logits, True)])
def test_a_fooled_member_counts_only_in_a_mean_of_logits(aggregate: object, takes_part: bool) -> None:
    shown = torch.tensor([[[2.0, 0.5, 0.0], [1.5, 1.0, 0.0], [0.0, 1.0, -1.0]]]).requires_grad_()
    (slope,) = torch.autograd.grad(reweighed(shown, torch.tensor([0]), aggregate, 1.0).sum(), shown)  # type: ignore[arg-type]
    moved = slope[0].abs().sum(1) > 0
    assert moved.tolist() == [True, True, takes_part]


def test_where_no_member_stands_all_count() -> None:
    shown = logits()[:1].requires_grad_()
    fooled_everywhere = shown.detach().argmin(-1)[0, :1]
    assert not (shown.argmax(-1) == fooled_everywhere).any()
    (slope,) = torch.autograd.grad(reweighed(shown, fooled_everywhere, majority_vote, 1.0).sum(), shown)
    assert (slope[0].abs().sum(1) > 0).all()


def test_without_a_share_it_is_the_mean_of_logits() -> None:
    shown = logits().requires_grad_()
    loss = reweighed(shown, Y, mean_of_logits, 0.0)
    mean = mean_of_logits(logits())
    scaled = 4 * mean / mean.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(scaled, Y, reduction="none"))


@pytest.mark.parametrize(
    ("aggregate", "members"),
    [*((aggregate, 2) for aggregate in (mean_of_probabilities, majority_vote, crossmax)), (mean_of_probabilities, 1), (majority_vote, 1)],
)
def test_adaptive_counts_what_reweighing_finds_in_ensembles_only(networks: list[nn.Module], aggregate: Aggregator, members: int) -> None:
    split = data.load("digits", "test").first(6)
    found = attacks.parse("adaptive,steps=3,queries=1,targets=1").run(
        Ensemble(networks[:members], aggregate).eval(),
        as_float(split.images),
        split.labels,
        ThreatModel.parse("Linf:4/255"),
        examples=torch.arange(6),
        seed=0,
    )
    names = [name for name in found.stages if "reweighed" in name]
    assert names == (["members reweighed, share 0.5", "members reweighed, share 1"] if members > 1 else [])
