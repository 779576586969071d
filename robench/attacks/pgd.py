"""FGSM (arXiv 1412.6572), iterated FGSM (1607.02533), PGD (1706.06083) and PGD with Adam updates (1811.09300, section 4)."""

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from itertools import chain

import torch
from torch import Tensor

from robench.attacks.ascent import Plan
from robench.attacks.objective import Point, draw_numbers, evaluate_point
from robench.attacks.registry import register
from robench.attacks.steps import steepest
from robench.defense import Defense
from robench.losses import loss_named
from robench.threat import ThreatModel

Update = Callable[[Tensor, Tensor], Tensor]
"""From the current images and their gradient to the next, not yet projected."""


@register("fgsm", version=1, paper="arXiv 1412.6572")
def fgsm(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    loss: str = "ce",
    draws: int = 1,
) -> Tensor:
    """One steepest-ascent step of the whole budget from the clean image.

    Args beyond every attack's: `loss` (ce, margin, dlr) and `draws`, the noise draws averaged for a random defense.
    """
    update = sign_update(threat, threat.epsilon)
    return _ascend(defense, x, y, threat, examples=examples, seed=seed, steps=1, loss=loss, draws=draws, update=update)


@register("ifgsm", version=1, paper="arXiv 1607.02533", number="steps")
def ifgsm(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    steps: int,
    step_size: float | None = None,
    loss: str = "ce",
    draws: int = 1,
) -> Tensor:
    """Iterated steepest ascent from the clean image; step size ``2.5 * budget / steps`` unless given, on the range [0, 1]."""
    update = sign_update(threat, default_step_size(threat, steps, step_size))
    return _ascend(defense, x, y, threat, examples=examples, seed=seed, steps=steps, loss=loss, draws=draws, update=update)


@register("pgd", version=1, paper="arXiv 1706.06083", number="steps")
def pgd(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    steps: int,
    step_size: float | None = None,
    restarts: int = 1,
    loss: str = "ce",
    draws: int = 1,
) -> Tensor:
    """Projected steepest ascent from random starts; step size ``2.5 * budget / steps`` unless given, on the range [0, 1]."""
    update = sign_update(threat, default_step_size(threat, steps, step_size))
    return _restarted(defense, x, y, threat, examples, seed, steps, restarts, loss, draws, lambda: update)


@register("pgd-adam", version=1, paper="arXiv 1811.09300", number="steps")
def pgd_adam(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    steps: int,
    step_size: float | None = None,
    restarts: int = 1,
    loss: str = "ce",
    draws: int = 1,
) -> Tensor:
    """Projected ascent by Adam (arXiv 1412.6980) on the image from random starts: what arXiv 1811.09300 calls PGD.

    Its learning rate is not stated there; ``2.5 * budget / steps`` per value for Linf (Adam's steps are about that size in each
    value), and the same in units of the budget over the root of the number of values for L2, over that number for L1.
    """
    values = x[0].numel() if len(x) else 1
    spread = {"Linf": 1.0, "L2": values**0.5, "L1": float(values)}[threat.norm]
    rate = default_step_size(threat, steps, step_size) / spread
    return _restarted(defense, x, y, threat, examples, seed, steps, restarts, loss, draws, lambda: _adam_update(rate))


def default_step_size(threat: ThreatModel, steps: int, given: float | None) -> float:
    """Return the `given` step size, or else ``2.5 * budget / steps``."""
    return 2.5 * threat.epsilon / steps if given is None else given


def sign_update(threat: ThreatModel, step_size: float) -> Update:
    """Return the update that takes one step of steepest ascent of this size in the threat model's norm."""
    return lambda x_adv, gradient: steepest(gradient, threat.norm, x_adv).mul_(step_size).add_(x_adv)


