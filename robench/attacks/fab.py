"""Targeted FAB (Croce and Hein, arXiv 1907.02044, Algorithm 1): steps to the nearest point of the linearised boundary, in the box.

Two things differ from the paper. Only whether a point inside the budget is found counts here, so an example stops at the first.
And an iteration is one forward and one backward: the pass that tests an iterate also linearises there, and where a
misclassified iterate is drawn back towards the clean image, by a tenth of its way, the linearisation is kept, not made anew.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction

import torch
from torch import Tensor

from robench.attacks.objective import Point, draw_numbers, evaluate_point
from robench.attacks.registry import register
from robench.attacks.runs import best_of_runs
from robench.defense import Defense
from robench.losses import margin
from robench.threat import Norm, ThreatModel


@register("fab-t", version=1, paper="arXiv 1907.02044")
def fab_t(
    defense: Defense,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    examples: Tensor,
    seed: int,
    steps: int = 100,
    targets: int = 9,
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    draws: int = 1,
) -> Tensor:
    """FAB towards each of the wrong classes that score highest on the clean image, from it and then from random starts.

    A random defense is attacked on every example to the last step, on its mean logits over draws: each iterate is projected into
    the threat model and judged by its mean margin on draws that are the same for all, and the highest is kept.

    Args beyond every attack's: `steps`; `targets`, how many wrong classes (all of them, where there are fewer); `restarts`, of
    which those after the first start at random within half the budget; `alpha_max`, the most weight that a step gives to the
    clean image's projection; `eta`, the overshoot; `beta`, the share of the way from the clean image at which the search goes on
    after a misclassified iterate; `draws`, the noise draws averaged at each step for a random defense.
    """
    if threat.epsilon == 0:
        return x.clone()
    plan = _Plan(steps, alpha_max, eta, beta)
    judging = draw_numbers(targets * restarts * (steps + 1), draws)

    def run(number: int, stream: str, index: Tensor, target: Tensor) -> Tensor:
        names, labels, images = examples[index], y[index], x[index]
        first = stream.endswith("/0")
        start = images if first else threat.scaled(Fraction(1, 2)).random_start(images, names, seed, f"start/{stream}")

        def look(x_adv: Tensor, rows: Tensor, step: int) -> Point:
            label, wanted = labels[rows, None], target[rows, None]
            return evaluate_point(
                defense,
                x_adv,
                labels[rows],
                lambda logits: (logits.gather(1, wanted) - logits.gather(1, label))[:, 0],
                examples=names[rows],
                seed=seed,
                numbers=draw_numbers(number * (steps + 1) + step, draws),
                gradient=step < steps,
            )

        def judge(x_adv: Tensor) -> Tensor:
            return evaluate_point(
                defense,
                x_adv,
                labels,
                lambda logits: margin(logits, labels),
                examples=names,
                seed=seed,
                numbers=judging,
                gradient=False,
            ).loss

        return _run(plan, look, judge if defense.random else None, images, threat, start)

    return best_of_runs(
        run,
        defense,
        x,
        y,
        examples=examples,
        seed=seed,
        judge=margin,
        numbers=judging,
        targets=targets,
        restarts=restarts,
    )


Look = Callable[[Tensor, Tensor, int], Point]
"""From images (b, ...), the rows of the run that they are of and the step to the logits' differences, target's minus label's."""
Judge = Callable[[Tensor], Tensor]
"""From images (B, ...) of a random defense to their mean margins (B,) over draws."""


@dataclass(frozen=True)
class _Plan:
    """The parameters of a run, by the paper's names."""

    steps: int
    alpha_max: float
    eta: float
    beta: float


@dataclass
class _Search:
    """What FAB knows of each example it still searches, one row each: the iterate, and the logits' difference there."""

    index: Tensor
    x: Tensor
    x_adv: Tensor
    gain: Tensor
    gradient: Tensor

    def rows(self, chosen: Tensor) -> "_Search":
        """Return the search of the examples that bool (B,) `chosen` marks."""
        return _Search(**{entry.name: getattr(self, entry.name)[chosen] for entry in fields(self)})

    def step(self, plan: _Plan, norm: Norm) -> Tensor:
        """Return the next iterates: past the projections of iterate and clean image onto the linearised boundary, averaged."""
        count = len(self.x)
        flat, clean, gradient = self.x_adv.flatten(1), self.x.flatten(1), self.gradient.flatten(1)
        # What the linearised difference of the logits still lacks to zero, from either point.
        needed = torch.cat([-self.gain, -self.gain + (gradient * (flat - clean)).sum(1)])
        moves = to_hyperplane(torch.cat([flat, clean]), gradient.repeat(2, 1), needed, norm)
        sizes = _size(moves, norm).clamp(min=1e-8)
        alpha = (sizes[:count] / (sizes[:count] + sizes[count:])).clamp(max=plan.alpha_max)[:, None]
        ahead, back = flat + plan.eta * moves[:count], clean + plan.eta * moves[count:]
        return ((1 - alpha) * ahead + alpha * back).clamp(0, 1).reshape(self.x.shape)

    def see(self, x_new: Tensor, point: Point, beta: float, crossed: Tensor) -> None:
        """Go to the iterates and linearise there; where the boundary is crossed, go back towards the clean image."""
        self.x_adv = torch.where(_column(crossed), self.x + beta * (x_new - self.x), x_new)
        self.gradient = point.gradient
        self.gain = point.loss + (point.gradient * (self.x_adv - x_new)).flatten(1).sum(1)


