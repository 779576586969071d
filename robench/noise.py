"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A number is a pure function of (seed, stream, example, draw, position). It does not depend on the batch it was drawn in, on
the device, or on how often anything was drawn before, so a result does not depend on batch size, order or sharding.
"""

import contextlib
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._triton import has_triton

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_COUNTERS_AT_ONCE = 32_768

Words = NDArray[np.uint32]


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


class OnDevice(int):
    """A draw's number that a recording reads from the device at each replay, instead of the one it was recorded with.

    Attributes:
        place: int64 (), the number.
        reads: is given what the recording reads beside it, which has to live as long.
    """

    place: Tensor
    reads: list[Tensor]

    def __new__(cls, place: Tensor, reads: list[Tensor], number: int) -> "OnDevice":
        """Return a number that is `number` to the host."""
        made = super().__new__(cls, number)
        made.place, made.reads = place, reads
        return made


def philox(counter: Sequence[Tensor], key: Sequence[Tensor | int]) -> list[Tensor]:
    """Return the four words of Philox4x32-10 for four broadcastable int64 tensors, and two of key, holding 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps in int64; its bits are right, and the mask undoes the sign extension of the shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return [c0, c1, c2, c3]


def philox_arrays(counter: Sequence[Words], key: Sequence[Words]) -> list[Words]:
    """Return the same of numpy's arrays, the counter's of one shape, the key's broadcastable with it.

    About three times as fast on the CPU, since half of every int64 is empty and torch does not multiply 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    products = np.empty((2, *c0.shape), np.uint64)
    halves = products.view(np.uint32).reshape(*products.shape, 2)
    low, high = (0, 1) if sys.byteorder == "little" else (1, 0)
    for _ in range(10):
        np.multiply(c0, np.uint64(_MULTIPLIERS[0]), out=products[0], dtype=np.uint64)
        np.multiply(c2, np.uint64(_MULTIPLIERS[1]), out=products[1], dtype=np.uint64)
        c0, c2 = halves[1, ..., high] ^ c1, halves[0, ..., high] ^ c3
        c0 ^= k0
        c2 ^= k1
        c1, c3 = halves[1, ..., low].copy(), halves[0, ..., low].copy()
        k0, k1 = k0 + np.uint32(_WEYL[0]), k1 + np.uint32(_WEYL[1])
    return [c0, c1, c2, c3]


def words(draw: Draw, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Return, by the name of the use, int32 (B, count): 32-bit words, uniform, on the device of ``draw.examples``.

    Two uses within one draw are independent; asking for several at once only saves time. `as_uniform`, `as_normal` and
    `as_integers` make numbers of them.
    """
    examples, uses = draw.examples.to(torch.int64), tuple(counts.items())
    if examples.device.type == "cpu":
        found = _words_of_arrays(examples.numpy(), draw.number, *_positions_and_keys(draw.seed, uses))
    else:
        found = _words_of_tensors(examples, draw.number, _on_device(draw.seed, uses, examples.device))
    starts = np.cumsum([0, *(-(-count // 4) for count in counts.values())])
    return {name: found[:, 4 * start : 4 * start + count] for start, (name, count) in zip(starts, counts.items(), strict=False)}


def _words_of_arrays(examples: NDArray[np.int64], number: int, positions: Words, keys: Words) -> Tensor:
    out = np.empty((len(examples), len(positions), 4), np.uint32)
    # As many examples at a time as the processor's cache holds.
    step = max(1, _COUNTERS_AT_ONCE // max(1, len(positions)))
    for first in range(0, len(examples), step):
        some = examples[first : first + step, None]
        shape = (len(some), len(positions))
        number_word, low, high = np.uint32(number & _MASK), (some & _MASK).astype(np.uint32), (some >> 32 & _MASK).astype(np.uint32)
        counter = [np.broadcast_to(part, shape) for part in (positions, number_word, low, high)]
        for word, values in enumerate(philox_arrays(counter, list(keys))):
            out[first : first + step, :, word] = values
    return torch.from_numpy(out.reshape(len(examples), 4 * len(positions)).view(np.int32))


@lru_cache(maxsize=64)
def _positions_and_keys(seed: int, uses: tuple[tuple[str, int], ...]) -> tuple[Words, Words]:
    """Return the positions (P,) and keys (2, P) of the blocks of four words that each use takes."""
    blocks = [-(-count // 4) for _, count in uses]
    digests = [hashlib.sha256(f"{seed}/{stream}".encode()).digest() for stream, _ in uses]
    keys = np.array([np.frombuffer(digest[:8], "<u4") for digest in digests], np.uint32).repeat(blocks, axis=0).T
    return np.concatenate([np.arange(count, dtype=np.uint32) for count in blocks]), keys


@lru_cache(maxsize=64)
def _on_device(seed: int, uses: tuple[tuple[str, int], ...], device: torch.device) -> Tensor:
    """Return the same as int64 (3, P) on a device: a copy at each draw would wait for it."""
    positions, keys = _positions_and_keys(seed, uses)
    return torch.from_numpy(np.stack([positions, *keys]).astype(np.int64)).to(device)


def _words_of_tensors(examples: Tensor, number: int, places: Tensor) -> Tensor:
    if isinstance(number, OnDevice):
        number.reads.append(places)
        drawn = number.place & _MASK
    else:
        drawn = torch.full((), number & _MASK, dtype=torch.int64, device=examples.device)
    if examples.device.type == "cuda" and has_triton():
        # It is compiled for each state of these, and for few of them.
        with torch.no_grad(), torch.autocast("cuda", enabled=False, cache_enabled=True):
            found = _fused()(examples, drawn, places)
    else:
        found = _rows_of_words(examples, drawn, places)
    return found.reshape(len(examples), 4 * places.shape[1])


def _rows_of_words(examples: Tensor, number: Tensor, places: Tensor) -> Tensor:
    """Return int32 (B, P, 4) words for examples (B,), a draw's number () and positions and two rows of keys (3, P)."""
    position, *key = places.unbind(0)
    low, high = examples[:, None] & _MASK, examples[:, None] >> 32 & _MASK
    return torch.stack(torch.broadcast_tensors(*philox([position, number, low, high], key)), dim=-1).to(torch.int32)


@cache
def _fused() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the same in one kernel: the ten rounds are over a hundred operations, each of which would write all words to memory."""
    return torch.compile(_rows_of_words, dynamic=True)


def as_uniform(found: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return float32 (B, *shape), uniform on [0, 1), from words (B, one for each number)."""
    return ((found >> 8 & 0xFFFFFF).to(torch.float32) * 2.0**-24).reshape(len(found), *shape)


def as_normal(found: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return float32 (B, *shape) of standard normal noise (Box-Muller) from words (B, two for each number)."""
    unsigned = (found.to(torch.int64) & _MASK).to(torch.float32)
    count = unsigned.shape[1] // 2
    radius = (-2 * ((unsigned[:, :count] + 0.5) * 2.0**-32).log()).sqrt()
    return (radius * (2 * math.pi * 2.0**-32 * unsigned[:, count:]).cos()).reshape(len(found), *shape)


def as_integers(found: Tensor, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
    """Return int64 (B, *shape), uniform on {low, ..., high - 1}, from words (B, one for each number).

    The bias is below (high - low) / 2^32.
    """
    return (low + ((found.to(torch.int64) & _MASK) * (high - low) >> 32)).reshape(len(found), *shape)


def uniform(draw: Draw, stream: str, shape: tuple[int, ...]) -> Tensor:
    """Return float32 (B, *shape), uniform on [0, 1), on the device of ``draw.examples``.

    Args:
        draw: seed, examples and draw number.
        stream: names the use, so that two uses within one draw are independent.
        shape: shape of one example's noise.
    """
    return as_uniform(words(draw, {stream: math.prod(shape)})[stream], shape)


def normal(draw: Draw, stream: str, shape: tuple[int, ...]) -> Tensor:
    """Return float32 (B, *shape) of standard normal noise; see `uniform`."""
    return as_normal(words(draw, {stream: 2 * math.prod(shape)})[stream], shape)


def integers(draw: Draw, stream: str, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
    """Return int64 (B, *shape), uniform on {low, ..., high - 1}; see `uniform`."""
    return as_integers(words(draw, {stream: math.prod(shape)})[stream], low, high, shape)


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
