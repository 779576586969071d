"""The attack built from what the defense tells of itself: the worst case per example over many compositions.

After Tramer et al., "On adaptive attacks to adversarial example defenses", arXiv 2002.08347. A composition ascends what it makes of
the predictors' logits: by APGD, and stops at what fools the defense itself, or, where the noise is another at each step, along the
momentum. For CrossMax the mean of the predictors' logits is the one that broke it (arXiv 2411.14834, in the form that stays inside the
budget of the clean image).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional

from robench.aggregate import mean_of_logits, mean_of_probabilities
from robench.attacks.ascent import Plan, TargetedLoss, ascend
from robench.attacks.bare import Ways, ways_past
from robench.attacks.fast import fast
from robench.attacks.judging import judge
from robench.attacks.momentum import FIRST_STEP, ONWARD_STEP, follow
from robench.attacks.objective import Guide, evaluate_point
from robench.attacks.registry import Found, register
from robench.attacks.reweighing import SHARES, reweighed
from robench.attacks.shattered import smoothing, turns_away
from robench.attacks.square import square
from robench.attacks.transfer import mean_surrogate
from robench.attacks.views import Declared, StraightThrough, instead
from robench.defense import Defense
from robench.errors import UserError
from robench.losses import cross_entropy, margin, sharp_cross_entropy, spread
from robench.noise import Draw
from robench.surrogate import declares
from robench.threat import ThreatModel


@dataclass(frozen=True)
class Composition:
    """One way to attack.

    Attributes:
        name: what the record calls it.
        loss: is ascended, on what the guide shows.
        guide: what is made of the predictors' logits; None for the defense's own logits.
        targets: wrong classes, an ascent towards each; 1 where the loss has no target.
        fixed: whether a random defense's draws stay the same at every step.
        view: what is differentiated in the defense's place.
        onward: starts from the best image so far, instead of a random one.
        stops: whether it stops at the first image that fools what is attacked; not where the view answers otherwise than the defense.
        applies: says for which examples (B,) it is worth its passes; all by default.
    """

    name: str
    loss: TargetedLoss
    guide: Guide | None = None
    targets: int = 1
    fixed: bool = False
    view: Callable[[Defense], Defense] = lambda defense: defense
    onward: bool = False
    stops: bool = True
    applies: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


@register("adaptive", version=3, random_version=4, paper="arXiv 2002.08347, 2211.08008")
def adaptive(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    steps: int = 100,
    draws: int = 16,
    targets: int = 3,
    queries: int = 1000,
) -> Found:
    """Attack through the prediction, its surrogates, its members and its gradient-free end, and keep the worst of each example.

    The defense is put to `fast` first. An example is done when it is misclassified: on all of twenty judging draws for a random
    defense, of which otherwise the image nearest to it is kept. `Found.stages` counts the examples that a composition was the first
    to finish; for a random defense those whose kept image is the composition's.

    Args beyond every attack's: `steps` of each ascent (of one draw each, for a random defense), `draws` averaged at each step where they
    are fixed or onward from the best image (both by a quarter of the steps) or smooth the defense, `targets`, the most likely wrong
    classes that are aimed at, and `queries` of the Square attack at the end.
    """
    if threat.epsilon == 0 or not len(x):
        return Found(x.clone())
    best, run = _Best(defense, x, y, examples, seed), count()
    if best.classes < 2:
        raise UserError("an attack needs at least 2 classes, and this defense has 1")
    index = best.pending.nonzero()[:, 0]
    if len(index):
        images = fast(defense, x[index], y[index], threat, examples=examples[index], seed=seed, queries=min(queries, 300)).x_adv
        best.see("fast", index, images)
    best.stages.setdefault("fast", torch.zeros_like(best.pending))
    smooth = smoothing(threat, x[0].numel())
    for composition in compositions(defense, best.predictors, min(targets, best.classes - 1), threat, smooth, seed, ways_past(defense, x)):
        _run(composition, next(run) * max(targets, 1), defense, x, threat, best, seed, steps, draws)
    index = best.pending.nonzero()[:, 0]
    if queries and len(index):
        best.see("square", index, square(defense, x[index], y[index], threat, examples=examples[index], seed=seed, queries=queries))
    best.stages.setdefault("square", torch.zeros_like(best.pending))
    return Found(best.x_adv, best.stages)


def _run(
    composition: Composition, run: int, defense: Defense, x: Tensor, threat: ThreatModel, best: "_Best", seed: int, steps: int, draws: int
) -> None:
    """Ascend by one composition, towards each of its targets, on the examples that are not done and that it applies to."""
    held, before, y, examples = best.pending.clone(), best.x_adv.clone(), best.y, best.examples
    if composition.applies is not None and bool(held.any()):
        held[best.pending] = composition.applies(x[held], y[held], examples[held])
    climb, plan = _way(composition, defense, steps, draws)
    for rank in range(composition.targets):
        index = (held & best.pending).nonzero()[:, 0]
        if len(index):
            start = before[index]
            if not composition.onward:
                start = threat.random_start(x[index], examples[index], seed, f"start/{composition.name}/{rank}")
            view, goal = composition.view(defense), best.ranked[index, rank]
            x_adv = climb(plan, run + rank, view, x[index], y[index], goal, threat, start, examples[index], seed)
            best.see(composition.name, index, x_adv)
    best.stages.setdefault(composition.name, torch.zeros_like(best.pending))


def _way(composition: Composition, defense: Defense, steps: int, draws: int) -> tuple[Callable[..., Tensor], Plan]:
    """Return the ascent and its plan: APGD, and where the noise is another at each step the momentum, thorough only from the best image."""
    plan = Plan(composition.loss, steps, draws, guide=composition.guide, fixed=composition.fixed, stops=composition.stops)
    few = -(-steps // 4)
    if not defense.random:
        return ascend, plan
    if composition.fixed:
        return ascend, replace(plan, steps=few)
    if composition.onward:
        return follow, replace(plan, steps=few, first_step=ONWARD_STEP)
    return follow, replace(plan, draws=1, first_step=FIRST_STEP)


class _Best:
    """The best image of each example so far, how good it is, and whose it is."""

    def __init__(self, defense: Defense, x: Tensor, y: Tensor, examples: Tensor, seed: int) -> None:
        self.defense, self.y, self.examples, self.seed = defense, y, examples, seed
        self.x_adv = x.clone()
        self.stages: dict[str, Tensor] = {}
        judged = judge(defense, x, y, examples=examples, seed=seed)
        self.share, self.score = judged.share, judged.score
        self.predictors, self.classes = judged.shown.shape[1:]
        self.ranked = judged.shown.mean(1).scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)

    @property
    def pending(self) -> Tensor:
        """Which examples are not yet misclassified on every judging draw: bool (B,)."""
        return self.share < 1

    def see(self, name: str, index: Tensor, x_adv: Tensor) -> None:
        """Keep what is better than before among images of the examples `index`."""
        judged = judge(self.defense, x_adv, self.y[index], examples=self.examples[index], seed=self.seed)
        better = judged.score > self.score[index]
        chosen = index[better]
        self.x_adv[chosen], self.share[chosen], self.score[chosen] = x_adv[better], judged.share[better], judged.score[better]
        for marks in self.stages.values():
            marks[chosen] = False
        marks = self.stages.setdefault(name, torch.zeros_like(self.pending))
        marks[chosen] = (judged.share[better] == 1) | self.defense.random


def _towards(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return by how much, in spreads, the target's logit passes the label's: (B, C) -> (B,)."""
    gain = logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])
    return (gain / spread(logits))[:, 0]


