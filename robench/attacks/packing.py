"""Which examples an attack goes on with: those that are done leave the batch, at once on a CPU and seldom on a GPU.

To ask which are done makes the host wait for a GPU, and a batch of another size is another recording (`robench.replay`): there passes of
examples that are done cost less than either. What is found does not depend on when they leave.
"""

import torch
from torch import Tensor

LOOKS = {"cpu": 1, "cuda": 10}
"""Steps from one look at which examples are done to the next, by device."""
SHARES = {"cpu": 1.0, "cuda": 0.5}
"""The share of a batch that may still stand for the others to leave it; nobody leaves where all stand."""


def keep(result: Tensor, index: Tensor, x_adv: Tensor, chosen: Tensor) -> None:
    """Write the images that `chosen` marks into their places, without waiting for a GPU.

    Args:
        result: (N, C, H, W) is written to.
        index: (B,) the places of the batch's images in it.
        x_adv: (B, C, H, W).
        chosen: bool (B,).
    """
    if LOOKS[x_adv.device.type] > 1:
        result[index] = torch.where(chosen.reshape(-1, *[1] * (x_adv.ndim - 1)), x_adv, result[index])
    elif bool(chosen.any()):
        result[index[chosen]] = x_adv[chosen]


def leaving(done: Tensor, step: int) -> Tensor | None:
    """Return the rows to go on with, bool (B,), where those that are `done` should leave after this step; None where all stay."""
    kind = done.device.type
    if step % LOOKS[kind]:
        return None
    standing = int((~done).sum())
    return ~done if standing < len(done) and standing <= SHARES[kind] * len(done) else None
