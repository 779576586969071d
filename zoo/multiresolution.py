"""The multi-resolution input of "Ensemble everything everywhere" (arXiv 2408.05446): a stack of noisy copies of the image.

The released code and the paper's text differ. ``variant=as_published`` is the code: uniform noise of 0.2 * U[0, 1), the contrast
factor tied to the colour amount, a second draw for the backbone's own prediction. ``as_described`` is the text: Gaussian noise of
standard deviation 0.2, contrast from 0.7 to 1.5, one draw.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from robench import noise
from robench.defense import Defense
from robench.errors import UserError
from robench.noise import Draw

from .backbones import Backbone

VARIANTS = ("as_published", "as_described")


@dataclass(frozen=True)
class Pipeline:
    """What makes a stack of an image.

    Attributes:
        resolutions: sides of the copies, from high to low.
        variant: ``as_published`` or ``as_described``.
        noise: the factor of the noise added at the low and at the full resolution.
        shift: the most pixels, along each axis, that a copy is cyclically moved by.
    """

    resolutions: tuple[int, ...]
    variant: str
    noise: float = 0.2
    shift: int = 3


def pipeline(side: int, variant: str, resolutions: int | None = None) -> Pipeline:
    """Return the paper's pipeline for images of a side: it and its halves, four in all; the authors' ImageNet settings from 224 on.

    Those are noise of 0.5 and shifts of up to 42 pixels (the authors' reply to the reviews, openreview.net/forum?id=IHRQif8VQC).

    Args:
        side: of the images, in pixels.
        variant: ``as_published`` or ``as_described``.
        resolutions: how many, 4 by default.

    Raises:
        UserError: for an unknown variant, or more resolutions than the image has halves.
    """
    if variant not in VARIANTS:
        raise UserError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    count = 4 if resolutions is None else resolutions
    most = side.bit_length()
    if not 1 <= count <= most:
        raise UserError(f"resolutions = {count} must be between 1 and {most} for images of {side} pixels a side")
    sides = tuple(side // 2**i for i in range(count))
    if side >= 224:
        # 224, 112, 84, 56: the third is no half of the second.
        return Pipeline((*sides[:2], *(side * 3 // 8, side // 4, *sides[3:])[: count - 2]), variant, noise=0.5, shift=side * 42 // 224)
    return Pipeline(sides, variant)


def stack_resolutions(x: Tensor, draw: Draw, how: Pipeline, stream: str) -> Tensor:
    """Return noisy, jittered copies of images (B, 3, S, S) at several resolutions, stacked to (B, 3 * N, S, S), in [0, 1].

    Args:
        x: images in [0, 1].
        draw: the noise draw.
        how: the resolutions, and how they are disturbed.
        stream: tells two draws of one forward apart.
    """
    side, resolutions, many = x.shape[-1], how.resolutions, len(how.resolutions)
    described = how.variant == "as_described"
    # Gaussian noise takes two words a number.
    each = 2 if described else 1
    counts = {"colour": 1, "contrast": 1, "shift": 2}
    shapes = {(r, name): (3, s, s) for r in resolutions for name, s in (("low", r), ("high", side))}
    words = noise.words(
        draw,
        {f"{stream}/{r}/{name}": count for r in resolutions for name, count in counts.items() if described or name != "contrast"}
        | {f"{stream}/{r}/{name}": each * math.prod(shape) for (r, name), shape in shapes.items()},
    )

    def levels(name: str, low: float, high: float) -> Tensor:
        """Return (B, N, 1, 1, 1) of 100 levels."""
        found = torch.cat([words[f"{stream}/{r}/{name}"] for r in resolutions], dim=1)
        return low + (high - low) * noise.as_integers(found, 0, 100, (many, 1, 1, 1)).to(x.dtype) / 99

    def perturbation(resolution: int, name: str) -> Tensor:
        numbers = noise.as_normal if described else noise.as_uniform
        return how.noise * numbers(words[f"{stream}/{resolution}/{name}"], shapes[resolution, name]).to(x.dtype)

    colour = levels("colour", 0.5, 1.0)
    contrast = levels("contrast", 0.7, 1.5) if described else colour
    luma = (x * _luma(x.device, x.dtype)).sum(1, keepdim=True)
    out = contrast * x[:, None] + (1 - contrast) * luma.mean((1, 2, 3), keepdim=True)[:, None]
    if described:
        # A factor of at most 1 does not leave [0, 1].
        out = out.clamp(0, 1)
    out = colour * out + (1 - colour) * out.mean(2, keepdim=True)
    pixels, copies = torch.arange(side, device=x.device), []
    for copy, resolution in zip(out.unbind(1), resolutions, strict=True):
        shift = noise.as_integers(words[f"{stream}/{resolution}/shift"], -how.shift, how.shift + 1, (2,))
        # The cyclic shift moves the matrix's columns instead of the image's pixels.
        down = _resizing(side, resolution, x.device, x.dtype)
        rows, columns = (down.T[(pixels + shift[:, axis, None]) % side][:, None] for axis in range(2))
        small = rows.mT @ copy @ columns + perturbation(resolution, "low")
        if resolution != side:
            up = _resizing(resolution, side, x.device, x.dtype)
            small = up @ small @ up.T
        copies.append(small + perturbation(resolution, "high"))
    return torch.cat(copies, dim=1).clamp(0, 1)


# Kept where they are used, since a copy to a GPU at each forward would wait for it; and so that gradients can go through them, whoever
# comes first.
@cache
@torch.inference_mode(False)
def _resizing(side: int, to: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the matrix (to, side) of bicubic interpolation along one axis, without antialiasing, computed in float64."""
    identity = torch.eye(side, dtype=torch.float64)[None, None]
    return functional.interpolate(identity, size=(to, side), mode="bicubic")[0, 0].to(device, dtype)


@cache
@torch.inference_mode(False)
def _luma(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the weights (1, 3, 1, 1) of the colours' brightness."""
    return torch.tensor([0.2989, 0.587, 0.114], device=device, dtype=dtype).reshape(1, 3, 1, 1)


class MultiResolution(Defense):
    """A network on a stack of noisy copies of the image at several resolutions; random, every forward a fresh draw."""

    random = True

    def __init__(self, network: Backbone, pipeline: Pipeline) -> None:
        super().__init__()
        self.network = network
        self.pipeline = pipeline
        self._calls = itertools.count()

    def stacked(self, x: Tensor, draw: Draw | None, stream: str) -> Tensor:
        """Return the network's input for images `x`; without a draw, the next of the module's own."""
        draw = draw or Draw(0, torch.arange(len(x), device=x.device), next(self._calls))
        return stack_resolutions(x, draw, self.pipeline, stream)

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        logits: Tensor = self.network(self.stacked(x, draw, "backbone"))
        return logits[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        return [self.network.stages]
