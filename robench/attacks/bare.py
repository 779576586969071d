"""A defense's member networks on the image itself: what is left when the defense is taken away.

Adversarial examples of the undefended network often fool the defended one, however its gradient is hidden (Tramer et al., arXiv
2002.08347, on attacks that transfer).
"""

from typing import Any

import torch
from torch import Tensor, nn

from robench import noise
from robench.aggregate import mean_of_logits
from robench.attacks.objective import image_gradient
from robench.attacks.transfer import mean_surrogate
from robench.defense import Defense
from robench.noise import Draw, isolated_generator

PROBES = 2
"""Images of noise on which gradients are compared."""
ALIKE = 1e-3
"""Gradients that differ by less than this share of their length are taken for the same."""


class Bare(Defense):
    """Networks without what a defense puts before, between and behind them, combined by the mean of their logits.

    Args:
        networks: modules from images to logits (B, classes). What they draw themselves is the same each time.
    """

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the networks' logits: (B, C, H, W) -> (B, N, classes)."""
        with isolated_generator(0, x.device):
            return torch.stack([network(x) for network in self.networks], dim=1)

    def aggregate(self, logits: Tensor) -> Tensor:
        """Return the mean of the networks' logits: (B, N, classes) -> (B, classes)."""
        return mean_of_logits(logits)

    def members(self) -> list[nn.Module]:
        """Return the networks."""
        return list(self.networks)


def bare(defense: Defense, like: Tensor) -> Bare | None:
    """Return the defense's networks by themselves, or None where there is nothing to gain by attacking them.

    They are the members that are given images of the shape of `like` (B, C, H, W) and return as many logits as the defense. Nothing
    is to be gained where their mean has the gradient of the predictors' mean, as in every ensemble that hides nothing.
    """
    examples = torch.arange(PROBES, device=like.device)
    probe = noise.uniform(Draw(0, examples), "bare networks", tuple(like.shape[1:])).to(like)
    draw = Draw(0, examples) if defense.random else None
    surrogate, networks = mean_surrogate(defense), _taking_images(defense, probe, draw)
    if not networks:
        return None
    found = Bare(networks)
    own, without = (_gradient(model, probe, draw) for model in (surrogate, found))
    return found if bool((own - without).norm() > ALIKE * without.norm()) else None


@torch.no_grad()
def _taking_images(defense: Defense, probe: Tensor, draw: Draw | None) -> list[nn.Module]:
    """Return the members, each once, that the defense gives images of the probe's shape, for as many logits as its own."""
    shapes: dict[nn.Module, set[tuple[Any, Any]]] = {member: set() for member in defense.members()}

    def note(member: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        shapes[member].add((getattr(given[0], "shape", None) if len(given) == 1 else None, getattr(output, "shape", None)))

    handles = [member.register_forward_hook(note) for member in shapes]
    try:
        logits = defense.predictors(probe, draw)
    finally:
        for handle in handles:
            handle.remove()
    wanted = {(probe.shape, torch.Size((len(probe), logits.shape[-1])))}
    return [member for member, seen in shapes.items() if seen == wanted]


def _gradient(model: Defense, probe: Tensor, draw: Draw | None) -> Tensor:
    """Return the gradient (B, C, H, W) of the spread of the mean logits over the classes."""
    point = probe.clone().requires_grad_()
    logits = model(point, draw).float()
    return image_gradient(logits.var(1), point)
