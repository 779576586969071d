"""A defense whose member networks are attacked as if nothing stood between them and the image.

A step before a network that hides its gradient, in whatever way, is passed over on the way back: the networks see what the defense
gives them, and their gradient goes straight to the image (BPDA with the identity for all that the defense does before its members;
Athalye et al., arXiv 1802.00420, section 4.1).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robench import noise
from robench.attacks.answers import answers
from robench.attacks.layers import Forward, LedPast, detours, forward
from robench.attacks.objective import spread_gradient
from robench.attacks.views import View
from robench.defense import Defense, Plain
from robench.noise import Draw
from robench.surrogate import identity_gradient

PROBES = 2
"""Images of noise on which gradients are compared."""
ALIKE = 0.9
"""Gradients whose cosine is at least this are taken for the same: scaling or normalising the image hides nothing."""


class Bare(View):
    """The defense, with the gradient of every network that is given a tensor of the images' shape taken straight to the images.

    Outputs are the defense's own.

    Args:
        defense: the defense.
        networks: its members, and what else is a network within.
    """

    def __init__(self, defense: Defense, networks: list[nn.Module]) -> None:
        super().__init__(defense)
        self.networks = networks

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the defense's own predictors' logits (B, N, classes), with the gradient of its members at what they are given."""
        with _straight_to(x, self.networks):
            return self.defense.predictors(x, draw)


@dataclass(frozen=True)
class Ways:
    """Other ways to the gradient of a defense's networks than its own.

    Attributes:
        networks: the defense with what hides its networks' gradient passed over; None where there is nothing to gain.
        answers: what its layers answer before it does (`robench.attacks.answers`), where their gradient is another.
    """

    networks: View | None
    answers: tuple[View, ...]


@torch.enable_grad()
def ways_past(defense: Defense, like: Tensor) -> Ways:
    """Return what leads past whatever hides the gradient of a defense's networks.

    First inside the networks (`robench.attacks.layers`), then, if the gradient still points another way, what stands before
    the networks (`Bare`). Two images of noise of the shape of `like` (B, C, H, W) are looked at, so that it does not depend on the
    images attacked. A module that fails on images that take a gradient has no such way.
    """
    if isinstance(defense, Plain) and not defense.takes_gradients:
        return Ways(None, ())
    logits, seen = looked_at(defense, like)
    x, draw, found = seen.x, seen.draw, detours(seen)
    open_inside = LedPast(defense, found) if found else None
    own = spread_gradient((logits if open_inside is None else open_inside.predictors(x, draw)).float().mean(1), x)
    # A plain module tells no networks: those within it are what is given something else of the images' shape.
    within = [s.place.layer for s in seen.sights if not s.place.returned and s.tensor.shape == x.shape and bool((s.tensor != x).any())]
    networks = Bare(open_inside or defense, defense.members() + (within if isinstance(defense, Plain) else []))
    straight = spread_gradient(networks.predictors(x, draw).float().mean(1), x)
    apart = functional.cosine_similarity(own, straight, eps=1e-30) < ALIKE
    gained = bool((apart & (straight != 0).any(1)).any())
    return Ways(networks if gained else open_inside, answers(seen, logits, ALIKE))


@torch.enable_grad()
def looked_at(defense: Defense, like: Tensor) -> tuple[Tensor, Forward]:
    """Return a defense's predictors' logits (B, N, classes) at two images of noise of the shape of `like`, and the forward they are of."""
    examples = torch.arange(PROBES, device=like.device)
    x = noise.uniform(Draw(0, examples), "bare networks", tuple(like.shape[1:])).to(like).requires_grad_()
    return forward(defense, x, Draw(0, examples) if defense.random else None)


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
