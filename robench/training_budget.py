"""A wall-clock budget for training: the epochs that fit into it here, found by timing a few steps of each stage."""

import copy
import statistics
import time

import torch

from robench import duration, noise, training
from robench.adversarial import train_step
from robench.batches import batches
from robench.data import Dataset
from robench.errors import UserError
from robench.recipe import Stage, with_epochs
from robench.zoo import Specimen

STEPS = 5
SHARE = 0.95
"""Of the budget that is planned for; the rest is for what is not a step."""


def fitting_epochs(specimen: Specimen, split: Dataset, seconds: float, device: str) -> int:
    """Return the most epochs of a defense's first stage, the others in proportion, that should train within `seconds` here.

    Args:
        specimen: the untrained defense, which is left as it is.
        split: the training split.
        seconds: the budget.
        device: ``cpu`` or ``cuda``.

    Raises:
        UserError: if not even one epoch fits, or nothing is trained.
    """
    if not specimen.stages:
        raise UserError("the defense is not trained, so there is nothing to fit into a budget")
    costs = [_seconds_per_epoch(specimen, stage, split, device) for stage in specimen.stages]

    def total(epochs: int) -> float:
        return sum(cost * stage.recipe.epochs for cost, stage in zip(costs, with_epochs(specimen.stages, epochs), strict=True))

    if total(1) > SHARE * seconds:
        least = duration.written(total(1) / SHARE)
        raise UserError(f"a budget of {duration.written(seconds)} does not fit one epoch, which takes about {least} here")
    epochs = 1
    while total(epochs + 1) <= SHARE * seconds:
        epochs += 1
    return epochs


def _seconds_per_epoch(specimen: Specimen, stage: Stage, split: Dataset, device: str) -> float:
    """Return what an epoch of a stage should take: the median of some steps, the first left out, times their number."""
    module = copy.deepcopy(specimen.defense.get_submodule(stage.module))
    layout = training.place(module, device)
    # What is frozen takes no gradient, and no time for one.
    optimiser = torch.optim.SGD(training.freeze_but(module, stage.trainable).values(), lr=0.0)
    half = training.precision(stage.recipe, device) == "bfloat16"
    few = split.first(min(len(split), (STEPS + 1) * stage.recipe.batch_size))
    images, labels = few.images.to(device), few.labels.to(device)
    taken = []
    with noise.isolated_generator(stage.seed, device):
        started = time.monotonic()
        for indices, x, y in batches(images, labels, stage.recipe, stage.seed, 0, layout):
            draw = noise.Draw(stage.seed, indices)
            # Reading the loss waits for the device.
            float(train_step(module, optimiser, stage.recipe, x, y, draw, half=half, trainable=stage.trainable))
            taken.append(time.monotonic() - started)
            started = time.monotonic()
    return statistics.median(taken[1:] or taken) * -(-len(split) // stage.recipe.batch_size)
