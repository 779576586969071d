"""What of the self-ensemble's robustness is masking: the trained defense of arXiv 2408.05446 with parts of it taken away.

Taken away after training, so that every row of the ablation has the same weights. The re-evaluation's published lab notes
(arXiv 2411.14834) did so: PGD-20 on CIFAR-100, noise held fixed, found 32.5 % under CrossMax and 1.2 % under the mean of the heads.
"""

from functools import partial

import torch
from torch import Tensor, nn

from robench.aggregate import Aggregator, crossmax_kth, kth_highest_of_logits, mean_of_logits, median_of_logits
from robench.defense import Defense
from robench.errors import UserError
from robench.noise import Draw
from robench.zoo import Setting, Specimen, register

from .ensemble_everything import Design, SelfEnsemble, self_ensemble
from .papers import ENSEMBLE_EVERYTHING

NOISE = ("fresh", "fixed")
AGGREGATIONS = ("crossmax", "kth_highest", "median_of_logits", "mean_of_logits")


class Ablation(Defense):
    """A self-ensemble with its noise held fixed, another aggregation, or its last predictors alone.

    Args:
        inner: the self-ensemble.
        fixed: every image and every forward gets one and the same noise; the defense is deterministic then.
        aggregator: what combines the predictors.
        heads: the number of predictors, counted from the backbone's own prediction towards the input; 0 for all.
    """

    def __init__(self, inner: SelfEnsemble, fixed: bool, aggregator: Aggregator, heads: int) -> None:
        super().__init__()
        self.inner = inner
        self.random = not fixed
        self.aggregator = aggregator
        self.heads = heads

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        if not self.random:
            draw = Draw(0, torch.zeros(len(x), dtype=torch.int64, device=x.device))
        # All of them where `heads` is 0.
        return self.inner.predictors(x, draw)[:, -self.heads :]

    def aggregate(self, logits: Tensor) -> Tensor:
        return self.aggregator(logits)

    def members(self) -> list[nn.Module]:
        return self.inner.members()


@register(paper=ENSEMBLE_EVERYTHING, version=1)
def multires_ablation(
    setting: Setting,
    *,
    noise: str = "fixed",
    aggregation: str = "mean_of_logits",
    heads: int = 0,
    k: int = 3,
    variant: str = "as_published",
    backbone: str | None = None,
) -> Specimen:
    """`multires_self_ensemble`, trained alike, with its noise, its aggregation or some of its heads taken away afterwards."""
    for value, known, what in ((noise, NOISE, "noise"), (aggregation, AGGREGATIONS, "aggregation")):
        if value not in known:
            raise UserError(f"{what} {value!r} is not one of {', '.join(known)}")
    inner, stages = self_ensemble(setting, Design(backbone, variant), 3, path="inner.")
    most = len(inner.taps) + 2
    if not 0 <= heads <= most:
        raise UserError(f"heads = {heads} must be between 1 and the number of predictors, {most}, or 0 for all")
    if aggregation in ("crossmax", "kth_highest") and not 2 <= k <= (heads or most):
        raise UserError(f"k = {k} must be between 2 and the number of predictors, {heads or most}")
    by_name: dict[str, Aggregator] = {
        "crossmax": crossmax_kth(k), "kth_highest": partial(kth_highest_of_logits, k=k),
        "median_of_logits": median_of_logits, "mean_of_logits": mean_of_logits,
    }  # fmt: skip
    return Specimen(Ablation(inner, noise == "fixed", by_name[aggregation], heads), tuple(stages))


@register(paper=ENSEMBLE_EVERYTHING, version=1)
def multires_layer(
    setting: Setting, *, layer: int = 0, noise: str = "fixed", variant: str = "as_published", backbone: str | None = None
) -> Specimen:
    """One of the predictors of `multires_self_ensemble` by itself: `layer` counts them from the input, the last is the backbone's own.

    It tells all of them, so that an attack on one can be tried on another (the paper's decorrelation of intermediate layers).
    """
    if noise not in NOISE:
        raise UserError(f"noise {noise!r} is not one of {', '.join(NOISE)}")
    inner, stages = self_ensemble(setting, Design(backbone, variant), 3, path="inner.")
    predictors = len(inner.taps) + 2
    if not 0 <= layer < predictors:
        raise UserError(f"layer = {layer} must be from 0 to {predictors - 1}")
    return Specimen(Ablation(inner, noise == "fixed", lambda logits: logits[:, layer], 0), tuple(stages))
