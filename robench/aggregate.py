"""Aggregators: pure functions from the predictors' logits (B, N, C) to the ensemble's logits (B, C).

Two classes of equal logits tie; the prediction is the lower class index (`torch.argmax` of the first maximum).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from robench.errors import UserError

Aggregator = Callable[[Tensor], Tensor]


def _checked(logits: Tensor) -> Tensor:
    if logits.ndim != 3 or 0 in logits.shape[1:]:
        raise UserError(f"an aggregator takes logits of shape (batch, predictors, classes), not {tuple(logits.shape)}")
    # Reading the answer waits for a GPU, which its recorded steps must not; a training's loss is checked at the end of its epoch.
    recording = logits.is_cuda and torch.cuda.is_current_stream_capturing()
    if not recording and not bool(torch.isfinite(logits).all()):
        raise UserError("an aggregator was given logits that are not finite (NaN or infinity)")
    return logits


def mean_of_logits(logits: Tensor) -> Tensor:
    """Return the mean logit of each class: (B, N, C) -> (B, C)."""
    return _checked(logits).mean(1)


def mean_of_probabilities(logits: Tensor) -> Tensor:
    """Return the logarithm of the predictors' mean softmax: (B, N, C) -> (B, C).

    The logarithm makes it a logit vector (its softmax is the mean probability), which attacks on logits expect.
    """
    return _checked(logits).log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])


def weighted_mean_of_logits(logits: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the weighted mean logit, the weights scaled to sum to one: (B, N, C) -> (B, C).

    Raises:
        UserError: if there is not one weight for each predictor, one is negative or not finite, or all are zero.
    """
    valid = all(math.isfinite(weight) and weight >= 0 for weight in weights)
    if len(weights) != logits.shape[1] or not valid or sum(weights) == 0:
        raise UserError(f"weights {list(weights)} must be {logits.shape[1]} numbers, one per predictor, none negative, not all zero")
    share = torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64).to(_checked(logits))
    return (share[None, :, None] * logits).sum(1)


def median_of_logits(logits: Tensor) -> Tensor:
    """Return each class's median logit; for an even number of predictors the mean of the middle two: (B, N, C) -> (B, C)."""
    ordered, count = _checked(logits).sort(1).values, logits.shape[1]
    return (ordered[:, (count - 1) // 2] + ordered[:, count // 2]) / 2


def kth_highest_of_logits(logits: Tensor, k: int) -> Tensor:
    """Return each class's k-th highest logit over the predictors, k from 1 to N: (B, N, C) -> (B, C)."""
    if not 1 <= k <= logits.shape[1]:
        raise UserError(f"k = {k} must be between 1 and the number of predictors, {logits.shape[1]}")
    return _checked(logits).topk(k, dim=1).values[:, k - 1]


def majority_vote(logits: Tensor) -> Tensor:
    """Return the share of predictors that vote for each class: (B, N, C) -> (B, C), in the logits' dtype, without gradient.

    A predictor votes for its first maximal logit.
    """
    votes = _checked(logits).argmax(-1)
    return torch.nn.functional.one_hot(votes, logits.shape[-1]).to(logits.dtype).mean(1)


def crossmax(logits: Tensor, k: int | None = None) -> Tensor:
    """Return the CrossMax aggregate (arXiv 2408.05446, Algorithm 1): (B, N, C) -> (B, C).

    First each predictor's maximum over the classes is subtracted from its logits, then each class's maximum over the predictors,
    and the result is the median over the predictors (`k` None, for equivalent models) or the k-th highest (self-ensembles).

    Raises:
        UserError: if k or the number of predictors is 1: after the second subtraction every class has a predictor at 0, so the highest
            is 0 everywhere.
    """
    if k == 1:
        raise UserError("CrossMax with k = 1 is identically zero (after normalisation every class has a predictor at 0); use k >= 2")
    if logits.shape[1] == 1:
        raise UserError("CrossMax of one predictor is identically zero (normalisation takes it from itself); give it two or more")
    normalised = _checked(logits) - logits.amax(-1, keepdim=True)
    normalised = normalised - normalised.amax(1, keepdim=True)
    return median_of_logits(normalised) if k is None else kth_highest_of_logits(normalised, k)


def crossmax_kth(k: int) -> Aggregator:
    """Return CrossMax with the k-th highest as an aggregator."""
    return partial(crossmax, k=k)


def weighted(weights: Sequence[float]) -> Aggregator:
    """Return the weighted mean of logits with these weights as an aggregator."""
    return partial(weighted_mean_of_logits, weights=tuple(weights))


AGGREGATORS: dict[str, Aggregator] = {
    "mean_of_logits": mean_of_logits,
    "mean_of_probabilities": mean_of_probabilities,
    "median_of_logits": median_of_logits,
    "majority_vote": majority_vote,
    "crossmax_median": crossmax,
    "crossmax_2nd": crossmax_kth(2),
    "crossmax_3rd": crossmax_kth(3),
}
"""The parameter-free aggregators by name; the property tests run over them."""
