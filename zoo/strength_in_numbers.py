"""Defenses of "Strength in Numbers" (arXiv 1811.09300): adversarially trained networks and ensembles, its Table 1.

An ensemble's prediction is the mean of its members' logits; the paper does not say whether logits or probabilities are averaged,
its black-box ensemble averages logits.
"""

import torch
from torch import Tensor, nn

from robench.aggregate import mean_of_logits
from robench.defense import Defense, Ensemble
from robench.noise import Draw
from robench.zoo import Setting, Specimen, register

from .papers import STRENGTH_IN_NUMBERS
from .recipes import linf_adversarial, natural_for_long, network, stage

WRN = "wrn-28-10"


def _ensemble(setting: Setting, members: int, backbone: str | None, widen: float = 1.0) -> Ensemble:
    networks = [network(setting, backbone, paper=WRN, member=i, widen=widen) for i in range(members)]
    return Ensemble(networks, mean_of_logits)


@register(paper=STRENGTH_IN_NUMBERS, version=1, alias="baseline")
def natural(setting: Setting, *, backbone: str | None = None) -> Specimen:
    """One network trained on clean images; the paper's Baseline."""
    return Specimen(_ensemble(setting, 1, backbone), (stage(natural_for_long(setting), setting, "networks.0"),))


@register(paper=STRENGTH_IN_NUMBERS, version=1)
def single_adv(setting: Setting, *, backbone: str | None = None) -> Specimen:
    """One network trained on clean and adversarial images; the paper's SingleAdv."""
    return Specimen(_ensemble(setting, 1, backbone), (stage(linf_adversarial(setting), setting, "networks.0"),))


@register(paper=STRENGTH_IN_NUMBERS, version=1)
def double_adv(setting: Setting, *, backbone: str | None = None) -> Specimen:
    """SingleAdv with about twice the parameters, by width (WRN-28-15 for WRN-28-10 in the paper); its DoubleAdv."""
    defense = _ensemble(setting, 1, backbone, widen=1.5 if setting.scale == "paper" else 2**0.5)
    return Specimen(defense, (stage(linf_adversarial(setting), setting, "networks.0"),))


def _clean_ensemble(setting: Setting, members: int, backbone: str | None) -> Specimen:
    return Specimen(_ensemble(setting, members, backbone), (stage(natural_for_long(setting), setting),))


@register(paper=STRENGTH_IN_NUMBERS, version=1)
def ensemble2(setting: Setting, *, backbone: str | None = None) -> Specimen:
    """Two networks trained on clean images as one model; the paper's Ensemble2."""
    return _clean_ensemble(setting, 2, backbone)


@register(paper=STRENGTH_IN_NUMBERS, version=1)
def ensemble4(setting: Setting, *, backbone: str | None = None) -> Specimen:
    """Four networks trained on clean images as one model; the paper's Ensemble4."""
    return _clean_ensemble(setting, 4, backbone)


def _joint_ensemble(setting: Setting, members: int, backbone: str | None) -> Specimen:
    return Specimen(_ensemble(setting, members, backbone), (stage(linf_adversarial(setting), setting),))


@register(paper=STRENGTH_IN_NUMBERS, version=1)
def ensemble2_adv(setting: Setting, *, backbone: str | None = None) -> Specimen:
    """Two networks trained adversarially as one model (Algorithm 1); the paper's Ensemble2Adv."""
    return _joint_ensemble(setting, 2, backbone)


@register(paper=STRENGTH_IN_NUMBERS, version=1)
def ensemble4_adv(setting: Setting, *, backbone: str | None = None) -> Specimen:
    """Four networks trained adversarially as one model (Algorithm 1); the paper's Ensemble4Adv."""
    return _joint_ensemble(setting, 4, backbone)


def _separate_ensemble(setting: Setting, members: int, backbone: str | None) -> Specimen:
    stages = tuple(stage(linf_adversarial(setting), setting, f"networks.{i}", member=i) for i in range(members))
    return Specimen(_ensemble(setting, members, backbone), stages)


@register(paper=STRENGTH_IN_NUMBERS, version=1)
def separate2_adv(setting: Setting, *, backbone: str | None = None) -> Specimen:
    """Two networks trained adversarially each on its own, then averaged; the paper's SeparateEnsemble2Adv."""
    return _separate_ensemble(setting, 2, backbone)


@register(paper=STRENGTH_IN_NUMBERS, version=1)
def separate4_adv(setting: Setting, *, backbone: str | None = None) -> Specimen:
    """Four networks trained adversarially each on its own, then averaged."""
    return _separate_ensemble(setting, 4, backbone)


class Gated(Defense):
    """Networks weighted by a gating network's softmax on the image (arXiv 1811.09300, section 3: an alternative to the mean).

    A predictor is a member's logits times its weight times the number of members, so that their mean is the prediction.
    """

    def __init__(self, networks: list[nn.Module], gate: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.gate = gate

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        logits = torch.stack([network(x) for network in self.networks], dim=1)
        weights = self.gate(x).softmax(-1)
        weighted: Tensor = logits * weights[:, :, None] * len(self.networks)
        return weighted

    def aggregate(self, logits: Tensor) -> Tensor:
        return mean_of_logits(logits)

    def members(self) -> list[nn.Module]:
        return [*self.networks, self.gate]


@register(paper=STRENGTH_IN_NUMBERS, version=1)
def gated2_adv(setting: Setting, *, backbone: str | None = None) -> Specimen:
    """Two networks weighted by a gating network, trained adversarially as one model."""
    networks: list[nn.Module] = [network(setting, backbone, paper=WRN, member=i) for i in range(2)]
    gating = Setting(setting.dataset, len(networks), setting.image_shape, setting.scale, setting.seed)
    gate = network(gating, "resnet8-16", paper="resnet8-16", member=100)
    return Specimen(Gated(networks, gate), (stage(linf_adversarial(setting), setting),))
