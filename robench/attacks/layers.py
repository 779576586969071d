"""Where the gradient is lost inside a defense's networks, and the defense with it led past those places.

BPDA with the identity (Athalye et al., arXiv 1802.00420, section 4.1), wherever in a network a layer's gradient vanishes or is wrong, or
what happens between two layers has none, and whether or not the defense declares so. A gradient can be led past what returns the shape
that it was given.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from robench.attacks.views import View
from robench.defense import Defense
from robench.noise import Draw, isolated_generator
from robench.surrogate import identity_gradient

STEP = 0.01
"""Of a layer's input, as a share of its norm, along which its output's change is held against what its gradient predicts."""
MOVE = 0.1
"""As large a move must leave the output of a layer as it is whose gradient is zero and hides nothing."""
SHRUNK, GROWN = 0.25, 4.0
"""Change of the output over the gradient's prediction: honest layers stay near 1."""


@dataclass(frozen=True)
class Place:
    """What a layer is given (the first of it), or what it returns."""

    layer: nn.Module
    returned: bool


@dataclass(frozen=True)
class Detour:
    """Two places in a forward at which tensors of one shape are seen: the gradient goes from the later straight to the earlier."""

    earlier: Place
    later: Place


class LedPast(View):
    """The defense with its gradient led past places that lose it. Outputs are the defense's own.

    Args:
        defense: the defense.
        detours: in it.
    """

    def __init__(self, defense: Defense, detours: Sequence[Detour]) -> None:
        super().__init__(defense)
        self.detours = tuple(detours)

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the defense's own predictors' logits (B, N, classes), with the gradient of the detours."""
        begin, end, kept = {d.earlier for d in self.detours}, {d.later: d.earlier for d in self.detours}, dict[Place, Tensor]()

        def seen(place: Place, tensor: Tensor, *_rest: Any) -> Tensor:
            near = kept.get(end[place]) if place in end else None
            if near is not None and near.shape == tensor.shape:
                tensor = identity_gradient(near, tensor.detach().to(near))
            if place not in begin:
                return tensor
            kept[place] = tensor
            # A copy goes on, since what is done to it in place would take the gradient along.
            return tensor.clone()

        with watching({place.layer for detour in self.detours for place in (detour.earlier, detour.later)}, seen):
            return self.defense.predictors(x, draw)


@dataclass(frozen=True)
class Sight:
    """A tensor seen at a place: as it was, with its graph, and the rest of what a layer was given with it."""

    place: Place
    tensor: Tensor
    rest: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Forward:
    """One forward of a defense, and how to have it again.

    Attributes:
        defense: in evaluation mode.
        x: the images (B, C, H, W).
        draw: for them, of a random defense.
        sights: what its layers were first given and first returned, in order.
    """

    defense: Defense
    x: Tensor
    draw: Draw | None
    sights: tuple[Sight, ...]

    def again(self, earlier: Place, at: Tensor, later: Place) -> Tensor:
        """Return what is seen at a later place if a tensor of its own is put at an earlier one."""
        found, there = list[Tensor](), False

        def seen(place: Place, tensor: Tensor, *_rest: Any) -> Tensor:
            nonlocal there
            if place == earlier and not there:
                there, tensor = True, at.clone()
            elif place == later:
                found.append(tensor)
                tensor = tensor.clone()
            return tensor

        with watching({earlier.layer, later.layer}, seen):
            self.defense.predictors(self.x, self.draw)
        return found[0]


def forward(defense: Defense, x: Tensor, draw: Draw | None) -> tuple[Tensor, Forward]:
    """Return the predictors' logits (B, N, classes) of images (B, C, H, W), and what was seen on the way."""
    sights = dict[Place, Sight]()

    def seen(place: Place, tensor: Tensor, *rest: Any) -> Tensor:
        sights.setdefault(place, Sight(place, tensor, rest))
        # Layers that work in place must not change what was seen.
        return tensor.clone()

    # What runs within TorchScript cannot be watched.
    with watching({layer for layer in defense.modules() if not isinstance(layer, Defense | torch.jit.ScriptModule)}, seen):
        logits = defense.predictors(x, draw)
    return logits, Forward(defense, x, draw, tuple(sights.values()))


