"""Square (Andriushchenko et al., arXiv 1912.00049), a random search by score, in the form that AutoAttack gives it.

Linf: Algorithm 2; L2: Algorithm 3; L1: as L2 with the L1 norm, a steeper pattern and a projection that makes the perturbation
sparse (AutoAttack's addition). Unlike AutoAttack's, each example has windows of its own, so that it does not depend on the batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from robench import noise
from robench.attacks import packing
from robench.attacks.objective import Point, draw_numbers, evaluate_point
from robench.attacks.registry import register
from robench.attacks.runs import best_of_runs
from robench.defense import Defense
from robench.losses import margin
from robench.noise import Draw
from robench.threat import Norm, ThreatModel

BLOCK = 64
"""Queries whose random numbers are drawn at once."""
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After each of these queries the share of the image that a window covers is halved (section 5, for 10000 queries)."""


@register("square", version=1, paper="arXiv 1912.00049")
def square(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    queries: int = 5000,
    p_init: float = 0.8,
    restarts: int = 1,
    draws: int = 1,
) -> Tensor:
    """Random search on the margin loss: a query changes a square window and is kept if the loss rises. Needs no gradient.

    An example of a deterministic defense stops when it is fooled. A random defense is attacked on every example to the last
    query: each compares the kept image and the new one on the same fresh draws, which costs two passes for each draw, because
    a loss remembered from lucky draws would let no other image pass.

    Args beyond every attack's: `queries`, the images tried from each start (the window's size follows the query's number,
    whatever their count, as in AutoAttack); `p_init`, the share of the image that the first windows cover; `draws`, the noise
    draws averaged at each query for a random defense.
    """
    if threat.epsilon == 0:
        return x.clone()

    def run(number: int, stream: str, index: Tensor, _target: Tensor) -> Tensor:
        names, labels = examples[index], y[index]

        def look(x_adv: Tensor, rows: Tensor | slice, query: int) -> Point:
            return evaluate_point(
                defense,
                x_adv,
                labels[rows],
                lambda logits: margin(logits, labels[rows]),
                examples=names[rows],
                seed=seed,
                numbers=draw_numbers(number * (queries + 1) + query, draws),
                gradient=False,
            )

        return _run(look, defense.random, x[index], threat, names, seed, f"square/{stream}", queries, p_init)

    return best_of_runs(
        run,
        defense,
        x,
        y,
        examples=examples,
        seed=seed,
        judge=margin,
        numbers=draw_numbers(restarts * (queries + 1), draws),
        restarts=restarts,
    )


@dataclass
class _Search:
    """What is known of each example still searched, one row each; `low` and `high` are the corners of the Linf ball."""

    index: Tensor
    x: Tensor
    low: Tensor
    high: Tensor
    examples: Tensor
    x_best: Tensor
    loss: Tensor
    random: Tensor
    done: Tensor

    def rows(self, chosen: Tensor) -> "_Search":
        """Return the search of the examples that bool (B,) `chosen` marks."""
        return _Search(**{entry.name: getattr(self, entry.name)[chosen] for entry in fields(self)})


def _run(
    look: Callable[[Tensor, Tensor, int], Point],
    random: bool,
    x: Tensor,
    threat: ThreatModel,
    examples: Tensor,
    seed: int,
    stream: str,
    queries: int,
    p_init: float,
) -> Tensor:
    """Search once from a random start; return the image that fooled a deterministic defense, else the last one kept."""
    _, channels, height, width = x.shape
    per_query = 5 + channels
    low, high = (x - threat.epsilon).clamp(0, 1), (x + threat.epsilon).clamp(0, 1)
    start = _start(x, low, high, threat, Draw(seed, examples), stream)
    nothing, index = x.new_zeros(len(x)), torch.arange(len(x), device=x.device)
    search = _Search(index, x, low, high, examples, start, nothing - torch.inf, nothing, nothing.bool())
    result, x_new, patterns = start.clone(), start, dict[int, Tensor]()
    for query in range(queries + 1):
        if query:
            if (query - 1) % BLOCK == 0:
                search.random = noise.uniform(Draw(seed, search.examples, query // BLOCK), stream, (BLOCK, per_query))
            numbers = search.random[:, (query - 1) % BLOCK]
            size = side(threat.norm, query - 1, p_init, height, width)
            if threat.norm == "Linf":
                x_new = _with_square(search, numbers, size)
            else:
                if size not in patterns:
                    patterns[size] = pattern(size, threat.norm).to(x)
                x_new = _with_moved_window(search, numbers, patterns[size], threat)
        point = look(x_new, search.index, query)
        if random and query:
            search.loss = look(search.x_best, search.index, query).loss
        higher = point.loss > search.loss
        search.loss = torch.where(higher, point.loss, search.loss)
        search.x_best = torch.where(higher[:, None, None, None], x_new, search.x_best)
        if not random:
            packing.keep(result, search.index, x_new, point.fooled & ~search.done)
            search.done = search.done | point.fooled
            if (standing := packing.leaving(search.done, query)) is not None:
                search = search.rows(standing)
                if not len(search.index):
                    return result
    packing.keep(result, search.index, search.x_best, ~search.done)
    return result


def side(norm: Norm, query: int, p_init: float, height: int, width: int) -> int:
    """Return the side of the window at a query, counted from 0: 1 at least for Linf, 3 and odd for L2 and L1, and inside the image."""
    share = p_init / 2 ** sum(query > last for last in HALVINGS)
    size = round(math.sqrt(share * height * width))
    size = max(size, 1) if norm == "Linf" else max(size, 3) | 1
    return min(size, height, width)


def pattern(size: int, norm: Norm) -> Tensor:
    """Return (size, size) of unit norm: two halves of opposite signs, each falling off from its middle (section 3.3, equation 2)."""
    power = 2 if norm == "L2" else 4

    def half(height: int) -> Tensor:
        # Counted from 1, the terms from a value's distance from the middle to the farthest distance add up.
        terms = 1 / torch.arange(1, max(height, size) // 2 + 2, dtype=torch.float64) ** power
        sums = terms.flip(0).cumsum(0).flip(0)
        rows, columns = ((torch.arange(n) - n // 2).abs() for n in (height, size))
        values = sums[torch.maximum(rows[:, None], columns[None, :])]
        return values / _size(values.flatten(), norm)

    both = torch.cat([half(size // 2), -half(size - size // 2)]) if size > 1 else torch.ones(1, 1).double()
    return both / _size(both.flatten(), norm)


def _size(values: Tensor, norm: Norm) -> Tensor:
    """Return the L2 or L1 norm over the last dimension, which is kept."""
    size: Tensor = values.norm(p=2 if norm == "L2" else 1, dim=-1, keepdim=True)
    return size


def _signs(uniform: Tensor) -> Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0)


def _start(x: Tensor, low: Tensor, high: Tensor, threat: ThreatModel, draw: Draw, stream: str) -> Tensor:
    """Return the first image: vertical stripes of random signs for Linf, a grid of patterns of random signs for L2 and L1."""
    _, channels, height, width = x.shape
    if threat.norm == "Linf":
        return torch.where(noise.uniform(draw, f"{stream}/start", (channels, 1, width)) < 0.5, low, high)
    tile = max(1, min(height, width) // 5)
    rows, columns = height // tile, width // tile
    signs = _signs(noise.uniform(draw, f"{stream}/start", (channels, rows, columns)))[..., None, None]
    turned = noise.uniform(draw, f"{stream}/turn", (1, rows, columns))[..., None, None] < 0.5
    one = pattern(tile, threat.norm).to(x)
    tiles = (signs * torch.where(turned, one.T, one)).transpose(3, 4).reshape(len(x), channels, rows * tile, columns * tile)
    above, left = (height - rows * tile) // 2, (width - columns * tile) // 2
    delta = functional.pad(tiles, (left, width - columns * tile - left, above, height - rows * tile - above))
    return _meet(x, delta.flatten(1), threat)


def _meet(x: Tensor, delta: Tensor, threat: ThreatModel) -> Tensor:
    """Return the image with a perturbation (B, D): scaled to the budget and clipped for L2, projected for L1."""
    if threat.norm == "L1":
        return threat.project(x + delta.reshape(x.shape), x)
    scale = threat.epsilon / _size(delta, threat.norm).clamp(min=1e-12)
    return (x + (scale * delta).reshape(x.shape)).clamp(0, 1)


def _corner(uniform: Tensor, length: int, size: int) -> Tensor:
    """Return the first row or column (B, 1) of a window of `size`, uniform over those that fit."""
    return (uniform * (length - size + 1)).long()[:, None]


def _window(numbers: Tensor, k: int, size: int, shape: torch.Size) -> Tensor:
    """Return the places (B, C, size * size) in each channel of a window whose corner numbers `k` and `k + 1` of (B, ...) determine."""
    batch, channels, height, width = shape
    across = torch.arange(size, device=numbers.device)
    rows, columns = _corner(numbers[:, k], height, size) + across, _corner(numbers[:, k + 1], width, size) + across
    places = rows[:, :, None] * width + columns[:, None, :]
    return places.flatten(1)[:, None].expand(batch, channels, size * size)


def _with_square(search: _Search, numbers: Tensor, size: int) -> Tensor:
    """Set one window to the edge of the Linf ball, the same edge all over it in one channel."""
    window = _window(numbers, 0, size, search.x.shape)
    low, high = (edge.flatten(2).gather(2, window) for edge in (search.low, search.high))
    chosen = torch.where(numbers[:, 5:, None] < 0.5, low, high)
    return search.x_best.flatten(2).scatter(2, window, chosen).reshape(search.x.shape)


def _with_moved_window(search: _Search, numbers: Tensor, one: Tensor, threat: ThreatModel) -> Tensor:
    """Move the perturbation in one window, and the budget not spent, to another, where it takes on the pattern (Algorithm 3)."""
    channels, size = search.x.shape[1], len(one)
    delta = (search.x_best - search.x).flatten(2)
    first, second = (_window(numbers, k, size, search.x.shape) for k in (0, 2))
    values, emptied = delta.gather(2, first), delta.scatter(2, first, 0.0)
    here, there, whole = (_size(part, threat.norm) for part in (values, emptied.gather(2, second), delta.flatten(1)))
    whole = whole[:, :, None]
    if threat.norm == "L2":
        room = ((threat.epsilon**2 - whole**2).clamp(min=0) / channels + here**2 + there**2).sqrt()
    else:
        room = (threat.epsilon - whole).clamp(min=0) + channels * (here + there)
    turned = torch.where(numbers[:, 4, None] < 0.5, one.T.flatten(), one.flatten())[:, None]
    direction = _signs(numbers[:, 5:, None]) * turned + values / here.clamp(min=1e-12)
    moved = room * direction / _size(direction, threat.norm).clamp(min=1e-12)
    return _meet(search.x, emptied.scatter(2, second, 0.0).scatter(2, first, moved).flatten(1), threat)
