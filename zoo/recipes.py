"""What every family shares: the networks of each scale, their seeds, and the recipes of each scale, the papers' own at `paper`.

The small scales keep each paper's structure (losses, what is attacked, what is frozen) and shrink networks, epochs and attack steps.
"""

import math
from dataclasses import replace
from typing import Literal

from torch import nn

from robench.noise import isolated_generator
from robench.recipe import InnerAttack, Recipe, Stage
from robench.zoo import Setting

from .backbones import Backbone, backbone

LINF = {"digits": "Linf:48/255"}
"""The Linf budget that a data set's adversarial training is for; 8/255 elsewhere."""

SMALL = {"smoke": "resnet8-16s2", "cpu": "resnet8-32s2", "gpu": "resnet18"}
"""The network of each scale below `paper`."""


def linf_threat(setting: Setting) -> str:
    """Return the text of the Linf threat model that this data set's defenses are trained against."""
    return LINF.get(setting.dataset, "Linf:8/255")


def member_seed(setting: Setting, member: int) -> int:
    """Return the seed of one member: the same network at the same place of any defense starts, and trains, alike."""
    return setting.seed * 1000 + member


def network(
    setting: Setting, name: str | None, *, paper: str, member: int = 0, channels: int | None = None, widen: float = 1.0
) -> Backbone:
    """Return one untrained network: `name` if given, else the scale's, which at `paper` is the paper's own."""
    chosen = name or SMALL.get(setting.scale, paper)
    with isolated_generator(member_seed(setting, member)):
        return backbone(chosen, setting.classes, channels=channels or setting.image_shape[0], widen=widen, pretrained=name is None)


def linear(setting: Setting, features: int, member: int = 0) -> nn.Linear:
    """Return an untrained linear layer onto the classes."""
    with isolated_generator(member_seed(setting, 500 + member)):
        return nn.Linear(features, setting.classes)


def natural(setting: Setting) -> Recipe:
    """Plain training on clean images."""
    return _recipe(setting, attack=None, clean_weight=0.0)


def linf_adversarial(setting: Setting) -> Recipe:
    """Clean and adversarial loss at equal weight, IFGSM from a Gaussian start (arXiv 1811.09300, section 4.2, rho = 1)."""
    steps = {"smoke": 2, "cpu": 1, "gpu": 7, "paper": 7}[setting.scale]
    attack = _inner(linf_threat(setting), steps, "uniform" if steps == 1 else "gaussian")
    return _for_long(_recipe(setting, attack, clean_weight=1.0), setting)


def natural_for_long(setting: Setting) -> Recipe:
    """Plain training, at `paper` for as many iterations as adversarial training takes (arXiv 1811.09300, section 4.2, "all models")."""
    return _for_long(natural(setting), setting)


def _for_long(recipe: Recipe, setting: Setting) -> Recipe:
    """Return a recipe with the schedule of arXiv 1811.09300, section 4.2: 500,000 iterations, the rate falling at 30k, 60k and 90k.

    Whether the momentum is Nesterov's, and the weight decay, it does not say; both are those of its model (arXiv 1605.07146).
    """
    if setting.scale != "paper":
        return recipe
    return replace(recipe, epochs=math.ceil(500_000 * recipe.batch_size / 50_000), schedule="early-step")


def l2_adversarial(setting: Setting, eps: float) -> Recipe:
    """PGD training on adversarial images alone (Madry et al., arXiv 1706.06083, as arXiv 2002.11572 uses it)."""
    steps = {"smoke": 2, "cpu": 2, "gpu": 7, "paper": 7}[setting.scale]
    return _recipe(setting, _inner(f"L2:{eps}", steps, "clean"), clean_weight=0.0)


def single_step(setting: Setting) -> Recipe:
    """Light adversarial training: FGSM without random start, adversarial images alone (arXiv 2408.05446, released code)."""
    threat = linf_threat(setting)
    return _recipe(setting, InnerAttack(threat, 1, _budget(threat), "clean"), clean_weight=0.0)


def pgd_training(setting: Setting) -> Recipe:
    """PGD training on adversarial images alone: seven steps of a quarter of the budget from a uniform start (arXiv 1706.06083)."""
    threat = linf_threat(setting)
    steps = {"smoke": 2, "cpu": 3, "gpu": 7, "paper": 7}[setting.scale]
    size = _budget(threat) / 4 if steps == 7 else _budget(threat) * 2.5 / steps
    return _recipe(setting, InnerAttack(threat, steps, size, "uniform"), clean_weight=0.0)


def fast_training(setting: Setting) -> Recipe:
    """A single step of 1.25 budgets from a uniform start, all in training mode (arXiv 2001.03994, released code: 30 epochs)."""
    threat = linf_threat(setting)
    recipe = _recipe(setting, InnerAttack(threat, 1, 1.25 * _budget(threat), "uniform", mode="training"), clean_weight=0.0)
    return replace(recipe, epochs=30, learning_rate=0.2, schedule="one-cycle") if setting.scale == "paper" else recipe


def trades_training(setting: Setting, beta: float) -> Recipe:
    """Clean cross-entropy and `beta` times the divergence, raised by ten steps (arXiv 1901.08573, section 5.3 and released code)."""
    threat = linf_threat(setting)
    steps = {"smoke": 2, "cpu": 3, "gpu": 10, "paper": 10}[setting.scale]
    size = 0.007 if steps == 10 else _budget(threat) * 2.5 / steps
    recipe = replace(_recipe(setting, InnerAttack(threat, steps, size, "near", objective="divergence"), clean_weight=0.0), trades=beta)
    if setting.scale == "paper":
        return replace(recipe, epochs=100, schedule="late-step", weight_decay=2e-4)
    return recipe


def stage(recipe: Recipe, setting: Setting, module: str = "", member: int = 0, trainable: tuple[str, ...] = ()) -> Stage:
    """Return a training stage for `module`, with the seed of the member it trains."""
    return Stage(recipe, member_seed(setting, member), module, trainable)


def _budget(threat: str) -> float:
    numerator, _, denominator = threat.partition(":")[2].partition("/")
    return float(numerator) / float(denominator or 1)


def _inner(threat: str, steps: int, start: str) -> InnerAttack:
    # One step from a random start goes 1.25 budgets (Wong et al., arXiv 2001.03994); several share 2.5.
    size = _budget(threat) * (1.25 if steps == 1 else 2.5 / steps)
    return InnerAttack(threat, steps, size, start)  # type: ignore[arg-type]


def _recipe(setting: Setting, attack: InnerAttack | None, clean_weight: float) -> Recipe:
    augmentation: Literal["crop", "crop-flip"] = "crop" if setting.dataset == "digits" else "crop-flip"
    if setting.scale == "smoke":
        return Recipe(epochs=6, learning_rate=0.2, attack=attack, clean_weight=clean_weight, augmentation="none", batch_size=64)
    if setting.scale == "paper":
        # 150 epochs, the rate falling each 50 (the released code of arXiv 1706.06083 in its authors' robustness library).
        return Recipe(
            epochs=150, learning_rate=0.1, schedule="step", attack=attack, clean_weight=clean_weight, augmentation=augmentation,
            precision="bfloat16",
        )  # fmt: skip
    epochs = {"cpu": 5, "gpu": 30}[setting.scale]
    return Recipe(
        epochs=epochs, learning_rate=0.2, attack=attack, clean_weight=clean_weight, augmentation=augmentation, precision="bfloat16",
    )  # fmt: skip
