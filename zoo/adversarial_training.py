"""The usual ways to train one network adversarially in Linf, to measure ensembles beside: PGD, a single step, TRADES.

Each with or without weight averaging. On digits, six epochs long, averaging is worth nothing that 300 images show.
"""

from dataclasses import replace

from robench.aggregate import mean_of_logits
from robench.defense import Ensemble
from robench.recipe import Recipe
from robench.zoo import Setting, Specimen, register

from .papers import FAST_TRAINING, PGD_TRAINING, TRADES
from .recipes import fast_training, network, pgd_training, stage, trades_training


def _one(setting: Setting, backbone: str | None, recipe: Recipe, averaging: float, paper: str) -> Specimen:
    defense = Ensemble([network(setting, backbone, paper=paper)], mean_of_logits)
    return Specimen(defense, (stage(replace(recipe, averaging=averaging), setting, "networks.0"),))


@register(paper=PGD_TRAINING, version=1)
def pgd_at(setting: Setting, *, averaging: float = 0.0, backbone: str | None = None) -> Specimen:
    """One network trained on PGD's images alone, from a uniform start (PGD-AT)."""
    return _one(setting, backbone, pgd_training(setting), averaging, "wrn-34-10")


@register(paper=FAST_TRAINING, version=1)
def fgsm_rs(setting: Setting, *, averaging: float = 0.0, backbone: str | None = None) -> Specimen:
    """One network trained on single steps of 1.25 budgets from a uniform start, batch norm in training mode (FGSM-RS)."""
    return _one(setting, backbone, fast_training(setting), averaging, "resnet18")


@register(paper=TRADES, version=1)
def trades(setting: Setting, *, beta: float = 6.0, averaging: float = 0.0, backbone: str | None = None) -> Specimen:
    """One network whose predictions on clean and adversarial images are held together; beta is 1 / lambda of the paper."""
    return _one(setting, backbone, trades_training(setting, beta), averaging, "wrn-34-10")