def _column(chosen: Tensor) -> Tensor:
    """Reshape (B,) to broadcast over images."""
    return chosen[:, None, None, None]


def _size(moves: Tensor, norm: Norm) -> Tensor:
    """Return the norm of each row: (B, D) -> (B,)."""
    return moves.abs().amax(1) if norm == "Linf" else moves.norm(p=2 if norm == "L2" else 1, dim=1)


def to_hyperplane(x: Tensor, normal: Tensor, needed: Tensor, norm: Norm) -> Tensor:
    """Return the smallest move in `norm` that raises ``x @ normal`` by `needed` inside the box (section 3.1, equation 6).

    Where the box does not let it, the move goes as far as it does: to the corner. Every value moves one way, and by
    ``min(t * |normal|, room)`` for L2, ``min(t, room)`` for Linf, with the one t that meets the hyperplane; for L1 the values
    move as far as they can in the order of their weight in the normal.

    Args:
        x: (B, D) points in [0, 1].
        normal: (B, D) normals of the hyperplanes; a row of zeros moves nothing.
        needed: (B,) how much each product is to rise, or fall.
        norm: the norm.
    """
    largest = normal.abs().amax(1, keepdim=True)
    # In units of the largest weight, so that squares of small gradients do not vanish.
    normal = normal * (needed.sign()[:, None] / torch.where(largest > 0, largest, 1))
    amount = (needed.abs()[:, None] / torch.where(largest > 0, largest, torch.inf)).clamp(max=2.0 * x.shape[1])
    # 1 - x where the normal is positive, else x.
    weight, room = normal.abs(), torch.gt(normal, 0, out=torch.empty_like(x)).sub_(x).abs_()
    if norm == "L1":
        return normal.sign() * _fill(weight, room, amount)
    slope, limit = (weight, room) if norm == "Linf" else (weight**2, room / weight.clamp(min=1e-30))
    moved = _raise_together(slope, limit, amount)
    return normal.sign() * (moved if norm == "Linf" else weight * moved)


def _raise_together(slope: Tensor, limit: Tensor, amount: Tensor, most: int = 100) -> Tensor:
    """Return ``min(t, limit)`` (B, D) for the t at which its product with `slope` is `amount` (B, 1), or `limit` if that is less.

    The product is concave and piecewise linear in t, so Newton's method from 0 never passes the solution and ends on its piece,
    in a few rounds; it costs less than sorting the limits.
    """
    t, below = torch.zeros_like(amount), torch.empty_like(slope)
    for count in range(most):
        # Written as numbers: on the CPU a mask of bools takes several times as long.
        torch.gt(limit, t, out=below)
        reached, rate = (slope * limit.clamp(max=t)).sum(1, keepdim=True), (slope * below).sum(1, keepdim=True)
        grown = torch.where(rate > 0, t + (amount - reached).clamp(min=0) / rate.clamp(min=1e-30), t)
        # Asked rarely: on a GPU the answer has to be waited for.
        if count % 4 == 3 and bool((grown <= t * (1 + 1e-6)).all()):
            break
        t = grown
    return limit.minimum(t)


def _fill(weight: Tensor, room: Tensor, amount: Tensor) -> Tensor:
    """Return values (B, D) of least sum, in [0, room], whose product with `weight` is `amount` (B, 1): the heaviest first."""
    ordered, order = weight.sort(dim=1, descending=True)
    rooms = room.gather(1, order)
    most = ordered * rooms
    before = most.cumsum(1) - most
    filled = ((amount - before).clamp(min=0) / ordered.clamp(min=1e-30)).minimum(rooms)
    return torch.zeros_like(room).scatter(1, order, filled)


def _run(plan: _Plan, look: Look, judge: Judge | None, x: Tensor, threat: ThreatModel, start: Tensor) -> Tensor:
    """Search once from `start`; return the first iterate that fools the defense inside the budget, or else the clean image.

    With a judge, return of all iterates, projected into the threat model, the one that it judges highest.
    """
    nothing, index = x.new_zeros(len(x)), torch.arange(len(x), device=x.device)
    result, highest = x.clone(), nothing - torch.inf
    search = _Search(index, x, start, nothing, start)
    for step in range(plan.steps + 1):
        x_new = search.step(plan, threat.norm) if step else start
        point = look(x_new, search.index, step)
        if judge:
            inside = threat.project(x_new, x)
            judged = judge(inside)
            result = torch.where(_column(judged > highest), inside, result)
            highest = highest.maximum(judged)
        search.see(x_new, point, plan.beta, crossed=point.loss > 0 if judge else point.fooled)
        if not judge:
            found = point.fooled & (threat.size(x_new - search.x) <= threat.epsilon)
            if bool(found.any()):
                result[search.index[found]] = x_new[found]
                search = search.rows(~found)
                if not len(search.index):
                    break
    return result
