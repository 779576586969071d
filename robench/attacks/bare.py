"""A defense whose member networks are attacked as if nothing stood between them and the image.

A step before a network that hides its gradient, in whatever way, is passed over on the way back: the networks see what the defense
gives them, and their gradient goes straight to the image (BPDA with the identity for all that the defense does before its members;
Athalye et al., arXiv 1802.00420, section 4.1).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robench import noise
from robench.attacks.objective import image_gradient
from robench.attacks.views import View
from robench.defense import Defense
from robench.noise import Draw
from robench.surrogate import identity_gradient

PROBES = 2
"""Images of noise on which gradients are compared."""
ALIKE = 0.9
"""Gradients whose cosine is at least this are taken for the same: scaling or normalising the image hides nothing."""


class Bare(View):
    """The defense, with the gradient of every member that is given a tensor of the images' shape taken straight to the images.

    Outputs are the defense's own.
    """

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the defense's own predictors' logits (B, N, classes), with the gradient of its members at what they are given."""
        with _straight_to(x, self.defense.members()):
            return self.defense.predictors(x, draw)


def bare(defense: Defense, like: Tensor) -> Bare | None:
    """Return the defense as `Bare`, or None where its own gradient points the same way, so that there is nothing to gain.

    Two images of noise of the shape of `like` (B, C, H, W) are looked at, so that it does not depend on the images attacked.
    """
    examples, found = torch.arange(PROBES, device=like.device), Bare(defense)
    probe = noise.uniform(Draw(0, examples), "bare networks", tuple(like.shape[1:])).to(like)
    own, straight = (_gradient(model, probe, Draw(0, examples) if defense.random else None) for model in (defense, found))
    apart = functional.cosine_similarity(own, straight, eps=1e-30) < ALIKE
    return found if bool((apart & (straight != 0).any(1)).any()) else None


@contextlib.contextmanager
def _straight_to(x: Tensor, members: list[nn.Module]) -> Iterator[None]:
    """Let members see what they are given inside the block, and send the gradient by it to `x`, where shapes allow."""

    def bypass(_member: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (given and isinstance(given[0], Tensor) and given[0].shape == x.shape and given[0].is_floating_point()):
            return None
        return (identity_gradient(x, given[0].detach()), *given[1:])

    handles = [member.register_forward_pre_hook(bypass) for member in dict.fromkeys(members)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.enable_grad()
def _gradient(model: Defense, probe: Tensor, draw: Draw | None) -> Tensor:
    """Return the gradient (B, D) of the spread over the classes of the mean of the predictors' logits."""
    point = probe.clone().requires_grad_()
    logits = model.predictors(point, draw).float().mean(1)
    return image_gradient(logits.var(1), point).flatten(1)
