"""Cost: image-forwards and image-backwards, counted at the members (K members x M draws of one image count K * M)."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robench.defense import Defense


@dataclass
class Cost:
    """A running count of image passes through the members."""

    forwards: int = 0
    backwards: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forwards + other.forwards, self.backwards + other.backwards)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = list(output.values()) if isinstance(output, Mapping) else output
    return [tensor for item in parts for tensor in _tensors(item)] if isinstance(parts, list | tuple) else []


_OPEN: list[Cost] = []
"""The counts that are going on."""


def count_backwards(inside: Tensor) -> None:
    """Have a backward pass that begins inside a member, at a tensor (B, ...) with a gradient, count as one of the member."""

    def on_backward(_gradient: Tensor) -> None:
        for cost in _OPEN:
            cost.backwards += len(inside)

    inside.register_hook(on_backward)


@contextlib.contextmanager
def counted(defense: Defense) -> Iterator[Cost]:
    """Count the passes of the defense's members inside the block; the hooks are gone after it."""
    cost = Cost()

    def after_forward(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        given = _tensors([*inputs, *named.values()])
        images = len(given[0]) if given else 0
        cost.forwards += images

        def on_backward(_gradient: Tensor) -> None:
            cost.backwards += images

        # One call for each backward pass that reaches the member, whichever of its outputs (heads) it comes through.
        if tensors := [tensor for tensor in _tensors(output) if tensor.requires_grad]:
            torch.autograd.graph.register_multi_grad_hook(tensors, on_backward, mode="any")

    # A network that is a member twice counts at each of its forwards, once.
    handles = [member.register_forward_hook(after_forward, with_kwargs=True) for member in dict.fromkeys(defense.members())]
    _OPEN.append(cost)
    try:
        yield cost
    finally:
        _OPEN[:] = [other for other in _OPEN if other is not cost]
        for handle in handles:
            handle.remove()
