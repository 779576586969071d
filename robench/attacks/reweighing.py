"""The loss of MORA, the model-reweighing attack on ensembles (Yu, Gao and Xu, arXiv 2211.08008).

The plain gradient of an ensemble is dominated by members that are steep, not by those that decide. MORA weighs the members anew at
each step by how much each one's logit can still move the ensemble's mean probabilities, and ascends the cross-entropy of the logits
so weighed, mixed with the ensemble's own. Here APGD does the ascent, in place of its steps of linearly falling size, and logits are
brought to one scale by their standard deviation over the classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from robench.aggregate import mean_of_logits
from robench.losses import cross_entropy

SHARES = (0.5, 1.0)
"""How much of the mixture is the reweighed members', of the five shares that MORA runs one after the other."""
SCALE = 4.0
"""Standard deviation of the logits whose cross-entropy is ascended."""


def weights(predictors: Tensor, y: Tensor) -> Tensor:
    """Return each member's weight, without gradient: (B, N, classes), (B,) -> (B, N), not negative.

    With p a member's probabilities, z their mean over the members, and m the wrong class that is highest in z:
    p_m (p_y / z_y + (1 - p_m) / z_m), which is N times the derivative of log z_m - log z_y by the member's logit of m.
    """
    probabilities = predictors.detach().float().softmax(-1)
    ensemble = probabilities.mean(1)
    wrong = ensemble.scatter(1, y[:, None], -1).argmax(1)
    (own, other), (own_mean, other_mean) = (
        [p.gather(-1, _index(c, p))[..., 0] for c in (y, wrong)] for p in (probabilities, ensemble[:, None])
    )
    tiny = torch.finfo(ensemble.dtype).tiny
    return other * (own / own_mean.clamp(min=tiny) + (1 - other) / other_mean.clamp(min=tiny))


def reweighed(predictors: Tensor, y: Tensor, aggregate: Callable[[Tensor], Tensor], share: float) -> Tensor:
    """Return the cross-entropy of the members' logits under their weights, mixed with their mean: (B, N, classes), (B,) -> (B,).

    Members that are fooled already weigh nothing, unless none stands, or the ensemble is the mean of logits, where to fool one
    further still moves it.

    Args:
        predictors: the members' logits.
        y: the labels.
        aggregate: what combines the members: (B, N, classes) -> (B, classes).
        share: of the weighed members in the mixture; the rest is the mean of logits.
    """
    shown = predictors.detach()
    standing = shown.argmax(-1) == y[:, None]
    mean, own = (combined.float().log_softmax(-1) for combined in (mean_of_logits(shown), aggregate(shown)))
    counts = standing | ~standing.any(1, keepdim=True) | ((mean - own).abs() < 1e-3).all(1, keepdim=True)
    weight = (weights(predictors, y) + 1e-8) * counts
    weight = weight / weight.sum(1, keepdim=True)
    members, ensemble = (weight[..., None] * _scaled(predictors)).sum(1), _scaled(mean_of_logits(predictors))
    return cross_entropy(SCALE * (share * members + (1 - share) * ensemble), y)


def _index(classes: Tensor, like: Tensor) -> Tensor:
    """Return the classes (B,) as indices (B, N, 1) for a gather along the last of `like`'s dimensions (B, N, classes)."""
    return classes[:, None, None].expand(-1, like.shape[1], 1)


def _scaled(logits: Tensor) -> Tensor:
    """Return the logits in units of their standard deviation over the classes, which takes no gradient: (..., classes)."""
    return logits.float() / logits.detach().float().std(-1, correction=0, keepdim=True).clamp(min=1e-12)
