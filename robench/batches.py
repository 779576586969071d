"""A training set's batches: kept as uint8 where training runs, shuffled, shifted and mirrored a batch at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from robench import noise
from robench.data import as_float
from robench.recipe import Recipe

AT_ONCE = {"cpu": 1, "cuda": 64}
"""Batches that are augmented together: on a GPU one batch's images are too few for what it takes to ask."""


def batches(
    images: Tensor, labels: Tensor, recipe: Recipe, seed: int, epoch: int, layout: torch.memory_format
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield an epoch's batches: indices (B,), augmented float images (B, C, H, W) in [0, 1], and labels (B,).

    Args:
        images: uint8 (N, C, H, W), on the device that trains.
        labels: (N,).
        recipe: the batch size and the augmentation.
        seed: of the order and the augmentation.
        epoch: likewise.
        layout: the memory format of the images.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(images), generator=generator)
    for many in order.split(recipe.batch_size * AT_ONCE[images.device.type]):
        indices = many.to(images.device)
        shifted = augmented(images[indices], recipe.augmentation, noise.Draw(seed, indices, epoch))
        for chosen, own in zip(indices.split(recipe.batch_size), shifted.split(recipe.batch_size), strict=True):
            yield chosen, as_float(own).contiguous(memory_format=layout), labels[chosen]


def augmented(images: Tensor, augmentation: str, draw: noise.Draw) -> Tensor:
    """Shift uint8 images (B, C, H, W) by up to an eighth of their side, zeros moving in, and mirror half of them."""
    if augmentation == "none":
        return images
    batch, _, height, width = images.shape
    padding = height // 8
    padded = functional.pad(images, (padding,) * 4)
    shift = noise.integers(draw, "augmentation/shift", 0, 2 * padding + 1, (2,))
    rows = shift[:, :1] + torch.arange(height, device=images.device)
    columns = shift[:, 1:] + torch.arange(width, device=images.device)
    if augmentation == "crop-flip":
        flip = noise.integers(draw, "augmentation/flip", 0, 2, (1,)) == 1
        columns = torch.where(flip, columns.flip(1), columns)
    batch_index = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch_index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
