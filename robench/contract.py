"""What every defense has to keep to before any attack is run: logits that fit, that are finite, and that are each image's own."""

import copy

import torch
from torch import Tensor

from robench import noise, targets
from robench.data import Dataset
from robench.defense import Defense, Plain
from robench.errors import UserError
from robench.noise import Draw, isolated_generator
from robench.targets import Target

TRIED = 16
"""Images on which the contract is checked."""
MOVED = 1e-3
"""How far other images in its batch may move an image's logits, as a share of the largest logit. In batches of one size the same numbers
are added in the same order, so that honest logits do not move at all; what is computed on a part of the batch may round otherwise."""


def honest_logits(target: Target, x: Tensor, draw: Draw | None, dataset: Dataset) -> Tensor:
    """Return logits (B, classes) in float32 of clean images (B, C, H, W), having made sure that the defense keeps to the contract.

    Args:
        target: in evaluation mode.
        x: the images.
        draw: for them, of a random defense.
        dataset: whose images they are.

    Raises:
        UserError: if the model fails, its logits do not fit the data set, are not finite, differ between two forwards of a deterministic
            defense or where the images take a gradient, or depend on the other images in the batch.
    """
    found = logits(target, x, draw, dataset)
    check_gradients(target, x, draw)
    again = logits(target, x, draw, dataset)
    if draw is None and not torch.equal(found, again):
        raise UserError(
            f"{target.name} gives different logits for the same images; declare it random (Defense.random, or Plain(module, random=True))"
        )
    if float((found - again).abs().max()) > MOVED * float(found.abs().max()):
        raise UserError(
            f"{target.name} gives different logits for the same images on one draw, so that no measurement of it repeats; take the noise "
            "from the draw (robench.noise), or for Plain(module, random=True) from torch's global generator"
        )
    if (moved := float(moved_by_others(target, x, draw, dataset).amax())) > MOVED:
        raise UserError(
            f"{target.name} answers an image by the others in its batch (these move its logits by {moved:.1%} of the largest), "
            "so that it has no robust accuracy of single images; no step may mix the images of a batch"
        )
    return found


@torch.no_grad()
def logits(target: Target, x: Tensor, draw: Draw | None, dataset: Dataset) -> Tensor:
    """Return logits (B, classes) in float32 of clean images (B, C, H, W).

    Raises:
        UserError: if the model fails, or its logits do not fit the data set or are not finite.
    """
    try:
        found: Tensor = target.defense(given := x.clone(), draw)
    except UserError as error:
        raise UserError(f"{target.name} does not fit {dataset.name}: {error}") from error
    except (Exception, SystemExit) as error:  # a stranger's code may fail in any way
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{target.name} fails on images of shape {tuple(x.shape)} of {dataset.name}: {line}") from error
    if not isinstance(found, Tensor) or not found.is_floating_point():
        kind = f"logits of type {found.dtype}" if isinstance(found, Tensor) else f"an object of type {type(found).__name__}"
        raise UserError(f"{target.name} returns {kind}; it has to return a tensor (batch, classes) of floating-point numbers")
    targets.check_classes(target, tuple(found.shape), dataset)
    if not torch.equal(given, x):
        raise UserError(f"{target.name} writes into the images that it is given; it has to work on a copy of them")
    if not bool(torch.isfinite(found).all()):
        raise UserError(f"{target.name} returns logits that are not finite (NaN or infinity) on clean images of {dataset.name}")
    return found.float()


