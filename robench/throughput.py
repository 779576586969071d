"""How fast training runs: images a second, floating-point operations a second, and the share of the device's measured peak."""

import copy
import functools
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from robench import noise
from robench.adversarial import train_step
from robench.recipe import Precision, Recipe

SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices whose product stands for the peak."""


class _Counter(TorchDispatchMode):
    """Adds up torch's operation counts, as its FlopCounterMode does, which cannot follow a gradient taken to a leaf."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def step_operations(module: nn.Module, recipe: Recipe, shape: tuple[int, int, int], device: str, trainable: tuple[str, ...]) -> float:
    """Return the floating-point operations of one image in a training step: those of convolutions and matrix products.

    They are counted on a copy of the module, by a step on two blank images (C, H, W); 0 where a module takes no copy or no such images.
    """
    try:
        return _counted(copy.deepcopy(module), recipe, shape, device, trainable)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a stranger's module may refuse in any way, and only a line of progress is lost
        return 0.0


def _counted(trained: nn.Module, recipe: Recipe, shape: tuple[int, int, int], device: str, trainable: tuple[str, ...]) -> float:
    optimiser = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.0)
    x, y = torch.zeros(2, *shape, device=device), torch.zeros(2, dtype=torch.long, device=device)
    draw = noise.Draw(0, torch.arange(2, device=device))
    with noise.isolated_generator(0, device), _Counter() as counter:
        train_step(trained, optimiser, recipe, x, y, draw, trainable=trainable)
    return float(counter.total) / 2


@functools.lru_cache
def peak(device: str, precision: Precision) -> float:
    """Return the floating-point operations a second of the device's best of five products of large matrices, measured now."""
    kind = torch.device(device).type
    side, dtype = SIDE[kind], getattr(torch, precision)
    # Equal numbers would flip fewer bits than data does, and a GPU multiplies them faster.
    a = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    fastest = float("inf")
    for _ in range(5):
        _wait(kind)
        started = time.monotonic()
        a @ a
        _wait(kind)
        fastest = min(fastest, time.monotonic() - started)
    return 2 * side**3 / fastest


def described(images_per_second: float, operations: float, peak_operations: float) -> str:
    """Return the line of a speed: images a second, TFLOP/s of `operations` an image, and its share of the peak."""
    achieved = images_per_second * operations
    return (
        f"{images_per_second:.0f} images/s, {achieved / 1e12:.3g} TFLOP/s ({achieved / peak_operations:.0%} of this device's measured peak)"
    )


def _wait(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()
