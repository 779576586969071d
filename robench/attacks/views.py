"""Views of a defense that an attack differentiates in its place: declared surrogates and straight-through (BPDA), and smoothed.

BPDA: Athalye, Carlini and Wagner, "Obfuscated gradients give a false sense of security", arXiv 1802.00420, section 4.1.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robench import noise
from robench.defense import Defense
from robench.errors import UserError
from robench.noise import Draw
from robench.surrogate import active, identity_gradient


class View(Defense):
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


def instead(view: Defense) -> Callable[[Defense], Defense]:
    """Return what takes a view that is made already in a defense's place."""
    return lambda _defense: view


class StraightThrough(View):
    """The defense with a gradient through every step that has none: the identity's through rounding, whole numbers, signs and
    detached tensors, a sigmoid's through comparisons that are made numbers.

    Outputs are the defense's own. Steps that replace their input in place are left as they are, and so is a defense that cannot be
    run like this.
    """

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the predictors' logits (B, N, classes), differentiable where rounding had cut the gradient."""
        return _straight_through(self.defense.predictors, x, draw)

    def aggregate(self, logits: Tensor) -> Tensor:
        """Return the defense's logits (B, classes), differentiable likewise."""
        return _straight_through(self.defense.aggregate, logits)


class Declared(StraightThrough):
    """The defense with the gradients of the surrogates that it declares (`robench.surrogate.Substitute`), and straight through
    whatever else has none. Outputs are the defense's own.
    """

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the predictors' logits (B, N, classes), differentiable through the surrogates."""
        with active():
            return super().predictors(x, draw)

    def aggregate(self, logits: Tensor) -> Tensor:
        """Return the defense's logits (B, classes), differentiable likewise."""
        with active():
            return super().aggregate(logits)


class Smoothed(View):
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


def _methods(*names: str) -> set[Callable[..., Any]]:
    """Return torch's functions and tensor methods of these names."""
    return {getattr(owner, name) for name in names for owner in (torch, Tensor) if hasattr(owner, name)}


_FLAT = _methods("round", "floor", "ceil", "trunc", "fix", "sign")
_CUT = _methods("detach")
_OUT = _methods("numpy", "__array__")
_LEARN = _methods("requires_grad_")
_GREATER, _LESS = (
    _methods("gt", "ge", "greater", "greater_equal", "__gt__", "__ge__"),
    _methods("lt", "le", "less", "less_equal", "__lt__", "__le__"),
)
_CAST = _methods("float", "double", "half", "bfloat16", "to", "type", "int", "long", "short", "byte", "char")

WIDTH = 0.1
"""Of the sigmoid whose gradient a comparison is given, in the units of what is compared (of images: of the pixel range)."""


class _IdentityGradients(TorchFunctionMode):
    """While active, functions that are flat almost everywhere have the gradient of the identity, whole numbers made numbers again too,
    nothing is detached, and a comparison that is made a number has the gradient of a sigmoid.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, function: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and first.requires_grad:
            if function in _CUT:
                # A tensor of its own: what is detached may be written to.
                return identity_gradient(first, first.detach()).clone()
            if function in _OUT:
                return function(first.detach(), *args[1:], **(kwargs or {}))
            if function in _LEARN and not first.is_leaf:
                return first
        result = function(*args, **(kwargs or {}))
        if first is None:
            return result
        second: Any = args[1] if len(args) > 1 else (kwargs or {}).get("other")
        if function in _FLAT and first.requires_grad:
            return identity_gradient(first, result.detach())
        if function in _GREATER | _LESS and any(isinstance(a, Tensor) and a.requires_grad for a in (first, second)):
            difference = first - second if function in _GREATER else second - first
            # The entry keeps the comparison alive, so that no other tensor takes its place in memory.
            self._kept[id(result)] = (result, torch.sigmoid(difference / WIDTH))
        elif function in _CAST and id(first) in self._kept and result.is_floating_point():
            return identity_gradient(self._kept[id(first)][1].to(result), result)
        elif function in _CAST and first.requires_grad and not result.is_floating_point():
            self._kept[id(result)] = (result, first)
        return result


def _straight_through(step: Callable[..., Tensor], *given: Any) -> Tensor:
    """Return what a defense's step makes of what it is given, with identity gradients if it can be run with them."""
    try:
        with _IdentityGradients():
            return step(*given)
    except UserError:
        raise
    except Exception:  # a stranger's code may do with a tensor what only one without a gradient allows
        return step(*given)
