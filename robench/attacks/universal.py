"""A universal perturbation: one for all images (Moosavi-Dezfooli et al., arXiv 1610.08401), by ascent as in arXiv 1811.11304, Algorithm 2.

It is fitted on training images and scored on the images under attack.
"""

import torch
from torch import Tensor

from robench.attacks.objective import Guide, evaluate_point
from robench.attacks.registry import register
from robench.attacks.steps import steepest
from robench.attacks.transfer import mean_surrogate
from robench.defense import Defense
from robench.errors import UserError
from robench.losses import cross_entropy
from robench.noise import Draw
from robench.threat import ThreatModel

CLIP = 9.0
"""An example's loss counts up to here, so that few examples cannot drive the perturbation (arXiv 1811.11304, section 4)."""


def add(x: Tensor, threat: ThreatModel, perturbation: Tensor) -> Tensor:
    """Return images (B, C, H, W) with the perturbation (C, H, W), each projected into its threat model."""
    return threat.project(x + perturbation.to(x), x)


@register("universal", version=1, paper="arXiv 1610.08401, 1811.11304", apply=add)
def universal(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seed: int,
    steps: int = 500,
    images: int = 1000,
    batch: int = 100,
    target: int = -1,
    member: int = -1,
    heads: bool = False,
) -> Tensor:
    """Return the perturbation (C, H, W), in the ball of the threat model, that raises the mean loss on training images the most.

    Args:
        defense: in evaluation mode.
        x: training images (N, C, H, W) in [0, 1].
        y: their labels.
        threat: the threat model.
        seed: of a random defense's draws; every step takes the next.
        steps: of steepest ascent, each on the next batch, their size falling from a fifth of the budget to nothing.
        images: how many training images are used, all where there are fewer.
        batch: images of a step.
        target: the class to lead all images to; -1 for none.
        member: the predictor to fool, counted from 0; -1 for the prediction.
        heads: whether every predictor is fooled at once, by the mean of their losses; those within a nested defense in its place.

    Raises:
        UserError: for a target or member that does not exist, or both a member and heads.
    """
    x, y = x[:images], y[:images]
    if member >= 0 and heads:
        raise UserError("attack 'universal': member and heads exclude each other")
    with torch.no_grad():
        first = defense.predictors(x[:1], Draw(seed, torch.arange(1, device=x.device)) if defense.random else None)
    if not -1 <= target < first.shape[2]:
        raise UserError(f"attack 'universal': target must be a class from 0 to {first.shape[2] - 1}, or -1 for none, not {target}")
    if not -1 <= member < first.shape[1]:
        raise UserError(f"attack 'universal': member must be from 0 to {first.shape[1] - 1}, or -1 for the prediction, not {member}")
    if heads:
        # The surrogate has the innermost predictors; what the guide lets the objective see is all that counts of it.
        defense = mean_surrogate(defense)
    guide: Guide | None = None
    if heads or member >= 0:
        guide = lambda predictors: predictors if heads else predictors[:, member : member + 1]  # noqa: E731
    delta = torch.zeros_like(x[0])
    for step in range(steps):
        rows = torch.arange(step * batch, (step + 1) * batch, device=x.device) % len(x)
        labels = y[rows] if target < 0 else torch.full_like(y[rows], target)

        def objective(seen: Tensor, labels: Tensor = labels) -> Tensor:
            each = seen.unsqueeze(1) if seen.ndim == 2 else seen
            losses = cross_entropy(each.flatten(0, 1).float(), labels.repeat_interleave(each.shape[1]))
            return losses.clamp(max=CLIP).reshape(len(labels), -1).mean(1) if target < 0 else -losses.reshape(len(labels), -1).mean(1)

        # The box acts on each image by itself; the gradient passes where it does not hold a value.
        at = x[rows] + delta
        point = evaluate_point(
            defense, at.clamp(0, 1), labels, objective, examples=rows, seed=seed, numbers=range(step, step + 1), guide=guide
        )
        inside = (at >= 0) & (at <= 1)
        gradient = (point.gradient * inside).mean(0, keepdim=True)
        size = 0.2 * threat.epsilon * (1 - step / steps)
        delta = _in_ball(delta + size * steepest(gradient, threat.norm)[0], threat)
    return delta


def _in_ball(delta: Tensor, threat: ThreatModel) -> Tensor:
    """Return the perturbation (C, H, W) scaled, or for Linf clipped, to the budget; L1 in the same simple way as L2."""
    if threat.norm == "Linf":
        return delta.clamp(-threat.epsilon, threat.epsilon)
    size = threat.size(delta[None])[0].to(delta)
    return delta * (threat.epsilon / size.clamp(min=1e-30)).clamp(max=1)
