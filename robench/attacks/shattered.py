"""Shattered gradients: where the image's gradient is that of a ripple, and the defense smoothed, whose gradient is not.

A ripple that a defense adds, finely or coarsely, turns the gradient many times within the budget (Athalye et al., arXiv 1802.00420,
section 3.1); the mean over noise as wide as the ripple has the gradient of what lies beneath.
"""

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional

from robench.attacks.objective import image_gradient
from robench.attacks.views import Smoothed
from robench.defense import Defense
from robench.threat import ThreatModel

SMOOTHING = 0.25
"""Deviation of the noise that smooths a shattered gradient, as a share of what the budget allows each value if spread evenly."""
KEPT = ((Fraction(1, 100), 0.5), (Fraction(1, 2), 0.75))
"""Within which share of the budget the gradient of an honest model keeps at least which cosine, where it withstands attacks: of 891
digits that withstood, of five adversarially trained defenses, two have less within half the budget, and none within a hundredth."""


def smoothing(threat: ThreatModel, values: int) -> Callable[[Defense], Defense]:
    """Return what smooths a defense of images of so many values over a part of the budget."""
    deviation = SMOOTHING * threat.epsilon / {"Linf": 1, "L2": values**0.5, "L1": values}[threat.norm]
    return lambda defense: Smoothed(defense, deviation)


@torch.enable_grad()
def turns_away(defense: Defense, threat: ThreatModel, seed: int, x: Tensor, y: Tensor, examples: Tensor) -> Tensor:
    """Say where the gradient of a deterministic defense, towards the class nearest to the label, turns away within the budget: bool (B,).

    None of a random defense does, whose gradient turns with its noise. Costs a forward and a backward at three images for each one.
    """
    turned = torch.zeros_like(y, dtype=torch.bool)
    if defense.random:
        return turned
    target: Tensor | None = None

    def gradient(at: Tensor) -> Tensor:
        nonlocal target
        point = at.detach().clone().requires_grad_()
        logits = defense(point).float()
        if target is None:
            target = logits.detach().scatter(1, y[:, None], -torch.inf).argmax(1)
        gap = logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])
        return functional.normalize(image_gradient(gap[:, 0], point).flatten(1), eps=1e-30)

    here = gradient(x)
    for share, kept in KEPT:
        there = gradient(threat.scaled(share).random_start(x, examples, seed, "shattered"))
        turned |= (here * there).sum(1) < kept * here.norm(dim=1)
    return turned
