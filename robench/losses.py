"""Losses that attacks maximise: per example, from logits (B, C) and labels (B,), higher when the attack is nearer to success."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from robench.errors import UserError, nearest

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of each example: (B, C), (B,) -> (B,)."""
    return functional.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the highest other logit minus the label's: positive when misclassified (Carlini and Wagner, arXiv 1608.04644)."""
    label = functional.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(label, -torch.inf).amax(1) - logits.gather(1, y[:, None])[:, 0]


def spread(logits: Tensor) -> Tensor:
    """Return the standard deviation over the classes, so that scales do not matter: (..., C) -> (..., 1), without gradient."""
    return logits.detach().std(-1, correction=0, keepdim=True).clamp(min=1e-12)


def sharp_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy at one scale whatever the logits': never so large that its gradient rounds to zero: (B, C), (B,) -> (B,)."""
    return cross_entropy((4 * logits / spread(logits)).float(), y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Return the difference of logits ratio (Croce and Hein, arXiv 2003.01690, equation 6).

    Raises:
        UserError: with fewer than 3 classes, where it is not defined.
    """
    if logits.shape[1] < 3:
        raise UserError(f"the DLR loss needs at least 3 classes, and there are {logits.shape[1]}; use the margin or ce loss")
    ordered = logits.sort(dim=1, descending=True).values
    return margin(logits, y) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return the targeted DLR loss (arXiv 2003.01690, equation 7), higher when `target` (B,) gains on the label.

    Raises:
        UserError: with fewer than 4 classes, where it is not defined.
    """
    if logits.shape[1] < 4:
        raise UserError(f"the targeted DLR loss needs at least 4 classes, and there are {logits.shape[1]}; use apgd-ce")
    ordered = logits.sort(dim=1, descending=True).values
    gain = logits.gather(1, target[:, None])[:, 0] - logits.gather(1, y[:, None])[:, 0]
    return gain / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
"""Untargeted losses by the name that attack parameters use."""


def loss_named(name: str) -> Loss:
    """Return the loss of that name.

    Raises:
        UserError: if there is none, naming the nearest.
    """
    if name not in LOSSES:
        raise UserError(f"unknown loss {name!r}; known: {', '.join(LOSSES)}{nearest(name, LOSSES)}")
    return LOSSES[name]
