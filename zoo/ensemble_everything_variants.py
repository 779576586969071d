"""Other ensembles that arXiv 2408.05446 speaks of: over checkpoints of one training, with learned weights, and of plain networks.

The plain networks are those of its Figure 4: ten of them, CrossMax with the median against the mean of their logits.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from robench.aggregate import Aggregator, crossmax, mean_of_logits, median_of_logits
from robench.defense import Ensemble
from robench.errors import UserError
from robench.recipe import Stage
from robench.zoo import Setting, Specimen, register

from .ensemble_everything import Design, SelfEnsemble, backbone_recipe, multiresolution, self_ensemble
from .papers import ENSEMBLE_EVERYTHING
from .recipes import member_seed, natural, network, stage

AGGREGATIONS: dict[str, Aggregator] = {"crossmax": crossmax, "median_of_logits": median_of_logits, "mean_of_logits": mean_of_logits}


@register(paper=ENSEMBLE_EVERYTHING, version=1)
def crossmax_ensemble(setting: Setting, *, k: int = 10, aggregation: str = "crossmax", backbone: str | None = None) -> Specimen:
    """Networks of the plain image, each trained by itself on clean images; by default under CrossMax with the median (Figure 4).

    The paper's ResNet-18s start from ImageNet weights; these start from scratch.
    """
    if aggregation not in AGGREGATIONS:
        raise UserError(f"aggregation {aggregation!r} is not one of {', '.join(AGGREGATIONS)}")
    if k < 2:
        raise UserError(f"k = {k}: an ensemble needs at least two networks")
    networks = [network(setting, backbone, paper="resnet18", member=member) for member in range(k)]
    stages = tuple(stage(natural(setting), setting, f"networks.{member}", member) for member in range(k))
    return Specimen(Ensemble(networks, AGGREGATIONS[aggregation]), stages)


@register(paper=ENSEMBLE_EVERYTHING, version=1)
def multires_checkpoints(setting: Setting, *, k: int = 3, variant: str = "as_published", backbone: str | None = None) -> Specimen:
    """The last k epochs of one training of `multires`, aggregated by CrossMax with the median.

    At a constant rate the network after fewer epochs is a checkpoint of the longer training, from the same start and data order.
    """
    design = Design(backbone, variant)
    recipe = backbone_recipe(setting, design)
    if not 2 <= k <= recipe.epochs:
        raise UserError(f"k = {k} must be between 2 and the training's number of epochs, {recipe.epochs}")
    if recipe.schedule != "constant":
        recipe = replace(recipe, schedule="constant", learning_rate=recipe.learning_rate / 10)
    networks = [multiresolution(setting, design) for _ in range(k)]
    epochs = range(recipe.epochs - k + 1, recipe.epochs + 1)
    stages = tuple(stage(replace(recipe, epochs=e), setting, f"networks.{i}") for i, e in enumerate(epochs))
    return Specimen(Ensemble(networks, crossmax), stages)


class ConvexCombination(nn.Module):
    """The mean of N predictors' logits (B, N, classes) under weights that are learned, positive and sum to one; equal at first."""

    def __init__(self, predictors: int) -> None:
        super().__init__()
        self.logits_of_weights = nn.Parameter(torch.zeros(predictors))

    def forward(self, logits: Tensor) -> Tensor:
        combined: Tensor = (logits * self.logits_of_weights.softmax(0)[None, :, None]).sum(1)
        return combined


class Weighted(SelfEnsemble):
    """A self-ensemble whose predictors are combined by a learned convex combination."""

    def __init__(self, inner: SelfEnsemble) -> None:
        nn.Module.__init__(self)
        self.backbone, self.heads, self.taps = inner.backbone, inner.heads, inner.taps
        self.combination = ConvexCombination(len(inner.taps) + 2)

    def aggregate(self, logits: Tensor) -> Tensor:
        combined: Tensor = self.combination(logits)
        return combined


@register(paper=ENSEMBLE_EVERYTHING, version=1)
def multires_weighted(setting: Setting, *, variant: str = "as_published", backbone: str | None = None) -> Specimen:
    """`multires_self_ensemble` with learned instead of CrossMax's aggregation: a convex combination of the predictors' logits.

    The weights are learned on clean training images after the heads.
    """
    inner, stages = self_ensemble(setting, Design(backbone, variant), 3)
    learned = replace(stages[1].recipe, epochs=1, learning_rate=0.1, loss_on="prediction")
    return Specimen(Weighted(inner), (*stages, Stage(learned, member_seed(setting, 0), trainable=("combination",))))
