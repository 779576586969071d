"""Momentum ascent for random defenses: a fresh draw at each step, and steps that shrink to nothing.

The gradient of one draw is a sample of what EOT (arXiv 1707.07397) averages. APGD keeps the iterate of highest loss and halves its step
where the loss stops rising; both follow the luck of the draws unless each step averages many. Momentum averages over the steps at no
cost, and the last iterate of shrinking steps needs no choosing.
"""

import math
from collections import deque
from dataclasses import replace

from torch import Tensor

from robench.attacks.ascent import Plan
from robench.attacks.pgd import Update, best_of, path, untargeted_plan
from robench.attacks.registry import register
from robench.attacks.steps import steepest
from robench.attacks.transfer import mean_surrogate
from robench.defense import Defense
from robench.errors import UserError
from robench.threat import ThreatModel

DECAY = 0.9
"""Of the momentum at each step."""
FIRST_STEP = 0.5
"""The first step's size in budgets; the last one's is zero."""
ONWARD_STEP = 0.1
"""The same from an image that is good already."""
SURROGATES = ("none", "mean")


@register("momentum", version=1, paper="arXiv 1710.06081", number="steps")
def momentum(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    steps: int,
    loss: str = "ce",
    draws: int = 1,
    surrogate: str = "none",
) -> Tensor:
    """Steepest ascent along the momentum of normalised gradients (MI-FGSM) from a random start, the step size a falling half cosine.

    A random defense is attacked on every example to the last step, and the last iterate is kept; of a deterministic one the best.

    Args beyond every attack's: `steps`, `loss` (ce, margin, dlr), `draws`, the fresh noise draws averaged at each step for a random
    defense, and `surrogate`: ``mean`` ascends the defense with every aggregation in it replaced by the mean of logits.

    Raises:
        UserError: for another surrogate.
    """
    if surrogate not in SURROGATES:
        raise UserError(f"surrogate {surrogate!r} is not one of {', '.join(SURROGATES)}")
    attacked = mean_surrogate(defense) if surrogate == "mean" else defense
    plan = replace(untargeted_plan(loss, steps, draws), first_step=FIRST_STEP)
    start = threat.random_start(x, examples, seed, "start/0")
    if defense.random:
        return follow(plan, 0, attacked, x, y, y, threat, start, examples, seed)
    return best_of(path(plan, 0, momentum_update(threat, plan), attacked, x, y, y, threat, start, examples, seed), random=False)


def follow(
    plan: Plan,
    run: int,
    defense: Defense,
    x: Tensor,
    y: Tensor,
    target: Tensor,
    threat: ThreatModel,
    start: Tensor,
    examples: Tensor,
    seed: int,
) -> Tensor:
    """Ascend once from `start` along the momentum, whether or not the defense is fooled on the way; return the last iterate."""
    iterates = path(plan, run, momentum_update(threat, plan), defense, x, y, target, threat, start, examples, seed)
    return deque(iterates, maxlen=1).pop()[0]


def momentum_update(threat: ThreatModel, plan: Plan) -> Update:
    """Return the update of the plan's ascent (Dong et al., arXiv 1710.06081, equation 6, with a step size that falls)."""
    average: Tensor | float = 0.0
    taken = 0

    def update(x_adv: Tensor, gradient: Tensor) -> Tensor:
        nonlocal average, taken
        # Of one size, so that a draw of large gradient does not decide.
        size = gradient.flatten(1).abs().mean(1).clamp(min=1e-30).reshape(-1, *[1] * (gradient.ndim - 1))
        average = DECAY * average + gradient / size
        length = plan.first_step * threat.epsilon * (1 + math.cos(math.pi * taken / plan.steps)) / 2
        taken += 1
        return x_adv + length * steepest(average, threat.norm, x_adv)

    return update
