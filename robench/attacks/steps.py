"""Steepest-ascent directions: the step of unit size in a norm that raises a linear loss the most."""

import torch
from torch import Tensor

from robench.threat import Norm

TINY = 1e-15
"""A gradient whose largest value is below this may have squares that float32 rounds to zero."""


def steepest(gradient: Tensor, norm: Norm, x: Tensor | None = None, sparsity: float | Tensor = 0.05) -> Tensor:
    """Return the steepest-ascent direction of unit size in `norm`: (B, ...) -> (B, ...), zero where the gradient is zero.

    Linf: the sign. L2: the normalised gradient. L1: the sign of the `sparsity` share of coordinates of largest gradient (at
    least one), scaled to unit L1 norm (SLIDE, Tramer and Boneh, arXiv 1904.13000, section 3.2); with `x` given, only
    coordinates that the box [0, 1] leaves room for are taken. A tensor (B,) gives each example its own sparsity.
    """
    flat = gradient.flatten(1)
    if norm == "Linf":
        return gradient.sign()
    if norm == "L2":
        # The square of a small gradient is zero in float32; a power of two leaves the bits of all others as they are.
        largest = flat.abs().amax(1, keepdim=True)
        flat = flat * torch.where((largest > 0) & (largest < TINY), 2.0**100, 1.0)
        size = flat.norm(dim=1, keepdim=True)
        return torch.where(size > 0, flat / size.clamp(min=1e-30), 0).reshape(gradient.shape)
    magnitude = flat.abs()
    if x is not None:
        values = x.flatten(1)
        stuck = ((flat > 0) & (values >= 1)) | ((flat < 0) & (values <= 0))
        magnitude = magnitude.masked_fill(stuck, 0)
    if isinstance(sparsity, Tensor):
        counts = (sparsity * flat.shape[1]).long().clamp(1, flat.shape[1])
        smallest = magnitude.sort(dim=1, descending=True).values.gather(1, counts[:, None] - 1)
    else:
        smallest = magnitude.topk(max(1, int(sparsity * flat.shape[1])), dim=1).values[:, -1:]
    chosen = flat.sign() * ((magnitude >= smallest) & (magnitude > 0))
    return (chosen / chosen.abs().sum(1, keepdim=True).clamp(min=1)).reshape(gradient.shape)
