"""Batch norm folded into the convolution before it while a network is attacked: in evaluation mode the two are one convolution.

The folded convolutions are in the faster memory layout, which the layers after them then keep to.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from robench.defense import as_defense
from robench.layout import memory_format
from robench.noise import Draw

Pair = tuple[str, str]
"""The dotted paths of a convolution and of its batch norm within a network."""

CLOSE = 1e-3
"""The share of the largest logit that folding may move one by."""

_found: weakref.WeakKeyDictionary[nn.Module, tuple[Pair, ...]] = weakref.WeakKeyDictionary()


def foldable(network: nn.Module) -> tuple[Pair, ...]:
    """Return the convolutions whose output goes to a batch norm alone; none in what torch.fx cannot trace."""
    if network not in _found:
        _found[network] = tuple(_pairs(network))
    return _found[network]


def _pairs(network: nn.Module) -> Iterator[Pair]:
    try:
        graph = fx.Tracer().trace(network)
    except Exception:  # a stranger's forward may do what cannot be traced in any way
        return
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        pair = (str(before.target), str(node.target))
        convolution, norm = map(network.get_submodule, pair)
        if type(convolution) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d or norm.running_mean is None:
            continue
        # A hook may make the weights anew at each call, as spectral norm does.
        if "weight" in convolution._parameters and not convolution._forward_pre_hooks and all(calls[path] == 1 for path in pair):
            yield pair


@contextlib.contextmanager
def folded(module: nn.Module, like: Tensor | None = None, draw: Draw | None = None) -> Iterator[bool]:
    """Fold, inside the block, what can be folded of a defense's members; afterwards they are as they were. Tells whether anything is.

    The weights take no gradient through a folded convolution.

    Args:
        module: a defense or a network, in evaluation mode.
        like: images (B, C, H, W) whose logits folding must leave as they are, up to rounding; where it does not, as where a defense
            reads a convolution's output from outside, nothing is folded. None checks nothing.
        draw: for these images, of a random defense.
    """
    defense = as_defense(module)
    pairs = [(member, pair) for member in dict.fromkeys(defense.members()) for pair in foldable(member)]
    usual = None if like is None or not pairs else _logits(defense, like, draw)
    with _swapped(pairs):
        exact = like is None or usual is None or _alike(defense, like, draw, usual)
        if exact:
            yield bool(pairs)
    if not exact:
        yield False


@contextlib.contextmanager
def _swapped(pairs: list[tuple[nn.Module, Pair]]) -> Iterator[None]:
    own = [(network, path, network.get_submodule(path)) for network, pair in pairs for path in pair]
    layouts = {network: memory_format(network) for network, _ in pairs}
    try:
        for network, (path, path_of_norm) in pairs:
            convolution, norm = network.get_submodule(path), network.get_submodule(path_of_norm)
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and not norm.training:
                fused = fuse_conv_bn_eval(convolution, norm).requires_grad_(False)
                network.set_submodule(path, fused.to(memory_format=layouts[network]))
                network.set_submodule(path_of_norm, nn.Identity())
        yield
    finally:
        for network, path, module in own:
            network.set_submodule(path, module)


@torch.no_grad()
def _logits(defense: nn.Module, x: Tensor, draw: Draw | None) -> Tensor:
    logits: Tensor = defense(x, draw)
    return logits


def _alike(defense: nn.Module, x: Tensor, draw: Draw | None, usual: Tensor) -> bool:
    try:
        logits = _logits(defense, x, draw)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a stranger's forward may ask for the usual memory layout, as a view does, or for a batch norm that is gone
        return False
    return bool(((logits - usual).abs().max() <= CLOSE * usual.abs().max()).item())
