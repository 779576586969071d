"""An attack for every day: margin losses, and passes spent only on the examples and target classes that still can fall.

After the ideas of Croce and Hein (targets, arXiv 2003.01690), Gao et al. (few targets by minimum margin, arXiv 2206.07314) and Liu
et al. (budget by difficulty, arXiv 2203.05154). An example's *reach* is the margin that is left to gain over what was gained
from the clean image so far: where that is large, more steps do not help, and where it is small, they are worth spending.
"""

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from robench.aggregate import mean_of_logits
from robench.attacks.ascent import Plan, ascend
from robench.attacks.bare import ways_past
from robench.attacks.fast_on_random import fast_on_random
from robench.attacks.momentum import FIRST_STEP, follow
from robench.attacks.objective import Guide, evaluate_point, image_gradient
from robench.attacks.registry import Found, register
from robench.attacks.shattered import smoothing, turns_away
from robench.attacks.square import square
from robench.attacks.steps import steepest
from robench.attacks.views import Declared, StraightThrough, instead
from robench.defense import Defense
from robench.errors import UserError
from robench.losses import margin
from robench.surrogate import declares
from robench.threat import ThreatModel

TIERS = ((1.0, 2, 10), (0.5, 4, 20), (0.2, 9, 20))
"""Which examples are attacked towards how many targets with how many steps: the last tier whose reach is not exceeded counts."""
ONWARD = ((0.25, 30, 1.0), (0.12, 60, 0.5), (0.05, 100, 1.0))
"""Ascents from the best image towards its nearest target: up to which reach, steps, first step in budgets."""
STAGES = ("margin", "mean of logits", "targets", "onward", "straight-through", "bare networks", "square")
DECLARED, WITHIN, SMOOTHED = "declared surrogate", "answer within", "smoothed"
"""Stages of the defenses that have what they are for."""
DUAL = {"Linf": 1.0, "L2": 2.0, "L1": float("inf")}
MASKED = 0.1
"""Where an ascent gains less than this share of what the clean image's gradient promises, that is taken to be masked."""
SUSPECT, NEAR = 0.5, Fraction(1, 16)
"""Where it gains less than this share, the promise is put to the test within this share of the budget, in which an honest model is
almost linear: one that keeps less than half of it has a gradient that misleads."""


@register("fast", version=2, random_version=3, paper="arXiv 2003.01690, 2206.07314, 2203.05154")
def fast(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    steps: int = 20,
    draws: int = 4,
    queries: int = 300,
) -> Found:
    """Attack with about a thirtieth of AutoAttack's passes; the robust accuracy is an upper bound as that of any attack.

    First `steps` on the margin of the prediction (and, where predictors are combined by anything but their mean, of the mean of their
    logits); then towards target classes in the order of their estimated distance, for the examples within reach; then onward from the
    best image, for those in close reach. Where the gradient leads nowhere, it is that of the surrogates which the defense declares, then
    made straight-through. Where the defense hides its member networks, their own gradient is taken (`bare`). Where it turns away within
    the budget, it is that of the defense smoothed. Where it still leads nowhere, or misleads, Square spends `queries`. A random defense
    is attacked along the momentum (`fast_on_random`), by ascents of ``steps * draws`` steps of one draw.

    Args beyond every attack's: `steps`; `draws`, the steps on a random defense for each on another; `queries`.

    Raises:
        UserError: with fewer than 2 classes.
    """
    if threat.epsilon == 0 or not len(x):
        return Found(x.clone())
    if defense.random:
        return fast_on_random(defense, x, y, threat, examples=examples, seed=seed, steps=steps * draws)
    search = _Search(defense, x, y, threat, examples, seed)
    if search.classes < 2:
        raise UserError("an attack needs at least 2 classes, and this defense has 1")
    search.ascend("margin", search.standing, steps)
    search.ascend("mean of logits", search.standing & search.combined, steps, guide=mean_of_logits)
    masked, misled = search.lost_gradients()
    order = search.nearest_targets(search.standing & ~masked & (search.reach < TIERS[0][0]))
    for rank in range(order.shape[1]):
        for (reach, targets, length), (closer, *_) in zip(TIERS, (*TIERS[1:], (-1.0,)), strict=True):
            if rank < targets:
                within = search.standing & ~masked & (search.reach < reach) & (search.reach >= closer)
                search.ascend("targets", within, length, target=order[:, rank])
    for reach, length, first_step in ONWARD:
        search.ascend("onward", search.standing & (search.reach < reach), length, target=search.goal, onward=first_step)
    if declares(defense):
        search.ascend(DECLARED, search.standing & masked, 2 * steps, view=Declared)
    search.ascend("straight-through", search.standing & masked, 2 * steps, view=StraightThrough)
    ways = ways_past(defense, x)
    if (networks := ways.networks) is not None:
        search.ascend("bare networks", search.standing, 2 * steps, guide=mean_of_logits, view=instead(networks))
    for answer in ways.answers:
        search.ascend(WITHIN, search.standing, steps, view=instead(answer), stops=False)
    search.follow(SMOOTHED, search.turned(), Plan(_untargeted, 4 * steps, draws, first_step=FIRST_STEP), smoothing(threat, x[0].numel()))
    index = (search.standing & (masked | misled)).nonzero()[:, 0]
    if queries and len(index):
        x_adv = square(defense, x[index], y[index], threat, examples=examples[index], seed=seed, queries=queries)
        search.see("square", index, x_adv)
    return search.found()