def _adam_update(rate: float) -> Update:
    moments: dict[str, Tensor] = {}
    count = 0

    def update(x_adv: Tensor, gradient: Tensor) -> Tensor:
        nonlocal count
        count += 1
        first = 0.9 * moments.get("first", torch.zeros_like(x_adv)) + 0.1 * gradient
        second = 0.999 * moments.get("second", torch.zeros_like(x_adv)) + 0.001 * gradient**2
        moments.update(first=first, second=second)
        # The gradients of a saturated loss are tiny; Adam's usual 1e-8 would swallow them.
        return x_adv + rate * (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-20)

    return update


def _restarted(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    examples: Tensor,
    seed: int,
    steps: int,
    restarts: int,
    loss: str,
    draws: int,
    new_update: Callable[[], Update],
) -> Tensor:
    """Ascend from `restarts` random starts and keep each example's best result over all of them."""
    plan, starts = untargeted_plan(loss, steps, draws), (threat.random_start(x, examples, seed, f"start/{r}") for r in range(restarts))
    paths = (path(plan, run, new_update(), defense, x, y, y, threat, start, examples, seed) for run, start in enumerate(starts))
    return best_of(chain.from_iterable(paths), defense.random)


def _ascend(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    steps: int,
    loss: str,
    draws: int,
    update: Update,
) -> Tensor:
    """Ascend from the clean images and return the last iterate, unseen, as FGSM and its iterated form do."""
    untargeted, x_adv = loss_named(loss), x
    for step in range(steps):
        point = evaluate_point(
            defense,
            x_adv,
            y,
            lambda logits: untargeted(logits, y),
            examples=examples,
            seed=seed,
            numbers=draw_numbers(step, draws),
        )
        x_adv = threat.project(update(x_adv, point.gradient), x)
    return x_adv


def untargeted_plan(loss: str, steps: int, draws: int) -> Plan:
    """Return the plan of ascending the loss of this name (ce, margin, dlr) on the defense's own logits."""
    untargeted = loss_named(loss)
    return Plan(lambda logits, y, _target: untargeted(logits, y), steps, draws)


def path(
    plan: Plan,
    run: int,
    update: Update,
    defense: Defense,
    x: Tensor,
    y: Tensor,
    target: Tensor,
    threat: ThreatModel,
    start: Tensor,
    examples: Tensor,
    seed: int,
) -> Iterator[tuple[Tensor, Point]]:
    """Yield each iterate and the defense's behaviour there, from the start to the last; `run` keeps apart the draws of several paths."""
    x_adv, bounds = start, threat.bounds(x)
    for step in range(plan.steps + 1):
        point = evaluate_point(
            defense,
            x_adv,
            y,
            lambda seen: plan.loss(seen, y, target),
            examples=examples,
            seed=seed,
            numbers=plan.numbers(run, step),
            gradient=step < plan.steps,
            guide=plan.guide,
        )
        yield x_adv, point
        if step < plan.steps:
            x_adv = threat.project(update(x_adv, point.gradient), x, bounds=bounds)


def best_of(iterates: Iterable[tuple[Tensor, Point]], random: bool) -> Tensor:
    """Return each example's best image (B, C, H, W) among at least one iterate and the defense's behaviour there.

    A misclassified iterate is better than a classified one, then higher loss is; for a random defense only the mean loss over
    draws counts: being misclassified on a few draws is luck.
    """
    return reduce(lambda old, new: _better(old, new, random), iterates)[0]


def _better(old: tuple[Tensor, Point], new: tuple[Tensor, Point], random: bool) -> tuple[Tensor, Point]:
    gains = new[1].loss > old[1].loss
    if not random:
        gains = (new[1].fooled & ~old[1].fooled) | (gains & (new[1].fooled == old[1].fooled))
    choose = gains.reshape(-1, *[1] * (new[0].ndim - 1))
    loss, wrong = torch.where(gains, new[1].loss, old[1].loss), torch.where(gains, new[1].wrong, old[1].wrong)
    return torch.where(choose, new[0], old[0]), Point(loss, old[1].gradient, wrong)