def check_gradients(target: Target, x: Tensor, draw: Draw | None) -> None:
    """Make sure that a defense answers images that take a gradient, which attacks give it, as it answers others.

    A module that fails on them, as one that leaves torch does, is given copies that take none from now on, and attacked as what has no
    gradient.

    Args:
        target: in evaluation mode, which answers images that take no gradient.
        x: images (B, C, H, W).
        draw: for them, of a random defense.

    Raises:
        UserError: if a defense that tells its structure fails on them, or any defense answers them otherwise.
    """
    usual = _held(target.defense, x.clone(), draw)
    try:
        with torch.enable_grad(), isolated_generator(0, x.device):
            found = target.defense(x.clone().requires_grad_(), draw).detach()
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:  # a stranger's code may fail in any way
        if not isinstance(target.defense, Plain):
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{target.name} fails on images that take a gradient: {line}; it may detach them itself") from error
        target.defense.takes_gradients = False
        return
    # NaN is no less than anything.
    moved = not float((found - usual).abs().max()) <= MOVED * float(usual.abs().max())
    # Noise that cannot be held shows nothing.
    if moved and torch.equal(usual, _held(target.defense, x.clone(), draw)):
        raise UserError(
            f"{target.name} answers images that take a gradient otherwise than the same images without, so that no attack sees it"
        )


def moved_by_others(target: Target, x: Tensor, draw: Draw | None, dataset: Dataset) -> Tensor:
    """Return how far each image's logits move when other images take half of the places in its batch, as a share of the largest: (B,).

    Size, places and draw stay as they are, so that noise does too, a library's included. Noise that cannot be held shows nothing: zeros.

    Args:
        target: in evaluation mode.
        x: images (B, C, H, W); one alone shows nothing.
        draw: for them, of a random defense.
        dataset: whose images they are.

    Raises:
        UserError: as `logits` does.
    """

    def seen(images: Tensor) -> Tensor:
        with isolated_generator(0, x.device):
            return logits(target, images, draw, dataset)

    found, half = seen(x), len(x) // 2
    if not torch.equal(found, seen(x)):
        return torch.zeros(len(x), device=x.device)
    # One image in all the places moves every statistic of a batch, most of all the one least like the others.
    odd = (x - x.mean(0)).flatten(1).norm(dim=1).argmax()
    others = x[odd].expand_as(x)
    kept = torch.cat([seen(torch.cat([x[:half], others[half:]]))[:half], seen(torch.cat([others[:half], x[half:]]))[half:]])
    return (kept - found).abs().amax(1) / found.abs().max().clamp(min=1e-12)


def copied(defense: Defense, like: Tensor) -> Defense | None:
    """Return a copy of a defense that answers as it does; None where there is none, as of one whose hooks speak to the original.

    Both are shown the same images of noise, of the shape of `like` (B, C, H, W).
    """
    examples = torch.arange(2, device=like.device)
    x = noise.uniform(Draw(0, examples), "copies", tuple(like.shape[1:])).to(like)
    try:
        other = copy.deepcopy(defense)
        own, its = (_held(model, x, Draw(0, examples) if defense.random else None) for model in (defense, other))
        return other if torch.equal(own, its) else None
    except (Exception, SystemExit):  # a stranger's module may refuse in any way
        return None


@torch.no_grad()
def _held(defense: Defense, x: Tensor, draw: Draw | None) -> Tensor:
    """Return logits with a library's noise held."""
    with isolated_generator(0, x.device):
        logits: Tensor = defense(x, draw)
    return logits


def check_memory(target: Target, fresh: Defense | None, near: Tensor, draw: Draw | None) -> None:
    """Make sure that a defense answers images near those it was shown as a copy of it does that was shown none.

    Weights and buffers are compared elsewhere (`targets.check_settled`); this finds what is kept beside them.

    Args:
        target: in evaluation mode, after it was shown images of the data set.
        fresh: a copy from before; None checks nothing.
        near: images (B, C, H, W) within the budget of the images that it was shown.
        draw: for them, of a random defense.

    Raises:
        UserError: if the answers differ.
    """
    if fresh is None:
        return
    found, other = (_held(defense, near, draw).float() for defense in (target.defense, fresh))
    if not float((found - other).abs().max()) <= MOVED * float(other.abs().max()):
        raise UserError(
            f"{target.name} answers images near those it was shown otherwise than a copy of it that was shown none, "
            "so that no two answers are of the same model"
        )