@contextlib.contextmanager
def watching(layers: set[nn.Module], seen: Callable[..., Tensor]) -> Iterator[None]:
    """Pass what each layer is given first, and what it returns, through ``seen(place, tensor, ...)`` inside the block.

    Only tensors of images or features are; of what is given the rest comes along.
    """

    def watched(tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim > 1

    def before(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (seen(Place(layer, False), *given), *given[1:]) if given and watched(given[0]) else None

    def after(layer: nn.Module, _given: tuple[Any, ...], output: Any) -> Any:
        return seen(Place(layer, True), output) if watched(output) else None

    handles = [layer.register_forward_pre_hook(before) for layer in layers] + [layer.register_forward_hook(after) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def detours(seen: Forward) -> list[Detour]:
    """Return what leads past every place in a forward that loses the gradient: a layer, or what is done between two.

    The gradient is lost where what comes out changes otherwise than it says, or without one; of layers within each other, in the
    innermost. Between layers this is looked for only where a tensor comes out without a graph, or through a stranger's autograd function.
    """
    found, given, latest = list[Detour](), dict[nn.Module, Sight](), dict[torch.Size, Sight]()
    for sight in seen.sights:
        layer, shape = sight.place.layer, sight.tensor.shape
        earlier = latest.get(shape)
        latest[shape] = sight
        entry = given.get(layer) if sight.place.returned else None
        given.setdefault(layer, sight)
        past = {detour.later.layer for detour in found}
        if entry is not None and entry.tensor.shape == shape and past.isdisjoint(layer.modules()) and _layer_loses(entry, sight):
            found.append(Detour(entry.place, sight.place))
        elif earlier is not None and earlier is not entry and _doubtful(earlier.tensor, sight.tensor):
            again = partial(seen.again, earlier.place, later=sight.place)
            if _loses(again, earlier.tensor.detach(), sight.tensor):
                found.append(Detour(earlier.place, sight.place))
    return found


def _doubtful(earlier: Tensor, later: Tensor) -> bool:
    """Say whether a tensor that had a graph comes out without one, or through a stranger's autograd function."""
    if not earlier.requires_grad or not later.requires_grad:
        return earlier.requires_grad
    start, reached = get_gradient_edge(earlier).node, dict[Any, list[Any]]()
    waiting: list[Any] = [get_gradient_edge(later).node]
    while waiting:
        node = waiting.pop()
        for behind, _ in node.next_functions if node is not start else ():
            if behind is not None and behind not in reached:
                waiting.append(behind)
            reached.setdefault(behind, []).append(node)
    # Only what lies on a way from the one to the other: back from the start.
    between, waiting = set[Any](), list(reached.get(start, ()))
    while waiting:
        if (node := waiting.pop()) not in between:
            between.add(node)
            waiting += reached.get(node, ())
    return any(isinstance(node, BackwardCFunction) for node in between)


def _layer_loses(entry: Sight, sight: Sight) -> bool:
    """Say whether a layer loses the gradient, called alone on what it was given."""

    def again(at: Tensor) -> Tensor:
        # A copy, for layers that work in place.
        found: Tensor = entry.place.layer(at.clone(), *entry.rest)
        return found

    return _loses(again, entry.tensor.detach(), sight.tensor)


@torch.enable_grad()
def _loses(step: Callable[[Tensor], Tensor], point: Tensor, output: Tensor) -> bool:
    """Say whether a step's output changes otherwise than its gradient says, or without one, for any of the examples it was given.

    A step whose answer is another when asked again, as by noise that is not its own, does not.
    """

    def answer(at: Tensor) -> Tensor:
        with isolated_generator(0, at.device):
            return step(at)

    try:
        leaf = point.clone().requires_grad_()
        if not torch.equal(again := answer(leaf), output):
            return False
        towards, around = (_normal(point, number) for number in range(2))
        gradient = _gradient(again, towards.to(again), leaf)
        length = point.flatten(1).norm(dim=1).reshape(-1, *[1] * (point.ndim - 1))
        with torch.no_grad():
            moved = (answer(point + MOVE * length * around / around[0].numel() ** 0.5) != output).flatten(1).any(1)
            # Each value by a share of itself: a normalisation is steep about a token that is small beside the others.
            aside = STEP * point.abs() * gradient.sign()
            change = ((answer(point + aside) - answer(point - aside)).float() * towards).flatten(1).sum(1) / 2
            ratio = change / (gradient.float() * aside.float()).flatten(1).sum(1)
    except Exception:  # a stranger's code may refuse in any way to be called like this
        return False
    # Half precision rounds away what a short step changes.
    exact = point.dtype in (torch.float32, torch.float64)
    wrong = ~((ratio > SHRUNK) & (ratio < GROWN)) & ratio.isfinite() & exact
    return bool(torch.where((gradient == 0).flatten(1).all(1), moved, wrong).any())


def _gradient(output: Tensor, towards: Tensor, leaf: Tensor) -> Tensor:
    if not output.requires_grad:
        return torch.zeros_like(leaf)
    (gradient,) = torch.autograd.grad(output, leaf, towards, allow_unused=True)
    return torch.zeros_like(leaf) if gradient is None else gradient.nan_to_num(0, 0, 0)


def _normal(like: Tensor, number: int) -> Tensor:
    """Return normal numbers of a tensor's shape, the same ones each time."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(number)).to(like)
