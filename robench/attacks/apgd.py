"""APGD for Linf and L2 (Croce and Hein, arXiv 2003.01690, Algorithm 1) and for L1 (the same, arXiv 2103.01208, section 4).

An example of a deterministic defense stops at the first iterate that fools it. A random defense is attacked on every example
to the last step, and the iterate of highest mean loss over draws is kept: to be misclassified on a few draws is luck.
"""

from dataclasses import replace

from torch import Tensor

from robench.attacks.ascent import Plan, ascend
from robench.attacks.registry import register
from robench.attacks.runs import best_of_runs
from robench.defense import Defense
from robench.losses import Loss, cross_entropy, dlr, margin, targeted_dlr
from robench.threat import ThreatModel


@register("apgd-ce", version=1, paper="arXiv 2003.01690")
def apgd_ce(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    steps: int = 100,
    restarts: int = 1,
    draws: int = 1,
    rho: float = 0.75,
) -> Tensor:
    """APGD on the cross-entropy, from random starts.

    For L1, AutoAttack also starts at larger budgets and restarts 5 times; here one run at the budget is the default.

    Args beyond every attack's: `draws`, the noise draws averaged at each step for a random defense (EOT), and `rho`, the
    share of the steps between two checkpoints that must raise the loss for the step size to stay (Linf and L2).
    """
    return _apgd(Plan(_cross_entropy, steps, draws, rho), defense, x, y, threat, examples, seed, judge=cross_entropy, restarts=restarts)


@register("apgd-dlr", version=1, paper="arXiv 2003.01690")
def apgd_dlr(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    steps: int = 100,
    restarts: int = 1,
    draws: int = 1,
    rho: float = 0.75,
) -> Tensor:
    """APGD on the difference of logits ratio, which does not depend on the logits' scale; parameters as for `apgd_ce`.

    Raises:
        UserError: with fewer than 3 classes.
    """
    plan = Plan(lambda logits, y, _target: dlr(logits, y), steps, draws, rho)
    return _apgd(plan, defense, x, y, threat, examples, seed, judge=dlr, restarts=restarts)


@register("apgd-t", version=1, paper="arXiv 2003.01690")
def apgd_t(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    steps: int = 100,
    restarts: int = 1,
    draws: int = 1,
    rho: float = 0.75,
    targets: int = 9,
) -> Tensor:
    """APGD on the targeted difference of logits ratio, towards each of the wrong classes that score highest on the clean image.

    Losses towards different targets do not compare, so each run's result is judged by the margin loss (for a random defense its
    mean over draws that are the same for all targets), and the highest is kept.

    Args beyond those of `apgd_ce`: `targets`, how many wrong classes (all of them, where there are fewer).

    Raises:
        UserError: with fewer than 4 classes.
    """
    plan = Plan(targeted_dlr, steps, draws, rho)
    return _apgd(plan, defense, x, y, threat, examples, seed, judge=margin, restarts=restarts, targets=targets)


def apgd_narrowing(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    steps: int = 100,
    restarts: int = 1,
    draws: int = 1,
    targets: int = 0,
) -> Tensor:
    """APGD as AutoAttack runs it for L1: three tenths of the steps at 3 times the budget, three at twice, and the rest at it.

    Each part starts from the projection of the best image before it (arXiv 2103.01208, section 4). The parameters are those
    of `apgd_t`, except that with no targets it ascends the cross-entropy.

    Raises:
        UserError: with targets and fewer than 4 classes.
    """
    wide = 3 * steps // 10
    parts = ((3, wide), (2, wide), (1, steps - 2 * wide)) if wide else ((1, steps),)
    plan, judge = (Plan(targeted_dlr, steps, draws), margin) if targets else (Plan(_cross_entropy, steps, draws), cross_entropy)
    return _apgd(plan, defense, x, y, threat, examples, seed, judge=judge, restarts=restarts, targets=max(targets, 1), parts=parts)


def _cross_entropy(logits: Tensor, y: Tensor, _target: Tensor) -> Tensor:
    return cross_entropy(logits, y)


def _apgd(
    plan: Plan,
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    examples: Tensor,
    seed: int,
    *,
    judge: Loss,
    restarts: int,
    targets: int = 1,
    parts: tuple[tuple[int, int], ...] = (),
) -> Tensor:
    """Run APGD towards every target from every restart, on the examples not yet fooled, and keep the best result of each.

    A run may have several `parts`, each of a multiple of the budget and a number of steps, from where the one before ended.
    """
    if threat.epsilon == 0:
        return x.clone()
    parts = parts or ((1, plan.steps),)

    def run(number: int, stream: str, index: Tensor, target: Tensor) -> Tensor:
        images, labels, names = x[index], y[index], examples[index]
        x_adv = threat.scaled(parts[0][0]).random_start(images, names, seed, f"start/{stream}")
        for place, (multiple, steps) in enumerate(parts):
            within, part = threat.scaled(multiple), replace(plan, steps=steps, stops=multiple == 1)
            start = within.project(x_adv, images) if place else x_adv
            x_adv = ascend(part, len(parts) * number + place, defense, images, labels, target, within, start, names, seed)
        return x_adv

    return best_of_runs(
        run,
        defense,
        x,
        y,
        examples=examples,
        seed=seed,
        judge=judge,
        numbers=plan.numbers(len(parts) * targets * restarts, 0),
        targets=targets,
        restarts=restarts,
    )
