"""The ascent of APGD for Linf and L2 (Croce and Hein, arXiv 2003.01690, Algorithm 1) and for L1 (the same, arXiv 2103.01208, section 4).

What is ascended is a `Plan`: an attack's own loss on the defense's logits, or on whatever it makes of the predictors.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from robench.attacks import packing
from robench.attacks.objective import Guide, Objective, draw_numbers, evaluate_point
from robench.attacks.steps import steepest
from robench.defense import Defense
from robench.threat import Norm, ThreatModel

TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From logits (B, classes), labels (B,) and target classes (B,) to the loss of each example (B,)."""

MOMENTUM = 0.75


@dataclass(frozen=True)
class Plan:
    """What is ascended, and how.

    Attributes:
        loss: is ascended.
        steps: of the ascent.
        draws: noise draws averaged at each step, for a random defense.
        rho: the share of the steps between two checkpoints that must raise the loss for the step size to stay (Linf and L2).
        guide: what the loss sees in place of the defense's logits.
        fixed: whether every step takes the same draws.
        first_step: the first step's size in budgets (Linf and L2); smaller where the start is worth keeping near.
        stops: whether an example of a deterministic defense stops at the first iterate that fools it.
    """

    loss: TargetedLoss
    steps: int
    draws: int = 1
    rho: float = 0.75
    guide: Guide | None = None
    fixed: bool = False
    first_step: float = 2.0
    stops: bool = True

    def numbers(self, run: int, step: int) -> range:
        """Return the draws of one step of one run: all different, unless they are fixed."""
        return draw_numbers(run * (self.steps + 1) + step, self.draws, self.fixed)


@dataclass
class _Search:
    """What APGD knows of each example it still searches, one row each: the names are the paper's x, x_max, f_max, eta."""

    index: Tensor
    x: Tensor
    low: Tensor
    high: Tensor
    y: Tensor
    target: Tensor
    examples: Tensor
    x_adv: Tensor
    x_before: Tensor
    gradient: Tensor
    loss: Tensor
    x_max: Tensor
    gradient_max: Tensor
    loss_max: Tensor
    loss_max_before: Tensor
    step_size: Tensor
    rises: Tensor
    halved: Tensor
    sparsity: Tensor
    changed: Tensor
    done: Tensor

    def rows(self, chosen: Tensor) -> "_Search":
        """Return the search of the examples that bool (B,) `chosen` marks."""
        return _Search(**{entry.name: getattr(self, entry.name)[chosen] for entry in fields(self)})

    def step(self, threat: ThreatModel, first: bool) -> None:
        """Take one step: with momentum for Linf and L2; for L1 without, on the values of largest gradient whatever the box."""
        direction, bounds = steepest(self.gradient, threat.norm, sparsity=self.sparsity), (self.low, self.high)
        # In place, since on a small network these few operations are what a step costs beside its passes.
        x_new = threat.project(direction.mul_(_column(self.step_size, self.x)).add_(self.x_adv), self.x, bounds=bounds)
        if threat.norm != "L1" and not first:
            moved = (x_new - self.x_adv).mul_(MOMENTUM).add_((self.x_adv - self.x_before).mul_(1 - MOMENTUM))
            x_new = threat.project(moved.add_(self.x_adv), self.x, bounds=bounds)
        self.x_before, self.x_adv = self.x_adv, x_new

    def see(self, loss: Tensor, gradient: Tensor) -> None:
        """Take note of the loss (B,) and gradient at the current iterates."""
        self.rises = self.rises + (loss > self.loss)
        higher = loss > self.loss_max
        self.loss, self.gradient = loss, gradient
        self.loss_max = torch.where(higher, loss, self.loss_max)
        self.x_max = torch.where(_column(higher, self.x), self.x_adv, self.x_max)
        self.gradient_max = torch.where(_column(higher, self.x), gradient, self.gradient_max)

    def return_to_best(self, chosen: Tensor) -> None:
        """Go back to the best point, for the examples that bool (B,) `chosen` marks."""
        self.x_adv = torch.where(_column(chosen, self.x), self.x_max, self.x_adv)
        self.gradient = torch.where(_column(chosen, self.x), self.gradient_max, self.gradient)
        self.loss = torch.where(chosen, self.loss_max, self.loss)

    def halve(self, interval: int, rho: float) -> None:
        """Halve the step size where the loss oscillates (condition 1) or stalls (condition 2) since the last checkpoint."""
        oscillates = self.rises < rho * interval
        stalls = ~self.halved & (self.loss_max == self.loss_max_before)
        self.halved = oscillates | stalls
        self.step_size = torch.where(self.halved, self.step_size / 2, self.step_size)
        self.return_to_best(self.halved)
        self.rises, self.loss_max_before = torch.zeros_like(self.rises), self.loss_max

    def adapt_sparsity(self, epsilon: float) -> None:
        """Set the next steps' sparsity by the best perturbation's, and the step size by whether that became sparser."""
        changed = (self.x_max != self.x).flatten(1).sum(1).float()
        sparser = changed < 0.95 * self.changed
        self.sparsity = changed / self.x[0].numel() / 1.5
        self.step_size = torch.where(sparser, epsilon, (self.step_size / 1.5).clamp(min=epsilon / 10))
        self.return_to_best(sparser)
        self.changed = changed


