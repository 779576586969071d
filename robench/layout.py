"""The memory layout that networks are trained and attacked in."""

import torch
from torch import nn


def memory_format(module: nn.Module, device: torch.device | str | None = None) -> torch.memory_format:
    """Return channels_last, the faster layout, but on the CPU only where no convolution has fewer than 16 outputs.

    There the backward pass of torch 2.13 to 2.15 corrupts memory in that layout with several threads and odd batch sizes.

    Args:
        module: a network or a defense.
        device: where it is to run; by default where its convolutions are.
    """
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    narrow = any(m.out_channels < 16 and torch.device(device or m.weight.device).type == "cpu" for m in convolutions)
    return torch.contiguous_format if narrow else torch.channels_last
