"""Views of a defense that an attack differentiates in its place: straight-through (BPDA), and smoothed over small noise.

BPDA: Athalye, Carlini and Wagner, "Obfuscated gradients give a false sense of security", arXiv 1802.00420, section 4.1.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robench import noise
from robench.defense import Defense
from robench.noise import Draw


class _View(Defense):
    """Another way through the same defense; it shares the weights."""

    def __init__(self, defense: Defense) -> None:
        super().__init__()
        self.defense = defense
        self.random = defense.random

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the defense's own predictors' logits: (B, C, H, W) -> (B, N, classes)."""
        return self.defense.predictors(x, draw)

    def aggregate(self, logits: Tensor) -> Tensor:
        """Return what the defense makes of its predictors' logits: (B, N, classes) -> (B, classes)."""
        return self.defense.aggregate(logits)

    def members(self) -> list[nn.Module]:
        """Return the defense's own members."""
        return self.defense.members()


class StraightThrough(_View):
    """The defense with the gradient of the identity through every step that has none: rounding, signs, detached tensors.

    Outputs are the defense's own. Steps that replace their input in place are left as they are.
    """

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the predictors' logits (B, N, classes), differentiable where rounding had cut the gradient."""
        with _IdentityGradients():
            return self.defense.predictors(x, draw)

    def aggregate(self, logits: Tensor) -> Tensor:
        """Return the defense's logits (B, classes), differentiable likewise."""
        with _IdentityGradients():
            return self.defense.aggregate(logits)


class Smoothed(_View):
    """The defense on images with Gaussian noise, a fresh draw at each pass: averaged, it has the gradient of the wider landscape.

    Args:
        defense: the defense.
        deviation: of the noise, in units of the pixel range.
    """

    def __init__(self, defense: Defense, deviation: float) -> None:
        super().__init__(defense)
        self.deviation = deviation
        self.random = True

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the predictors' logits (B, N, classes) at the noisy images."""
        if draw is None:
            raise ValueError("a smoothed defense needs a draw")
        noisy = x + self.deviation * noise.normal(draw, "smoothed", tuple(x.shape[1:])).to(x)
        return self.defense.predictors(noisy.clamp(0, 1), draw if self.defense.random else None)


class _Identity(torch.autograd.Function):
    """Some value forwards, the identity's gradient backwards."""

    @staticmethod
    def forward(_context: Any, _x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


_FLAT: set[Callable[..., Any]] = {
    function for name in ("round", "floor", "ceil", "trunc", "fix", "sign") for function in (getattr(torch, name), getattr(Tensor, name))
}
_CUT: set[Callable[..., Any]] = {torch.detach, Tensor.detach}


class _IdentityGradients(TorchFunctionMode):
    """While active, functions that are flat almost everywhere have the gradient of the identity, and nothing is detached."""

    def __torch_function__(
        self, function: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known = bool(args) and isinstance(args[0], Tensor) and args[0].requires_grad
        if known and function in _CUT:
            return args[0]
        result = function(*args, **(kwargs or {}))
        return _Identity.apply(args[0], result.detach()) if known and function in _FLAT else result