def checkpoints(norm: Norm, steps: int) -> dict[int, int]:
    """Return the steps after which the step size is reconsidered, each with the number of steps since the one before.

    In shares of the steps, for Linf and L2: 0, 0.22, then gaps that shrink by 0.03 to 0.06 at least (arXiv 2003.01690, section
    3); for L1 every 0.04 (arXiv 2103.01208, section 4).
    """
    if norm == "L1":
        every = -(-4 * steps // 100)
        return dict.fromkeys(range(every, steps, every), every)
    shares, gap = [0, 22], 22
    while shares[-1] < 100:
        gap = max(gap - 3, 6)
        shares.append(shares[-1] + gap)
    positions = sorted({-(-share * steps // 100) for share in shares})
    return {0: 0} | {new: new - old for old, new in pairwise(positions) if new < steps}


def _objective(loss: TargetedLoss, y: Tensor, target: Tensor) -> Objective:
    return lambda logits: loss(logits, y, target)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to broadcast over images."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def ascend(
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
    """Ascend once from `start`; return the iterate that fooled a deterministic defense, where it stops there, else that of highest loss."""
    result, (count, zero) = start.clone(), (len(x), torch.zeros(len(x), device=x.device))
    stops, (low, high) = plan.stops and not defense.random, threat.bounds(x)
    search = _Search(
        index=torch.arange(count, device=x.device),
        x=x,
        low=low,
        high=high,
        y=y,
        target=target,
        examples=examples,
        x_adv=start,
        x_before=start,
        gradient=start,
        loss=zero + torch.inf,
        x_max=start,
        gradient_max=start,
        loss_max=zero - torch.inf,
        loss_max_before=zero - torch.inf,
        step_size=zero + (1 if threat.norm == "L1" else plan.first_step) * threat.epsilon,
        rises=zero,
        halved=zero.bool(),
        sparsity=zero + 0.2,
        changed=zero + x[0].numel(),
        done=zero.bool(),
    )
    reconsidered = checkpoints(threat.norm, plan.steps)
    for step in range(plan.steps + 1):
        if step:
            search.step(threat, first=step == 1)
        point = evaluate_point(
            defense,
            search.x_adv,
            search.y,
            _objective(plan.loss, search.y, search.target),
            examples=search.examples,
            seed=seed,
            numbers=plan.numbers(run, step),
            gradient=step < plan.steps,
            guide=plan.guide,
        )
        search.see(point.loss, point.gradient)
        if stops:
            packing.keep(result, search.index, search.x_adv, point.fooled & ~search.done)
            search.done = search.done | point.fooled
            if (standing := packing.leaving(search.done, step)) is not None:
                search = search.rows(standing)
                if not len(search.index):
                    return result
        if step in reconsidered and threat.norm == "L1":
            search.adapt_sparsity(threat.epsilon)
        elif step in reconsidered:
            search.halve(reconsidered[step], plan.rho)
    packing.keep(result, search.index, search.x_max, ~search.done)
    return result