def _all_towards(predictors: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return the mean over the predictors (B, N, C) of `_towards`, where one that is won over counts no further: (B,)."""
    count = predictors.shape[1]
    each = _towards(predictors.flatten(0, 1), y.repeat_interleave(count), target.repeat_interleave(count))
    return each.reshape(-1, count).clamp(max=1).mean(1)


def _members_margins(predictors: Tensor, y: Tensor, _target: Tensor) -> Tensor:
    """Return the logistic loss of the predictors' margins, whose gradient weighs those that still stand: (B, N, C) -> (B,)."""
    count = predictors.shape[1]
    flat = predictors.flatten(0, 1)
    margins = margin(flat, y.repeat_interleave(count)) / spread(flat)[:, 0]
    return -functional.softplus(-4 * margins).reshape(-1, count).mean(1)


def _ce(logits: Tensor, y: Tensor, _target: Tensor) -> Tensor:
    return cross_entropy(logits.float(), y)


def _sharp_ce(logits: Tensor, y: Tensor, _target: Tensor) -> Tensor:
    return sharp_cross_entropy(logits, y)


def _margin(logits: Tensor, y: Tensor, _target: Tensor) -> Tensor:
    return margin(logits, y) / spread(logits)[:, 0]


def _reweighed(defense: Defense, share: float) -> TargetedLoss:
    return lambda predictors, y, _target: reweighed(predictors, y, defense.aggregate, share)


def _member(number: int) -> Guide:
    return lambda predictors: predictors[:, number]


def compositions(
    defense: Defense, predictors: int, towards: int, threat: ThreatModel, smooth: Callable[[Defense], Defense], seed: int, ways: Ways
) -> list[Composition]:
    """Return the compositions in the order they are run, the likeliest to break the defense first.

    Args:
        defense: the defense.
        predictors: how many it has.
        towards: how many wrong classes are aimed at.
        threat: the threat model.
        smooth: takes a defense to what smooths its shattered gradient.
        seed: the attack's seed.
        ways: to the gradient of the defense's networks, where it hides that.
    """
    direct = [Composition("prediction", _ce), Composition("prediction towards targets", _towards, targets=towards)]
    # The aggregation of one predictor may hide its gradient too, as a softmax does.
    mean = Composition("mean of logits", _sharp_ce, mean_of_logits, applies=partial(_is_no_mean, defense, seed))
    structure = [
        Composition("mean of probabilities", _sharp_ce, mean_of_probabilities),
        Composition("members' margins", _members_margins, lambda shown: shown),
        Composition("all members towards targets", _all_towards, lambda shown: shown, targets=towards),
        *(Composition(f"members reweighed, share {share:g}", _reweighed(defense, share), lambda shown: shown) for share in SHARES),
        *(Composition(f"member {number + 1}", _sharp_ce, _member(number)) for number in range(predictors)),
    ] if predictors > 1 else []  # fmt: skip
    within = partial(_hides_within, defense, seed)
    inner = [
        Composition("mean of innermost logits", _sharp_ce, view=mean_surrogate, stops=False, applies=within),
        Composition("innermost margins", _members_margins, lambda shown: shown, view=mean_surrogate, stops=False, applies=within),
        Composition(
            "all innermost towards targets", _all_towards, lambda shown: shown, towards, view=mean_surrogate, stops=False, applies=within
        ),
    ] if defense.nested else []  # fmt: skip
    frozen = [Composition("mean of logits, fixed noise", _sharp_ce, mean_of_logits, fixed=True)] if defense.random else []
    declared = [Composition("declared surrogate", _margin, view=Declared)] if declares(defense) else []
    if declared and predictors > 1:
        declared.append(Composition("declared surrogate, mean of logits", _sharp_ce, mean_of_logits, view=Declared))
    flat = partial(_has_flat_steps, defense, seed)
    straight = [Composition("straight-through prediction", _margin, view=StraightThrough, applies=flat)]
    if predictors > 1:
        straight.append(Composition("straight-through mean of logits", _margin, mean_of_logits, view=StraightThrough, applies=flat))
    alone = [
        Composition("bare networks", _margin, mean_of_logits, view=instead(ways.networks)),
        Composition("bare networks towards targets", _towards, mean_of_logits, towards, view=instead(ways.networks)),
    ] if ways.networks is not None else []  # fmt: skip
    within_it = [
        composition
        for number, answer in enumerate(ways.answers, 1)
        for composition in (
            Composition(f"answer within {number}", _margin, view=instead(answer), stops=False),
            Composition(f"answer within {number} towards targets", _towards, None, towards, view=instead(answer), stops=False),
        )
    ]
    over_noise = Composition("smoothed prediction", _margin, view=smooth, applies=partial(turns_away, defense, threat, seed))
    onward = Composition("onward from the best", _margin, onward=True)
    first = [*inner, mean, *frozen, *direct] if defense.random else [*direct, *inner, mean]
    return [*first, *structure, *declared, *straight, *alone, *within_it, over_noise, onward]


def _gradient(defense: Defense, seed: int, x: Tensor, y: Tensor, examples: Tensor) -> Tensor:
    """Return the gradient of the margin in the image, flattened to (B, D), on one draw."""
    point = evaluate_point(defense, x, y, lambda logits: margin(logits, y), examples=examples, seed=seed, numbers=range(1))
    return point.gradient.flatten(1)


@torch.no_grad()
def _is_no_mean(defense: Defense, seed: int, x: Tensor, _y: Tensor, examples: Tensor) -> Tensor:
    """Say where the prediction is another than the mean of the predictors' logits, whose ascent would be the prediction's own."""
    predictors = defense.predictors(x, Draw(seed, examples) if defense.random else None)
    pair = [logits.float().log_softmax(-1) for logits in (defense.aggregate(predictors), mean_of_logits(predictors))]
    return ((pair[0] - pair[1]).abs() > 1e-3).any(-1)


@torch.no_grad()
def _hides_within(defense: Defense, seed: int, x: Tensor, _y: Tensor, examples: Tensor) -> Tensor:
    """Say where the mean of the innermost predictors' logits is another than that of the predictors'."""
    draw = Draw(seed, examples) if defense.random else None
    pair = [mean_of_logits(logits).float().log_softmax(-1) for logits in (defense.predictors(x, draw), defense.innermost(x, draw))]
    return ((pair[0] - pair[1]).abs() > 1e-3).any(-1)


def _has_flat_steps(defense: Defense, seed: int, x: Tensor, y: Tensor, examples: Tensor) -> Tensor:
    """Say where the gradient is another when steps without gradient are given the identity's."""
    own, through = (_gradient(view, seed, x, y, examples) for view in (defense, StraightThrough(defense)))
    differs: Tensor = (through - own).norm(dim=1) > 1e-3 * through.norm(dim=1)
    return differs