class _Search:
    """What is known of each example of a deterministic defense: its best image, the margin there, and the target class that came nearest.

    Attributes:
        combined: bool (B,), where the prediction is another than the mean of the predictors' logits.
        goal: int64 (B,), the class nearest to the prediction at the best image.
    """

    def __init__(self, defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, examples: Tensor, seed: int) -> None:
        self.defense, self.x, self.y, self.threat = defense, x, y, threat
        self.examples, self.seed = examples, seed
        self.best, self.runs = x.clone(), 0
        self.stages = {name: torch.zeros_like(y, dtype=torch.bool) for name in (*STAGES, *([DECLARED] if declares(defense) else []))}
        mean, self.logits = self._logits(x)
        self.classes = self.logits.shape[1]
        self.combined = ((self.logits.log_softmax(1) - mean.log_softmax(1)).abs() > 1e-3).any(1)
        self.clean_margin = self.margin = margin(self.logits, y)
        self.goal = self._runner_up(self.logits, y)
        self.fooled = self.logits.argmax(1) != y

    @property
    def standing(self) -> Tensor:
        """Which examples are not fooled yet: bool (B,)."""
        return ~self.fooled

    @property
    def reach(self) -> Tensor:
        """The margin left to gain over the margin gained so far: (B,)."""
        return -self.margin / (self.margin - self.clean_margin).clamp(min=1e-12)

    def found(self) -> Found:
        """Return the best images, and which stage was the first to fool each."""
        return Found(self.best, self.stages)

    @torch.no_grad()
    def _logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of the predictors' logits and the defense's own (B, classes)."""
        predictors = self.defense.predictors(x).float()
        return mean_of_logits(predictors), self.defense.aggregate(predictors).float()

    @staticmethod
    def _runner_up(logits: Tensor, y: Tensor) -> Tensor:
        return logits.scatter(1, y[:, None], -torch.inf).argmax(1)

    def ascend(
        self,
        name: str,
        held: Tensor,
        steps: int,
        *,
        target: Tensor | None = None,
        guide: Guide | None = None,
        onward: float | None = None,
        view: Callable[[Defense], Defense] = lambda defense: defense,
        stops: bool = True,
    ) -> None:
        """Ascend for the examples that bool (B,) `held` marks, from a random start, or from their best with `onward` as first step.

        An example stops at the first image that fools what is attacked; not where the view answers otherwise than the defense.
        """
        self.runs += 1
        index = held.nonzero()[:, 0]
        if not len(index):
            return
        x, y, examples = self.x[index], self.y[index], self.examples[index]
        loss = _untargeted if target is None else _targeted
        plan = Plan(loss, steps, guide=guide, first_step=2.0 if onward is None else onward, stops=stops)
        start = self.best[index] if onward is not None else self.threat.random_start(x, examples, self.seed, f"start/fast/{self.runs}")
        goal = (self.goal if target is None else target)[index]
        x_adv = ascend(plan, self.runs, view(self.defense), x, y, goal, self.threat, start, examples, self.seed)
        self.see(name, index, x_adv)

    def follow(self, name: str, held: Tensor, plan: Plan, view: Callable[[Defense], Defense]) -> None:
        """Ascend a random view along the momentum for the examples that bool (B,) `held` marks, from a random start."""
        self.runs += 1
        if len(index := held.nonzero()[:, 0]):
            x, y, examples = self.x[index], self.y[index], self.examples[index]
            start = self.threat.random_start(x, examples, self.seed, f"start/fast/{self.runs}")
            self.see(name, index, follow(plan, self.runs, view(self.defense), x, y, y, self.threat, start, examples, self.seed))

    def see(self, name: str, index: Tensor, x_adv: Tensor) -> None:
        """Keep those of the images of the examples `index` that are better than before."""
        logits = self._logits(x_adv)[1]
        reached, fooled = margin(logits, self.y[index]), logits.argmax(1) != self.y[index]
        better = fooled | (reached > self.margin[index])
        kept = index[better]
        self.best[kept], self.goal[kept] = x_adv[better], self._runner_up(logits, self.y[index])[better]
        self.margin = self.margin.index_copy(0, kept, reached[better])
        self.fooled[index[fooled]] = True
        self.stages.setdefault(name, torch.zeros_like(self.fooled))[index[fooled & better]] = True

    def lost_gradients(self) -> tuple[Tensor, Tensor]:
        """Return which standing examples have a masked gradient, and which others a misleading one: bool (B,) each.

        It is masked where less was gained than `MASKED` of what the clean image's gradient promises, or there is none.
        """
        masked, misled = torch.zeros_like(self.fooled), torch.zeros_like(self.fooled)
        if not len(index := self.standing.nonzero()[:, 0]):
            return masked, misled
        x, y = self.x[index], self.y[index]
        point = evaluate_point(
            self.defense, x, y, lambda logits: margin(logits, y), examples=self.examples[index], seed=self.seed, numbers=range(1)
        )
        slope = point.gradient.flatten(1).norm(p=DUAL[self.threat.norm], dim=1)
        gained, promise = (self.margin - self.clean_margin)[index], self.threat.epsilon * slope
        # Without a gradient, what was gained came from the random start.
        masked[index] = (gained < MASKED * promise) | (slope < 1e-12)
        suspect = ~masked[index] & (gained < SUSPECT * promise)
        if bool(suspect.any()):
            x, gradient, rows = x[suspect], point.gradient[suspect], index[suspect]
            near = self.threat.scaled(NEAR)
            there = near.project(x + near.epsilon * steepest(gradient, near.norm, x), x)
            rise = margin(self._logits(there)[1], self.y[rows]) - self.clean_margin[rows]
            misled[rows] = rise < (gradient * (there - x)).flatten(1).sum(1) / 2
        return masked, misled

    def turned(self) -> Tensor:
        """Return which standing examples have a gradient that turns away within the budget: bool (B,)."""
        found, index = torch.zeros_like(self.fooled), self.standing.nonzero()[:, 0]
        if len(index):
            found[index] = turns_away(self.defense, self.threat, self.seed, self.x[index], self.y[index], self.examples[index])
        return found

    def nearest_targets(self, held: Tensor) -> Tensor:
        """Return up to 9 wrong classes (B, T), the nearest first by the linearised distance at the clean image.

        The distance is the difference of logits over the dual norm of its gradient, as in FAB (arXiv 1907.02044, equation 7);
        where `held` is false, the order is that of the clean logits. At the best image so far the class that it was made towards would
        look nearest, and where that leads nowhere another is wanted.
        """
        count = min(TIERS[-1][1], self.classes - 1)
        order = self.logits.scatter(1, self.y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :count]
        index = held.nonzero()[:, 0]
        if not len(index):
            return order
        point, y = self.x[index].clone().requires_grad_(), self.y[index]
        logits = self.defense(point).float()
        distances = []
        for rank in range(count):
            gap = _targeted(logits, y, order[index, rank])
            gradient = image_gradient(gap, point, keep_graph=rank + 1 < count)
            dual = gradient.flatten(1).norm(p=DUAL[self.threat.norm], dim=1)
            distances.append(-gap.detach() / dual.clamp(min=1e-12))
        nearest = torch.stack(distances, dim=1).argsort(dim=1, stable=True)
        order[index] = order[index].gather(1, nearest)
        return order


def _targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]


def _untargeted(logits: Tensor, y: Tensor, _target: Tensor) -> Tensor:
    return margin(logits, y)
