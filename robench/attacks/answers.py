"""Answers that a layer gives before the defense's own: a network that is wrapped in a module without saying so.

What is done to a network's logits may hide their gradient, as a steep softmax beside a small smooth term does. A defense that tells its
structure is attacked on its predictors' logits; of what does not, every layer that returns a value for each class is tried.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional

from robench.attacks.layers import Forward, Place, Sight, watching
from robench.attacks.objective import spread_gradient
from robench.attacks.views import View
from robench.cost import count_backwards
from robench.defense import Defense, Plain
from robench.noise import Draw

KEEPS = {f"{step}Backward0" for step in ("Stack", "Unbind", "Unsqueeze", "Select", "View", "Clone")}
"""Steps from a layer's answer to a predictor's logits that leave its gradient as it is."""
EASY = KEEPS | {f"{step}Backward0" for step in ("Add", "Sub", "Mul", "Div", "Neg", "LogSoftmax", "Softmax", "Mean", "Sum", "T", "Addmm")}
"""Steps that do the same to every image's gradient, where they change the answer: other units, another layer. What is done by a
condition, or changes nothing on two images of noise, may hide the gradient of others."""

MOST = 4
"""Layers tried, the first in the forward."""


class Within(View):
    """A defense of which only what one layer answers is seen, as its one predictor.

    Args:
        defense: the defense.
        place: what a layer returns, of shape (B, classes).
    """

    def __init__(self, defense: Defense, place: Place) -> None:
        super().__init__(defense)
        self.place = place

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the layer's answer (B, 1, classes), with its gradient even where the defense takes none."""
        wanted, given, found = torch.is_grad_enabled(), list[tuple[Any, ...]](), list[Tensor]()

        def seen(place: Place, tensor: Tensor, *rest: Any) -> Tensor:
            if not place.returned:
                given.append((tensor, *rest))
            elif not found:
                found.append(tensor)
                if wanted and given and not tensor.requires_grad:
                    with torch.enable_grad():
                        found[0] = self.place.layer.forward(*given[0])
            return tensor

        with watching({self.place.layer}, seen):
            own = self.defense.predictors(x, draw)
        # A layer that is not asked for every image, or answers for others, is no answer to these.
        if not found or found[0].shape != (len(x), own.shape[2]):
            return own.mean(1, keepdim=True)
        # Elsewhere it is the member's answer that counts its passes.
        if wanted and found[0].requires_grad and self.place.layer not in self.defense.members():
            count_backwards(found[0])
        return found[0][:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        """Return the one answer: (B, 1, classes) -> (B, classes)."""
        return logits[:, 0]


@torch.enable_grad()
def answers(seen: Forward, predictors: Tensor, alike: float) -> tuple[Within, ...]:
    """Return views of the layers that answer with a value for each class and whose gradient is none of the predictors'.

    Left out are the layers of a defense within this one that tells its structure, and those on whose answer nothing depends.

    Args:
        seen: a forward on images (B, C, H, W) that take a gradient.
        predictors: the logits (B, N, classes) that came of it, with their graph.
        alike: gradients of at least this cosine, for all of the images, are taken for the same.
    """
    shape = (predictors.shape[0], predictors.shape[2])
    # What stands within a plain module is told by none.
    within = [] if isinstance(seen.defense, Plain) else [part for part in seen.defense.modules() if part is not seen.defense]
    told = {layer for part in within if isinstance(part, Defense) and not isinstance(part, Plain) for layer in part.modules()}
    sights = [sight for sight in seen.sights if sight.place.returned and sight.tensor.shape == shape and sight.place.layer not in told]
    # First what needs no backward pass: a network's last layer answers as the predictor that the network is.
    sights = [sight for sight in sights if not any(_is(sight.tensor, own) for own in predictors.unbind(1))]
    if not (sights := [sight for sight in sights if _matters(seen, sight, predictors)]):
        return ()
    told_gradients = [spread_gradient(logits, seen.x) for logits in (*predictors.unbind(1), predictors.float().mean(1))]
    found, found_gradients = list[Within](), list[Tensor]()
    for sight in sights:
        view = Within(seen.defense, sight.place)
        logits = sight.tensor if sight.tensor.requires_grad else view.predictors(seen.x, seen.draw)[:, 0]
        gradient = spread_gradient(logits, seen.x)
        known = found_gradients + (told_gradients if _is_easily(sight.tensor, predictors) else [])
        same = [functional.cosine_similarity(gradient, other, eps=1e-30).amin() >= alike for other in known]
        if bool((gradient != 0).any()) and not any(same):
            found.append(view)
            found_gradients.append(gradient)
    return tuple(found[:MOST])


def _is(answer: Tensor, own: Tensor) -> bool:
    """Say whether a predictor's logits are a layer's answer, gradient and all: the same values, and nothing done between the two."""
    if not bool((answer == own).all()):
        return False
    return not (answer.requires_grad and own.requires_grad) or _only_by(KEEPS, answer, own)


def _is_easily(answer: Tensor, predictors: Tensor) -> bool:
    """Say whether predictors' logits are a layer's answer in other units, or what other layers make of it, for every image alike."""
    if not (answer.requires_grad and predictors.requires_grad):
        return True
    return not any(bool((answer == own).all()) for own in predictors.unbind(1)) and _only_by(EASY, answer, predictors)


def _only_by(steps: set[str], answer: Tensor, own: Tensor) -> bool:
    """Say whether logits come of an answer, and by steps of these kinds alone."""
    after = dict[Node, set[Node]]()
    nodes = {node for node in [own.grad_fn] if node is not None}
    while nodes:
        edges = [(before, node) for node in nodes for before, _ in node.next_functions if before is not None]
        nodes = {before for before, _ in edges} - after.keys()
        for before, node in edges:
            after.setdefault(before, set()).add(node)
    nodes, between = {node for node in [answer.grad_fn] if node is not None}, set[Node]()
    while nodes:
        nodes = {node for earlier in nodes for node in after.get(earlier, ())} - between
        between |= nodes
    return (bool(between) or answer.grad_fn is own.grad_fn) and all(node.name() in steps for node in between)


def _matters(seen: Forward, sight: Sight, predictors: Tensor) -> bool:
    """Say whether predictors' logits depend on a layer's answer: as their graph tells, or as they change with the answer."""
    if not (sight.tensor.requires_grad and predictors.requires_grad):
        return True
    (gradient,) = torch.autograd.grad(predictors.sum(), sight.tensor, retain_graph=True, allow_unused=True)
    if gradient is not None:
        return True

    def turned(place: Place, tensor: Tensor, *_rest: Any) -> Tensor:
        return tensor.roll(1, -1) if place == sight.place else tensor

    with torch.no_grad(), watching({sight.place.layer}, turned):
        return not torch.equal(seen.defense.predictors(seen.x, seen.draw), predictors)
