"""`fast` on a random defense: along the momentum of single draws, the best image judged on draws that no ascent takes."""

import torch
from torch import Tensor

from robench.attacks.ascent import Plan, TargetedLoss
from robench.attacks.judging import judge
from robench.attacks.momentum import FIRST_STEP, ONWARD_STEP, follow
from robench.attacks.registry import Found
from robench.attacks.transfer import mean_surrogate
from robench.attacks.views import Declared
from robench.defense import Defense
from robench.errors import UserError
from robench.losses import margin, sharp_cross_entropy
from robench.surrogate import declares
from robench.threat import ThreatModel


def fast_on_random(defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, *, examples: Tensor, seed: int, steps: int) -> Found:
    """Ascend by so many steps each on the cross-entropy, on the margin, through declared surrogates and onward from the best image.

    What is ascended is the defense with every aggregation in it replaced by the mean of logits. `Found.stages` counts the examples
    whose kept image is the ascent's.

    Raises:
        UserError: with fewer than 2 classes.
    """
    best, judged, surrogate = x.clone(), judge(defense, x, y, examples=examples, seed=seed), mean_surrogate(defense)
    if judged.shown.shape[-1] < 2:
        raise UserError("an attack needs at least 2 classes, and this defense has 1")
    ascents: list[tuple[str, Defense, TargetedLoss]] = [
        ("cross-entropy", surrogate, lambda logits, y, _target: sharp_cross_entropy(logits, y)),
        ("margin", surrogate, _margin),
        *([("declared surrogate", Declared(defense), _margin)] if declares(defense) else []),
        ("onward", surrogate, _margin),
    ]
    score, stages = judged.score, {name: torch.zeros_like(y, dtype=torch.bool) for name, *_ in ascents}
    for run, (name, view, loss) in enumerate(ascents, start=1):
        onward = name == "onward"
        start = best if onward else threat.random_start(x, examples, seed, f"start/fast/{run}")
        plan = Plan(loss, steps, first_step=ONWARD_STEP if onward else FIRST_STEP)
        x_adv = follow(plan, run, view, x, y, y, threat, start, examples, seed)
        reached = judge(defense, x_adv, y, examples=examples, seed=seed).score
        better = reached > score
        best = torch.where(better.reshape(-1, *[1] * (x.ndim - 1)), x_adv, best)
        # Not the larger of both, which a score that is not a number would be.
        score = torch.where(better, reached, score)
        stages = {other: marks & ~better for other, marks in stages.items()} | {name: better}
    return Found(best, stages)


def _margin(logits: Tensor, y: Tensor, _target: Tensor) -> Tensor:
    return margin(logits, y)
