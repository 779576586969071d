"""Several runs of one attack, towards several classes or from several starts, and the best image of each example over all."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from robench.attacks.objective import evaluate_point, mean_logits
from robench.defense import Defense
from robench.losses import Loss

Run = Callable[[int, str, Tensor, Tensor], Tensor]
"""From a run's number, the name of its random stream, the indices (b,) of the examples it is to attack and their target classes
(b,) to one image for each of them."""


def best_of_runs(
    run: Run,
    defense: Defense,
    x: Tensor,
    y: Tensor,
    *,
    examples: Tensor,
    seed: int,
    judge: Loss,
    numbers: range,
    targets: int = 1,
    restarts: int = 1,
) -> Tensor:
    """Run an attack towards each of the wrong classes that score highest on the clean image, from every restart.

    A deterministic defense is attacked on the examples that it classifies right and that no run before has fooled. A random one
    is attacked on every example in every run: to be misclassified on a few draws is luck.

    Args:
        run: one run of the attack on some of the examples.
        defense: the defense.
        x: (B, C, H, W) clean images.
        y: (B,) labels.
        examples: (B,) identities of the examples.
        seed: the attack's seed.
        judge: what compares the results of several runs, by its mean over draws; the highest is kept.
        numbers: the draws that judge, the same for all runs.
        targets: how many wrong classes (all of them, where there are fewer).
        restarts: runs towards each.

    Returns:
        (B, C, H, W) the image of each example that fools the defense, or else the one that is judged highest; the clean image
        of an example that was not attacked.
    """
    best, best_loss = x.clone(), torch.full((len(x),), -torch.inf, device=x.device)
    clean = mean_logits(defense, x, examples=examples, seed=seed, numbers=numbers)
    ranked = clean.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
    searched = torch.ones_like(y, dtype=torch.bool) if defense.random else clean.argmax(1) == y
    for number, (rank, restart) in enumerate(product(range(min(targets, clean.shape[1] - 1)), range(restarts))):
        index = searched.nonzero()[:, 0]
        if not len(index):
            break
        x_adv, labels = run(number, f"{rank}/{restart}", index, ranked[index, rank]), y[index]
        point = evaluate_point(
            defense,
            x_adv,
            labels,
            lambda logits, labels=labels: judge(logits, labels),  # type: ignore[misc]
            examples=examples[index],
            seed=seed,
            numbers=numbers,
            gradient=False,
        )
        better = point.loss > best_loss[index]
        if not defense.random:
            better |= point.fooled
            searched[index[point.fooled]] = False
        best[index[better]], best_loss[index[better]] = x_adv[better], point.loss[better]
    return best
