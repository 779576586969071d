"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A number is a pure function of (seed, stream, example, draw, position). It does not depend on the batch it was drawn in, on
the device, or on how often anything was drawn before, so a result does not depend on batch size, order or sharding.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Draw:
    """One draw of a random defense's noise.

    Attributes:
        seed: the evaluation's or training's seed.
        examples: int64 (B,), each example's identity (its index in the data set).
        number: which draw; two draws of one example are independent.
    """

    seed: int
    examples: Tensor
    number: int = 0


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the four 32-bit words of Philox4x32-10 for a counter of four broadcastable int64 tensors holding 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps in int64; its bits are right, and the mask undoes the sign extension of the shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def _words(draw: Draw, stream: str, count: int) -> Tensor:
    """Return int64 (B, count) words, uniform on [0, 2^32)."""
    digest = hashlib.sha256(f"{draw.seed}/{stream}".encode()).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    examples = draw.examples.to(torch.int64)
    blocks = torch.arange(math.ceil(count / 4), device=examples.device)
    number = torch.full((1, 1), draw.number & _MASK, dtype=torch.int64, device=examples.device)
    counter = (blocks[None, :], number, examples[:, None] & _MASK, examples[:, None] >> 32 & _MASK)
    words = torch.stack(philox(counter, key), dim=-1)
    return words.reshape(len(examples), 4 * len(blocks))[:, :count]


def uniform(draw: Draw, stream: str, shape: tuple[int, ...]) -> Tensor:
    """Return float32 (B, *shape), uniform on [0, 1), on the device of ``draw.examples``.

    Args:
        draw: seed, examples and draw number.
        stream: names the use, so that two uses within one draw are independent.
        shape: shape of one example's noise.
    """
    words = _words(draw, stream, math.prod(shape))
    return ((words >> 8).to(torch.float32) * 2.0**-24).reshape(len(words), *shape)


def normal(draw: Draw, stream: str, shape: tuple[int, ...]) -> Tensor:
    """Return float32 (B, *shape) of standard normal noise (Box-Muller on two uniform words)."""
    count = math.prod(shape)
    words = _words(draw, stream, 2 * count).to(torch.float32)
    radius = (-2 * ((words[:, :count] + 0.5) * 2.0**-32).log()).sqrt()
    return (radius * (2 * math.pi * 2.0**-32 * words[:, count:]).cos()).reshape(len(words), *shape)


def integers(draw: Draw, stream: str, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
    """Return int64 (B, *shape), uniform on {low, ..., high - 1}; the bias is below (high - low) / 2^32."""
    words = _words(draw, stream, math.prod(shape))
    return (low + (words * (high - low) >> 32)).reshape(len(words), *shape)


@contextlib.contextmanager
def isolated_generator(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's global generators inside the block and restore them after it.

    For library code (layer initialisation, dropout) that can draw from nowhere else.
    """
    device = torch.device(device)
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield
