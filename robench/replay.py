"""An attack's calls of a defense on a GPU, recorded as CUDA graphs and replayed: the host launches one thing where it launched thousands.

A step of an attack is small work for a GPU, and the host takes longer to ask for it than the device to do it. The kernels are those of
the usual call. Every recording is compared with it before its first use and after its last one, on two draws.
"""

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from robench.cost import Cost
from robench.defense import Defense, Plain
from robench.noise import Draw, OnDevice

Part = Literal["logits", "predictors"]

WORTHWHILE = 20
"""Calls of one kind and shape before it is recorded, which costs as much as several calls."""
KEPT = 2
"""Recordings kept, those used last: each holds the memory of a forward and a backward."""
CLOSE = 0.01
"""How far a recording may be from the usual call, as a share of its norm: the libraries may round differently in one."""

DEVICE = "cuda"
"""What can record."""

Key = tuple[object, ...]


def logits(defense: Defense, x: Tensor, draw: Draw | None) -> Tensor:
    """Return the defense's logits (B, classes) for images (B, C, H, W), by a recording where there is one."""
    return _called("logits", defense, x, draw)


def predictors(defense: Defense, x: Tensor, draw: Draw | None) -> Tensor:
    """Return the logits (B, N, classes) of the defense's predictors, by a recording where there is one."""
    return _called("predictors", defense, x, draw)


@contextlib.contextmanager
def recording(cost: Cost) -> Iterator[None]:
    """Record, inside the block, what is called again and again on a GPU; the weights must stay as they are in it.

    Args:
        cost: counts the passes of the usual calls; those of the replayed ones are added to it.

    Raises:
        RuntimeError: if a recording comes to something else than the usual call when the block ends.
    """
    recordings = _Recordings(cost)
    token = _current.set(recordings)
    try:
        yield
        while recordings.made:
            recordings.drop()
    finally:
        _current.reset(token)


@contextlib.contextmanager
def capture() -> Iterator[None]:
    """Leave torch's generators on the GPU as they were where a capture fails inside the block: they would go on as if in one."""
    kept = [(generator, generator.clone_state()) for generator in torch.cuda.default_generators]
    try:
        yield
    except RuntimeError:
        for generator, state in kept:
            generator.graphsafe_set_state(state)
        raise


def repeatable(defense: Defense) -> bool:
    """Return whether a recording of a defense draws what the usual call does: not what takes its numbers from torch's generators."""
    return not any(isinstance(module, Plain) and module.random for module in defense.modules())


def close(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two tensors are the same up to rounding, or both missing."""
    if one is None or other is None:
        return one is other
    return bool((one - other).float().norm() <= CLOSE * other.float().norm())


def _called(part: Part, defense: Defense, x: Tensor, draw: Draw | None) -> Tensor:
    recordings = _current.get()
    if recordings is None or x.device.type != DEVICE:
        return _usual(part, defense, x, draw)
    return recordings.called(part, defense, x, draw)


def _usual(part: Part, defense: Defense, x: Tensor, draw: Draw | None) -> Tensor:
    found: Tensor = defense(x, draw) if part == "logits" else defense.predictors(x, draw)
    return found


@dataclass
class _Recordings:
    """The recordings of one block, the one used last at the end, and the kinds of calls that cannot be recorded."""

    cost: Cost
    made: "OrderedDict[Key, _Recorded]" = field(default_factory=OrderedDict)
    refused: set[Key] = field(default_factory=set)
    calls: Counter[Key] = field(default_factory=Counter)

    def called(self, part: Part, defense: Defense, x: Tensor, draw: Draw | None) -> Tensor:
        half = torch.get_autocast_dtype(DEVICE) if torch.is_autocast_enabled(DEVICE) else None
        key = (part, defense, x.shape, x.dtype, half, x.requires_grad and torch.is_grad_enabled(), None if draw is None else draw.seed)
        if key not in self.made and key not in self.refused:
            self.calls[key] += 1
            if self.calls[key] >= WORTHWHILE:
                self.add(key, record(part, defense, x, draw, self.cost))
        if key not in self.made:
            return _usual(part, defense, x, draw)
        self.made.move_to_end(key)
        return self.made[key](x, draw, self.cost)

    def add(self, key: Key, recorded: "_Recorded | None") -> None:
        if recorded is None:
            self.refused.add(key)
            return
        self.made[key] = recorded
        if len(self.made) > KEPT:
            self.drop()

    def drop(self) -> None:
        """Let go of the recording that was not used for longest; calls of its kind are usual ones until there are enough again."""
        key, recorded = self.made.popitem(last=False)
        self.calls[key] = 0
        if not recorded.holds(self.cost):
            raise RuntimeError("a recorded call of the defense came to something else than the usual one, so that its attack is void")


_current: ContextVar[_Recordings | None] = ContextVar("recordings", default=None)


@dataclass
class _Recorded:
    """A recorded call.

    Attributes:
        usual: what was recorded, from images and draw.
        replayed: from images, and examples and draw number where there is a draw.
        passes: of a call and its backward.
        reads: what the recording reads of the random numbers' places.
        last: what it was called with last.
    """

    usual: Callable[[Tensor, Draw | None], Tensor]
    replayed: Callable[..., Tensor]
    passes: Cost
    reads: list[Tensor]
    last: tuple[Tensor, Draw | None]

    def __call__(self, x: Tensor, draw: Draw | None, cost: Cost) -> Tensor:
        self.last = (x, draw)
        # The next replay writes to the same memory.
        found = self.replayed(x, *_given(draw, x.device)).clone()
        cost.forwards += self.passes.forwards

        def count(_gradient: Tensor) -> None:
            cost.backwards += self.passes.backwards

        if found.requires_grad:
            found.register_hook(count)
        return found

    def holds(self, cost: Cost) -> bool:
        """Return whether it still comes to what the usual call does."""
        x, draw = self.last
        with _uncounted(cost), torch.set_grad_enabled(x.requires_grad):
            return all(_same(self.usual, self.replayed, x, one) for one in ([None] if draw is None else [draw, _next(draw)]))


def record(part: Part, defense: Defense, x: Tensor, draw: Draw | None, cost: Cost) -> _Recorded | None:
    """Return a recording of a call; None where there can be none: it waits for the device, or draws on the host's word."""
    if not repeatable(defense):
        return None
    seed, reads = 0 if draw is None else draw.seed, list[Tensor]()
    enabled, dtype = torch.is_autocast_enabled(DEVICE), torch.get_autocast_dtype(DEVICE)
    number = 0 if draw is None else draw.number

    def usual(images: Tensor, drawn: Draw | None) -> Tensor:
        # Weights that autocast had kept in half precision would be gone when the recording reads them.
        with torch.autocast(DEVICE, dtype, enabled=enabled, cache_enabled=False):
            return _usual(part, defense, images, drawn)

    def call(images: Tensor, *given: Tensor) -> Tensor:
        return usual(images, Draw(seed, given[0], OnDevice(given[1], reads, number)) if given else None)

    wanted = x.requires_grad and torch.is_grad_enabled()
    with _uncounted(cost) as before:
        found = usual(x, draw)
        if wanted and not found.requires_grad:
            return None
        if wanted:
            torch.autograd.grad(found, x, _direction(found), allow_unused=True)
        passes = Cost(cost.forwards - before.forwards, cost.backwards - before.backwards)
    own = (x.detach().clone().requires_grad_(wanted), *(tensor.clone() for tensor in _given(draw, x.device)))
    try:
        with capture(), _uncounted(cost), torch.autocast(DEVICE, dtype, enabled=enabled, cache_enabled=False):
            # Typed as if a module might come back for a function.
            replayed: Any = torch.cuda.make_graphed_callables(call, own, allow_unused_input=True)
    except RuntimeError:
        return None
    recorded = _Recorded(usual, replayed, passes, reads, (x, draw))
    return recorded if recorded.holds(cost) else None


def _given(draw: Draw | None, device: torch.device) -> tuple[Tensor, ...]:
    return () if draw is None else (draw.examples, torch.full((), draw.number, dtype=torch.int64, device=device))


def _next(draw: Draw) -> Draw:
    return Draw(draw.seed, draw.examples, draw.number + 1)


def _same(usual: Callable[[Tensor, Draw | None], Tensor], replayed: Callable[..., Tensor], x: Tensor, draw: Draw | None) -> bool:
    """Return whether both come to the same logits, and gradients in the images where those are wanted."""
    results: list[list[Tensor | None]] = []
    for found in (usual(x, draw), replayed(x, *_given(draw, x.device)).clone()):
        gradient = None
        if found.requires_grad:
            (own,) = torch.autograd.grad(found, x, _direction(found), allow_unused=True)
            gradient = None if own is None else own.clone()
        results.append([found.detach(), gradient])
    return all(close(two, one) for one, two in zip(*results, strict=True))


def _direction(found: Tensor) -> Tensor:
    """Return some gradient of a loss in the logits."""
    return torch.arange(found.numel(), device=found.device).cos().reshape(found.shape).to(found)


@contextlib.contextmanager
def _uncounted(cost: Cost) -> Iterator[Cost]:
    """Give the count so far, and put it back after the block."""
    before = Cost(cost.forwards, cost.backwards)
    try:
        yield before
    finally:
        cost.forwards, cost.backwards = before.forwards, before.backwards
