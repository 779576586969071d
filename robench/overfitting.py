"""Catastrophic overfitting: single-step adversarial training that comes to withstand its own attack and no other.

Seen by Wong et al. (arXiv 2001.03994) and Andriushchenko and Flammarion (arXiv 2007.02617): within an epoch the accuracy under PGD on
training images falls towards zero, while that under the single step rises.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robench import noise
from robench.adversarial import attack_batch
from robench.defense import as_defense
from robench.parameters import Value
from robench.recipe import InnerAttack
from robench.threat import ThreatModel

EXAMPLES, STEPS = 128, 10
GAP = 0.3
"""Accuracy under the own step less that under PGD-10, above which a network is called overfitted; a sound one's is below 0.1."""


@dataclass(frozen=True)
class Epoch:
    """What an epoch of training came to.

    Attributes:
        loss: the mean loss of its steps.
        own: accuracy on training images under the training's own attack, in [0, 1]; None where that has more than one step.
        strong: accuracy on the same images under PGD-10 of the same threat model; None likewise.
    """

    loss: float
    own: float | None = None
    strong: float | None = None

    @property
    def overfitted(self) -> bool:
        """Whether the network withstands its own attack and not PGD."""
        return self.own is not None and self.strong is not None and self.own - self.strong > GAP


def accuracies(module: nn.Module, images: Tensor, labels: Tensor, attack: InnerAttack, draw: noise.Draw) -> tuple[float, float]:
    """Return the accuracy under a training's own attack and under PGD-10 in quarters of its budget from a uniform start.

    Args:
        module: what is trained; left in evaluation mode.
        images: (B, C, H, W) in [0, 1].
        labels: (B,).
        attack: the training's.
        draw: identifies the images and the epoch.
    """
    defense = as_defense(module.eval())
    size = ThreatModel.parse(attack.threat).epsilon / 4
    strong = dataclasses.replace(attack, steps=STEPS, step_size=size, start="uniform")
    right = []
    for tried in (attack, strong):
        x_adv = attack_batch(defense, images, labels, tried, draw)
        with torch.no_grad():
            predicted = defense(x_adv, draw if defense.random else None).argmax(1)
        right.append(float((predicted == labels).float().mean()))
    return right[0], right[1]


def report(histories: Sequence[Sequence[Epoch]]) -> dict[str, Value]:
    """Return a line for each stage that catastrophically overfitted, counted from 1: its first such epoch, and where it ended."""
    lines: dict[str, Value] = {}
    for number, epochs in enumerate(histories, start=1):
        if found := [i for i, epoch in enumerate(epochs, start=1) if epoch.overfitted]:
            last = epochs[-1]
            lines[f"stage {number} overfitting"] = (
                f"catastrophic from epoch {found[0]} of {len(epochs)}; at the end {last.own:.0%} of training images withstand the "
                f"training's own step and {last.strong:.0%} PGD-{STEPS}"
            )
    return lines
