"""Defenses of "Revisiting Ensembles in an Adversarial Context" (arXiv 2002.11572): L2-robust networks, their averages, composites.

The paper averages outputs without saying whether logits or probabilities; logits here.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from robench.aggregate import Aggregator, mean_of_logits, weighted
from robench.defense import Defense, Ensemble
from robench.errors import UserError
from robench.noise import Draw
from robench.recipe import Stage
from robench.zoo import Setting, Specimen, register

from .backbones import Backbone
from .papers import REVISITING_ENSEMBLES
from .recipes import l2_adversarial, linear, network, stage


@register(paper=REVISITING_ENSEMBLES, version=1)
def robust(setting: Setting, *, eps: float = 0.5, backbone: str | None = None) -> Specimen:
    """One network trained by PGD in the L2 ball of radius eps (section 3)."""
    defense = Ensemble([network(setting, backbone, paper="resnet18")], mean_of_logits)
    return Specimen(defense, (stage(l2_adversarial(setting, eps), setting, "networks.0"),))


@register(paper=REVISITING_ENSEMBLES, version=1)
def robust_average(setting: Setting, *, k: int = 8, eps: float = 0.22, weights: str = "uniform", backbone: str | None = None) -> Specimen:
    """The average of k networks, each trained on its own in the L2 ball of radius eps (equation 2); weights as ``0.5/0.3/0.2``."""
    networks = [network(setting, backbone, paper="resnet18", member=i) for i in range(k)]
    stages = tuple(stage(l2_adversarial(setting, eps), setting, f"networks.{i}", member=i) for i in range(k))
    return Specimen(Ensemble(networks, _average(k, weights)), stages)


def _average(k: int, weights: str) -> Aggregator:
    """Return the average of k networks' logits, having made sure that the weights fit before anything is trained."""
    if k < 1:
        raise UserError(f"an average needs k of at least 1, not {k}")
    if weights == "uniform":
        return mean_of_logits
    try:
        aggregator = weighted([float(w) for w in weights.split("/")])
    except ValueError:
        raise UserError(f"weights={weights!r} is neither uniform nor numbers as in 0.5/0.3/0.2") from None
    aggregator(torch.zeros(1, k, 1))
    return aggregator


class Composite(Defense):
    """One linear layer on the joined penultimate features of several networks (section 2, "Meta-composites").

    Args:
        networks: backbones with `features`.
        head: from all their features to the classes.
    """

    def __init__(self, networks: Sequence[Backbone], head: nn.Linear) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.head = head

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        features = torch.cat([cast(Backbone, network).features(x) for network in self.networks], dim=1)
        logits: Tensor = self.head(features)
        return logits[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        # A backbone's stages run in `features` and in `forward` alike.
        return [cast(Backbone, network).stages for network in self.networks]


def _composite(setting: Setting, eps: float, alpha: float, backbone: str | None, member: int, path: str) -> tuple[Composite, list[Stage]]:
    """Return a composite and its stages: the robust network, the near-natural one, then the last layer alone at eps."""
    networks = [network(setting, backbone, paper="resnet18", member=member + i) for i in range(2)]
    composite = Composite(networks, linear(setting, sum(n.fc.in_features for n in networks), member))
    stages = [stage(l2_adversarial(setting, radius), setting, f"{path}networks.{i}", member + i) for i, radius in enumerate((eps, alpha))]
    return composite, [*stages, stage(l2_adversarial(setting, eps), setting, path.rstrip("."), member, trainable=("head",))]


@register(paper=REVISITING_ENSEMBLES, version=1)
def composite(setting: Setting, *, eps: float = 0.4, alpha: float = 0.05, backbone: str | None = None) -> Specimen:
    """Features of a robust (eps) and a near-natural (alpha) network under one last layer, PGD-trained alone at eps."""
    defense, stages = _composite(setting, eps, alpha, backbone, member=0, path="")
    return Specimen(defense, tuple(stages))


@register(paper=REVISITING_ENSEMBLES, version=1)
def composite_pair(setting: Setting, *, backbone: str | None = None) -> Specimen:
    """Two composites, (0.4, 0.05) at 90 % and (0.3, 0.05) at 10 % (Table 1, footnote 1)."""
    first, first_stages = _composite(setting, 0.4, 0.05, backbone, member=0, path="networks.0.")
    second, second_stages = _composite(setting, 0.3, 0.05, backbone, member=2, path="networks.1.")
    return Specimen(Ensemble([first, second], weighted([0.9, 0.1])), (*first_stages, *second_stages))
