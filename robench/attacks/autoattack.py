"""AutoAttack (Croce and Hein, arXiv 2003.01690, section 4) on this package's own attacks, with AutoAttack's parameters.

Each stage runs on what those before it did not fool. It differs from the authors' code in what it must: no result depends on the
batch or on a global generator, and a random defense is attacked on every example. Its FAB takes one pass an iteration less.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from robench.attacks.apgd import apgd_ce, apgd_dlr, apgd_narrowing, apgd_t
from robench.attacks.fab import fab_t
from robench.attacks.objective import Point, evaluate_point, frozen, mean_logits
from robench.attacks.registry import Found, register
from robench.attacks.square import square
from robench.defense import Defense
from robench.losses import cross_entropy
from robench.threat import ThreatModel

Stages = Mapping[str, Callable[..., Tensor]]
"""Attacks by name, in the order run, with all their parameters set."""

JUDGING_DRAWS = 10
"""At least so many draws judge a random defense after each stage."""
FIRST_JUDGING_DRAW = 2**30
"""Beyond the numbers of all draws that the stages take."""


@register("autoattack", version=2, paper="arXiv 2003.01690")
def autoattack(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    steps: int = 100,
    queries: int = 5000,
    draws: int = 1,
) -> Found:
    """The standard version: APGD-CE, targeted APGD, targeted FAB and Square, each on what those before it did not fool.

    Towards 9 targets, or all wrong classes where there are fewer; for L1, targeted APGD takes 5, APGD-CE starts
    5 times, and both start at larger budgets (`apgd_narrowing`).
    With 3 classes APGD-DLR takes the place of targeted APGD, and with 2 there is neither. Where the logits have no gradient, the
    first three stages find little but their random starts, and Square goes on.

    A random defense is attacked on every example by every stage. Their images are compared by the mean cross-entropy over
    draws that are the same for all, and the highest is kept; it counts as fooled where every one of these draws is wrong.
    `Found.counted` is AutoAttack's own count: an example is out after one wrong draw, of which the clean image has one and each
    stage's image another. It is lower than the accuracy over fresh draws, since the examples have several chances to fail.

    Args beyond every attack's: `steps` of the first three stages; `queries` of Square; `draws`, the noise draws averaged at each
    step and query for a random defense.

    Returns:
        Where a deterministic defense is not fooled, the image of highest cross-entropy; and what each stage was the first to fool.
    """
    classes = _classes(defense, x, examples, seed)
    if threat.norm == "L1":
        first = partial(apgd_narrowing, steps=steps, restarts=5, draws=draws)
        targeted = partial(apgd_narrowing, steps=steps, targets=5, draws=draws)
    else:
        first, targeted = partial(apgd_ce, steps=steps, draws=draws), partial(apgd_t, steps=steps, draws=draws)
    second = {"apgd-t": targeted} if classes > 3 else {"apgd-dlr": partial(apgd_dlr, steps=steps, draws=draws)}
    stages: Stages = {
        "apgd-ce": first,
        **(second if classes > 2 else {}),
        "fab-t": partial(fab_t, steps=steps, draws=draws),
        "square": partial(square, queries=queries, draws=draws),
    }
    return _run(stages, defense, x, y, threat, examples, seed, draws)


@register("autoattack-rand", version=2, paper="arXiv 2003.01690")
def autoattack_rand(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    steps: int = 100,
    draws: int = 20,
) -> Found:
    """The version for random defenses: APGD-CE and APGD-DLR with losses and gradients averaged over draws.

    Unlike the authors', it attacks every example to the last step in both stages, keeps the iterate of highest mean loss, and of
    the two images the one of higher mean cross-entropy over draws that are the same for both. With 2 classes there is no
    APGD-DLR. On a deterministic defense each stage runs on what the one before did not fool. AutoAttack's own count, by one draw
    after each stage, is `Found.counted` as in `autoattack`.

    Args beyond every attack's: `steps` of each stage and `draws`, the noise draws averaged at each.
    """
    stages: Stages = {
        "apgd-ce": partial(apgd_ce, steps=steps, draws=draws),
        **({"apgd-dlr": partial(apgd_dlr, steps=steps, draws=draws)} if _classes(defense, x, examples, seed) > 2 else {}),
    }
    return _run(stages, defense, x, y, threat, examples, seed, draws)


def _classes(defense: Defense, x: Tensor, examples: Tensor, seed: int) -> int:
    return mean_logits(defense, x[:1], examples=examples[:1], seed=seed, numbers=range(1)).shape[1]


def _run(stages: Stages, defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, examples: Tensor, seed: int, draws: int) -> Found:
    """Run the stages in order and keep each example's best image, the clean one included."""
    judging = range(FIRST_JUDGING_DRAW, FIRST_JUDGING_DRAW + max(draws, JUDGING_DRAWS))

    def look(images: Tensor, index: Tensor) -> Point:
        return evaluate_point(
            defense,
            images,
            y[index],
            lambda logits: cross_entropy(logits, y[index]),
            examples=examples[index],
            seed=seed,
            numbers=judging,
            gradient=False,
        )

    everything = torch.arange(len(x), device=x.device)
    with frozen(defense):
        clean = look(x, everything)
        x_adv, loss, fooled, found = x.clone(), clean.loss, clean.fooled, dict[str, Tensor]()
        standing = ~clean.wrong[0]
        counted = {"clean": standing}
        for name, stage in stages.items():
            found[name] = torch.zeros_like(fooled)
            counted[name] = standing = standing.clone()
            index = everything if defense.random else (~fooled).nonzero()[:, 0]
            if not len(index) or threat.epsilon == 0:
                continue
            images = stage(defense, x[index], y[index], threat, examples=examples[index], seed=seed)
            point = look(images, index)
            # Each look takes a draw of its own, as AutoAttack does: on the same one an example would have the same luck again.
            standing[index] &= ~point.wrong[len(found) % len(point.wrong)]
            found[name][index] = point.fooled & ~fooled[index]
            better = point.loss > loss[index]
            if not defense.random:
                better |= point.fooled
            kept = index[better]
            x_adv[kept], loss[kept] = images[better], point.loss[better]
            fooled |= found[name]
    return Found(x_adv, found, counted if defense.random else {})
