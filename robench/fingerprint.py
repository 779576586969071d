"""What tells two models apart: a hash of the weights, and one of what they compute."""

import hashlib
import itertools

import torch
from torch import Tensor, nn

from robench import noise
from robench.data import Dataset, as_float
from robench.defense import as_defense


def state_hash(module: nn.Module) -> str:
    """Return the SHA-256 of a module's parameters and buffers, names, shapes and types included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def behaviour_hash(module: nn.Module, dataset: Dataset) -> str:
    """Return a hash of a module's predictions on two images, for what its weights do not tell: strides, aggregation, noise.

    They are rounded, so that threads, memory layouts and machines do not change the hash.
    """
    # Adding 0 turns a rounded -0.0 into 0.0.
    return hashlib.sha256((reference_logits(module, dataset).round(decimals=6) + 0.0).numpy().tobytes()).hexdigest()


def reference_logits(module: nn.Module, dataset: Dataset) -> Tensor:
    """Return a module's logits (2, classes) of a data set's first two images, in float64, on the CPU, of one fixed draw."""
    defense, x = as_defense(module).eval(), as_float(dataset.images[:2]).double()
    draw = noise.Draw(0, torch.arange(len(x))) if defense.random else None
    weights = {name: t.cpu().double() if t.is_floating_point() else t.cpu() for name, t in
               itertools.chain(defense.named_parameters(), defense.named_buffers())}  # fmt: skip
    with torch.no_grad(), noise.isolated_generator(0):
        logits: Tensor = torch.func.functional_call(defense, weights, (x, draw))
    return logits
