"""A defense's own word on what to differentiate in the place of a step that has no useful gradient (BPDA).

Athalye, Carlini and Wagner, "Obfuscated gradients give a false sense of security", arXiv 1802.00420, section 4.1: forwards the step
itself, backwards a differentiable function that does about the same.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from robench.errors import UserError

_ACTIVE: ContextVar[bool] = ContextVar("surrogates", default=False)


class Substitute(nn.Module):
    """A step of a defense, and its differentiable surrogate for attacks that ask for it.

    Anywhere in a defense, as a submodule of it: a layer, what is done to the image, or an `Ensemble`'s aggregator. Its output is
    always the step's; it is the gradient that an attack may take from the surrogate.

    Args:
        step: from a tensor (and whatever else it is called with) to a tensor.
        surrogate: from the same arguments to a tensor of the same shape, close to the step's and differentiable in the first.
    """

    def __init__(self, step: Callable[..., Tensor], surrogate: Callable[..., Tensor]) -> None:
        super().__init__()
        self.step = step
        self.surrogate = surrogate

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """Return the step's output.

        Raises:
            UserError: if an attack asks for the surrogate and its output has another shape.
        """
        if not (_ACTIVE.get() and x.requires_grad and torch.is_grad_enabled()):
            return self.step(x, *rest)
        with torch.no_grad():
            value = self.step(x, *rest)
        near = self.surrogate(x, *rest)
        if near.shape != value.shape:
            raise UserError(f"a surrogate returns shape {tuple(near.shape)} for a step that returns {tuple(value.shape)}")
        return identity_gradient(near, value)


def declares(defense: nn.Module) -> bool:
    """Say whether a defense declares a surrogate for any of its steps."""
    return any(isinstance(module, Substitute) for module in defense.modules())


@contextlib.contextmanager
def active() -> Iterator[None]:
    """Differentiate the surrogates in the place of their steps, in forwards inside the block."""
    token = _ACTIVE.set(True)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def identity_gradient(near: Tensor, value: Tensor) -> Tensor:
    """Return `value`, whose gradient goes to `near` (of the same shape) as the identity's would."""
    result: Tensor = _Identity.apply(near, value)
    return result


class _Identity(torch.autograd.Function):
    """Some value forwards, the identity's gradient backwards."""

    @staticmethod
    def forward(_context: Any, _near: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
