"""What an attack ascends: the mean over noise draws of a loss on the defense's logits, and its gradient in the image (EOT).

EOT: Athalye et al., "Synthesizing robust adversarial examples", arXiv 1707.07397.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robench import replay
from robench.defense import Defense
from robench.noise import Draw

Objective = Callable[[Tensor], Tensor]
"""From logits (B, classes), or whatever a guide makes of the predictors, to the loss of each example (B,)."""

Guide = Callable[[Tensor], Tensor]
"""From the predictors' logits (B, N, classes) to what the objective sees in place of the defense's own logits, where an attack
ascends something else than the defense that it judges its success by."""


@dataclass(frozen=True)
class Point:
    """A defense's behaviour at a batch of images, averaged over draws.

    Attributes:
        loss: (B,) the mean loss over draws.
        gradient: (B, C, H, W) its gradient in the image; zeros where it was not asked for.
        wrong: bool (draws, B) misclassified, for each draw evaluated (one row for a deterministic defense).
    """

    loss: Tensor
    gradient: Tensor
    wrong: Tensor

    @property
    def fooled(self) -> Tensor:
        """Misclassified on every draw evaluated (for a deterministic defense: misclassified): bool (B,)."""
        return self.wrong.all(0)


def draw_numbers(step: int, draws: int, fixed: bool = False) -> range:
    """Return the numbers of the draws an attack averages at `step`: fresh at each step, or always the first ones."""
    return range(draws) if fixed else range(step * draws, (step + 1) * draws)


def evaluate_point(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    objective: Objective,
    *,
    examples: Tensor,
    seed: int,
    numbers: range,
    gradient: bool = True,
    guide: Guide | None = None,
    as_is: bool = False,
) -> Point:
    """Evaluate the objective and its gradient at images `x`, averaged over the noise draws of these numbers.

    A deterministic defense is evaluated once, whatever the draws. The weights take no gradient.

    Args:
        defense: the defense.
        x: (B, C, H, W) images.
        y: (B,) labels.
        objective: the loss of each example from the logits.
        examples: (B,) identities, which with `seed` and a draw number determine the noise.
        seed: the attack's seed.
        numbers: which draws.
        gradient: whether the gradient is wanted.
        guide: what the objective sees; the defense's logits by default. `Point.fooled` is always the defense's own.
        as_is: leaves a gradient's values that are not finite as they are.
    """
    numbers = numbers if defense.random else range(1)
    point = x.detach().requires_grad_(gradient)
    loss, wrong = torch.zeros(len(x), device=x.device), []
    # Of one draw nothing is added or divided: that would read the images' whole gradient twice more.
    total: Tensor | None = None
    for number in numbers:
        with torch.set_grad_enabled(gradient):
            draw = Draw(seed, examples, number) if defense.random else None
            if guide is None:
                logits = seen = replay.logits(defense, point, draw)
            else:
                predictors = replay.predictors(defense, point, draw)
                logits, seen = defense.aggregate(predictors.detach()), guide(predictors)
            each = objective(seen)
        if gradient:
            own = image_gradient(each, point, as_is=as_is)
            total = own.contiguous() if total is None else total.add_(own)
        loss += each.detach().float()
        wrong.append(logits.detach().argmax(1) != y)
    mean = x.new_zeros(()).expand_as(x) if total is None else total if len(numbers) == 1 else total / len(numbers)
    return Point(loss / len(numbers), mean, torch.stack(wrong))


@torch.no_grad()
def mean_logits(defense: Defense, x: Tensor, *, examples: Tensor, seed: int, numbers: range) -> Tensor:
    """Return the logits (B, classes) at images `x`, averaged over the draws of these numbers (one pass if not random)."""
    numbers = numbers if defense.random else range(1)
    each = [defense(x, Draw(seed, examples, number) if defense.random else None).float() for number in numbers]
    return torch.stack(each).mean(0)


def image_gradient(each: Tensor, point: Tensor, *, keep_graph: bool = False, as_is: bool = False) -> Tensor:
    """Return the gradient of the summed losses (B,) in the images; zeros where they do not depend differentiably on them.

    One value that is not finite would end every later step, so it counts as zero, unless the gradient is wanted `as_is`.
    """
    if not each.requires_grad:
        return torch.zeros_like(point)
    (gradient,) = torch.autograd.grad(each.sum(), point, allow_unused=True, retain_graph=keep_graph)
    if gradient is None:
        return torch.zeros_like(point)
    return gradient.detach() if as_is else gradient.detach().nan_to_num(0, 0, 0)


def spread_gradient(logits: Tensor, point: Tensor) -> Tensor:
    """Return the gradient (B, D) of the spread over the classes of logits (B, classes) in the images `point`; their graph is kept."""
    return image_gradient(logits.float().var(1), point, keep_graph=True).flatten(1)


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let no parameter take a gradient inside the block: a backward pass would spend time on it, and may leave it there."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
