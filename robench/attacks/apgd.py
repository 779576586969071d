"""APGD for Linf and L2 (Croce and Hein, arXiv 2003.01690, Algorithm 1) and for L1 (the same, arXiv 2103.01208, section 4).

An example of a deterministic defense stops at the first iterate that fools it. A random defense is attacked on every example
to the last step, and the iterate of highest mean loss over draws is kept: to be misclassified on a few draws is luck.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from robench.attacks.objective import Objective, draw_numbers, evaluate_point
from robench.attacks.registry import register
from robench.attacks.runs import best_of_runs
from robench.attacks.steps import steepest
from robench.defense import Defense
from robench.losses import Loss, cross_entropy, dlr, margin, targeted_dlr
from robench.threat import Norm, ThreatModel

TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From logits (B, classes), labels (B,) and target classes (B,) to the loss of each example (B,)."""

MOMENTUM = 0.75


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
    plan = _Plan(lambda logits, y, _target: cross_entropy(logits, y), cross_entropy, steps, restarts, draws, rho, targets=1)
    return _apgd(plan, defense, x, y, threat, examples, seed)


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
    plan = _Plan(lambda logits, y, _target: dlr(logits, y), dlr, steps, restarts, draws, rho, targets=1)
    return _apgd(plan, defense, x, y, threat, examples, seed)


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
    return _apgd(_Plan(targeted_dlr, margin, steps, restarts, draws, rho, targets), defense, x, y, threat, examples, seed)


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
    if targets:
        plan = _Plan(targeted_dlr, margin, steps, restarts, draws, 0.75, targets, parts)
    else:
        plan = _Plan(lambda logits, y, _target: cross_entropy(logits, y), cross_entropy, steps, restarts, draws, 0.75, 1, parts)
    return _apgd(plan, defense, x, y, threat, examples, seed)


@dataclass(frozen=True)
class _Plan:
    """What is ascended (`loss`), what compares the results of several runs (`judge`), and how long.

    A run may have several `parts`, each of a multiple of the budget and a number of steps; the last is at the budget itself.
    """

    loss: TargetedLoss
    judge: Loss
    steps: int
    restarts: int
    draws: int
    rho: float
    targets: int
    parts: tuple[tuple[int, int], ...] = ()

    def numbers(self, run: int, step: int) -> range:
        """Return the draws of one step of one run, all different; every part looks at its start as well."""
        return draw_numbers(run * (self.steps + max(1, len(self.parts))) + step, self.draws)


@dataclass
class _Search:
    """What APGD knows of each example it still searches, one row each: the names are the paper's x, x_max, f_max, eta."""

    index: Tensor
    x: Tensor
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

    def rows(self, chosen: Tensor) -> "_Search":
        """Return the search of the examples that bool (B,) `chosen` marks."""
        return _Search(**{entry.name: getattr(self, entry.name)[chosen] for entry in fields(self)})

    def step(self, threat: ThreatModel, first: bool) -> None:
        """Take one step: with momentum for Linf and L2; for L1 without, on the values of largest gradient whatever the box."""
        direction = steepest(self.gradient, threat.norm, sparsity=self.sparsity)
        x_new = threat.project(self.x_adv + _column(self.step_size, self.x) * direction, self.x)
        if threat.norm != "L1" and not first:
            moved = MOMENTUM * (x_new - self.x_adv) + (1 - MOMENTUM) * (self.x_adv - self.x_before)
            x_new = threat.project(self.x_adv + moved, self.x)
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


def _apgd(plan: _Plan, defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, examples: Tensor, seed: int) -> Tensor:
    """Run APGD towards every target from every restart, on the examples not yet fooled, and keep the best result of each."""
    if threat.epsilon == 0:
        return x.clone()

    def run(number: int, stream: str, index: Tensor, target: Tensor) -> Tensor:
        images, labels, names, parts = x[index], y[index], examples[index], plan.parts or ((1, plan.steps),)
        x_adv, looks = threat.scaled(parts[0][0]).random_start(images, names, seed, f"start/{stream}"), 0
        for multiple, steps in parts:
            within, part = threat.scaled(multiple), _Part(number, looks, steps, stops=multiple == 1 and not defense.random)
            start = within.project(x_adv, images) if looks else x_adv
            x_adv = _run(plan, part, defense, images, labels, target, within, start, names, seed)
            looks += steps + 1
        return x_adv

    return best_of_runs(
        run,
        defense,
        x,
        y,
        examples=examples,
        seed=seed,
        judge=plan.judge,
        numbers=plan.numbers(plan.targets * plan.restarts, 0),
        targets=plan.targets,
        restarts=plan.restarts,
    )


@dataclass(frozen=True)
class _Part:
    """A part of a run: the run's number, the looks before it, its steps, and whether a fooled example stops."""

    run: int
    looks: int
    steps: int
    stops: bool


def _run(
    plan: _Plan,
    part: _Part,
    defense: Defense,
    x: Tensor,
    y: Tensor,
    target: Tensor,
    threat: ThreatModel,
    start: Tensor,
    examples: Tensor,
    seed: int,
) -> Tensor:
    """Ascend once from `start`; return the iterate that fooled the defense where the part stops there, else that of highest loss."""
    result, (count, zero) = start.clone(), (len(x), torch.zeros(len(x), device=x.device))
    search = _Search(
        index=torch.arange(count, device=x.device),
        x=x,
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
        step_size=zero + (1 if threat.norm == "L1" else 2) * threat.epsilon,
        rises=zero,
        halved=zero.bool(),
        sparsity=zero + 0.2,
        changed=zero + x[0].numel(),
    )
    reconsidered = checkpoints(threat.norm, part.steps)
    for step in range(part.steps + 1):
        if step:
            search.step(threat, first=step == 1)
        point = evaluate_point(
            defense,
            search.x_adv,
            search.y,
            _objective(plan.loss, search.y, search.target),
            examples=search.examples,
            seed=seed,
            numbers=plan.numbers(part.run, part.looks + step),
            gradient=step < part.steps,
        )
        search.see(point.loss, point.gradient)
        if part.stops and bool(point.fooled.any()):
            result[search.index[point.fooled]] = search.x_adv[point.fooled]
            search = search.rows(~point.fooled)
            if not len(search.index):
                return result
        if step in reconsidered and threat.norm == "L1":
            search.adapt_sparsity(threat.epsilon)
        elif step in reconsidered:
            search.halve(reconsidered[step], plan.rho)
    result[search.index] = search.x_max
    return result
