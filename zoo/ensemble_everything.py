"""Defenses of "Ensemble everything everywhere" (arXiv 2408.05446): multi-resolution networks, self-ensembles, three of them.

For ``variant`` see multiresolution.py; ``resolutions`` is their number, 4 by default.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robench import noise
from robench.aggregate import crossmax, crossmax_kth
from robench.defense import Defense, Ensemble
from robench.errors import UserError
from robench.noise import Draw
from robench.recipe import Recipe, Stage
from robench.zoo import Setting, Specimen, register

from .multiresolution import MultiResolution, pipeline
from .papers import ENSEMBLE_EVERYTHING
from .recipes import member_seed, natural, network, single_step, stage

TAPS = {
    "smoke": ("stages.0", "stages.1", "stages.2"),
    "cpu": ("stages.0", "stages.1", "stages.2"),
    "gpu": ("stages.layer1.1", "stages.layer2.1", "stages.layer3.0", "stages.layer3.1", "stages.layer4.0", "stages.layer4.1"),
    # Layers 20, 30, 35, 40, 45 and 50 in the released code's numbering.
    "paper": ("stages.layer3.7", "stages.layer3.17", "stages.layer3.22", "stages.layer3.27", "stages.layer3.32", "stages.layer4.1"),
}
"""The layers with a head of their own, beside the pooled features and the backbone's prediction."""


class SelfEnsemble(Defense):
    """Heads on a multi-resolution network's layers and its own prediction, aggregated by CrossMax with the k-th highest."""

    random = True

    def __init__(self, backbone: MultiResolution, taps: Sequence[str], classes: int, image_shape: tuple[int, int, int], k: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.taps = tuple(taps)
        self.aggregator = crossmax_kth(k)
        if not 2 <= k <= len(self.taps) + 2:
            raise UserError(f"k = {k} must be between 2 and the number of predictors, {len(self.taps) + 2}")
        stacked = torch.zeros(1, image_shape[0] * len(backbone.pipeline.resolutions), *image_shape[1:])
        # In training mode a forward would move the batch-norm statistics.
        backbone.eval()
        with torch.no_grad():
            sizes = [f.shape[1] for f in self._features(stacked)[0]]
        self.heads = nn.ModuleList(nn.Sequential(nn.BatchNorm1d(size), nn.Linear(size, classes)) for size in sizes)

    def _features(self, stacked: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the flattened outputs of the tapped layers and the pooled features, and the backbone's logits."""
        found: dict[str, Tensor] = {}

        def keep(name: str) -> object:
            return self.backbone.network.get_submodule(name).register_forward_hook(lambda _m, _i, out: found.update({name: out}))

        handles = [keep(name) for name in self.taps]
        try:
            pooled = self.backbone.network.features(stacked)
        finally:
            for handle in handles:
                handle.remove()  # type: ignore[attr-defined]
        return [*(found[name].flatten(1) for name in self.taps), pooled], self.backbone.network.fc(pooled)

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        features, own = self._features(self.backbone.stacked(x, draw, "heads"))
        if self.backbone.pipeline.variant == "as_published":
            own = self.backbone.predictors(x, draw)[:, 0]
        return torch.stack([*(head(f) for head, f in zip(self.heads, features, strict=True)), own], dim=1)

    def aggregate(self, logits: Tensor) -> Tensor:
        return self.aggregator(logits)

    def members(self) -> list[nn.Module]:
        return self.backbone.members()


@dataclass(frozen=True)
class Design:
    """What the defenses of this paper are built from: the backbone's name or None for the scale's, and the input's pipeline."""

    backbone: str | None
    variant: str
    resolutions: int | None = None
    light_adversarial: bool = False


def multiresolution(setting: Setting, design: Design, member: int = 0) -> MultiResolution:
    """Return an untrained network on the stack of resolutions."""
    stack = pipeline(setting.image_shape[-1], design.variant, design.resolutions)
    channels = setting.image_shape[0] * len(stack.resolutions)
    return MultiResolution(network(setting, design.backbone, paper="resnet152", member=member, channels=channels), stack)


def backbone_recipe(setting: Setting, design: Design) -> Recipe:
    """Return how the network on the stack is trained; its noise is all the augmentation there is."""
    recipe = single_step(setting) if design.light_adversarial else natural(setting)
    if setting.scale != "paper":
        return replace(recipe, augmentation="none")
    return replace(recipe, epochs=6, learning_rate=3.3e-5, schedule="constant", optimiser="adam", weight_decay=0.0, augmentation="none")


def _head_recipe(setting: Setting) -> Recipe:
    rate, epochs = (3.3e-5, 1) if setting.scale == "paper" else (1e-3, 3 if setting.scale == "smoke" else 1)
    return replace(
        natural(setting), epochs=epochs, learning_rate=rate, schedule="constant", optimiser="adam", weight_decay=0.0,
        augmentation="none", batch_size=64, loss_on="predictors",
    )  # fmt: skip


def self_ensemble(setting: Setting, design: Design, k: int, member: int = 0, path: str = "") -> tuple[SelfEnsemble, list[Stage]]:
    """Return a self-ensemble and its stages: the backbone, then the heads on the frozen backbone, on clean images."""
    taps = TAPS[setting.scale]
    if design.backbone is not None and not design.backbone.startswith(("wrn", "resnet8")):
        taps = TAPS["paper" if design.backbone == "resnet152" else "gpu"]
    with noise.isolated_generator(member_seed(setting, 700 + member)):
        defense = SelfEnsemble(multiresolution(setting, design, member), taps, setting.classes, setting.image_shape, k)
    return defense, [
        stage(backbone_recipe(setting, design), setting, f"{path}backbone", member),
        stage(_head_recipe(setting), setting, path.rstrip("."), member, trainable=("heads",)),
    ]


def _alone(setting: Setting, design: Design) -> Specimen:
    return Specimen(multiresolution(setting, design), (stage(backbone_recipe(setting, design), setting),))


def _one(setting: Setting, design: Design, k: int) -> Specimen:
    defense, stages = self_ensemble(setting, design, k)
    return Specimen(defense, tuple(stages))


def _three(setting: Setting, design: Design, k: int) -> Specimen:
    parts = [self_ensemble(setting, design, k, 10 + i, f"networks.{i}.") for i in range(3)]
    # The paper's Algorithm 1 takes the median over equivalent models; it does not say over which outputs. Here: the three predictions.
    return Specimen(Ensemble([defense for defense, _ in parts], crossmax), tuple(s for _, stages in parts for s in stages))


@register(paper=ENSEMBLE_EVERYTHING, version=1)
def multires(setting: Setting, *, variant: str = "as_published", backbone: str | None = None, resolutions: int | None = None) -> Specimen:
    """One network on four noisy resolutions of the image, trained on clean images."""
    return _alone(setting, Design(backbone, variant, resolutions))


@register(paper=ENSEMBLE_EVERYTHING, version=2)
def multires_adv(
    setting: Setting, *, variant: str = "as_published", backbone: str | None = None, resolutions: int | None = None
) -> Specimen:
    """`multires` with the paper's light adversarial training (single-step, no random start)."""
    return _alone(setting, Design(backbone, variant, resolutions, light_adversarial=True))


@register(paper=ENSEMBLE_EVERYTHING, version=1)
def multires_self_ensemble(
    setting: Setting, *, k: int = 3, variant: str = "as_published", backbone: str | None = None, resolutions: int | None = None
) -> Specimen:
    """Heads on the layers of `multires`, aggregated by CrossMax (Algorithm 1) with the k-th highest."""
    return _one(setting, Design(backbone, variant, resolutions), k)


@register(paper=ENSEMBLE_EVERYTHING, version=2)
def multires_self_ensemble_adv(
    setting: Setting, *, k: int = 3, variant: str = "as_published", backbone: str | None = None, resolutions: int | None = None
) -> Specimen:
    """`multires_self_ensemble` on a lightly adversarially trained network."""
    return _one(setting, Design(backbone, variant, resolutions, light_adversarial=True), k)


@register(paper=ENSEMBLE_EVERYTHING, version=1)
def multires_ensemble3(setting: Setting, *, k: int = 3, variant: str = "as_published", backbone: str | None = None) -> Specimen:
    """Three self-ensembles, their predictions aggregated by CrossMax with the median; the paper's strongest model."""
    return _three(setting, Design(backbone, variant), k)


@register(paper=ENSEMBLE_EVERYTHING, version=2)
def multires_ensemble3_adv(setting: Setting, *, k: int = 3, variant: str = "as_published", backbone: str | None = None) -> Specimen:
    """Three lightly adversarially trained self-ensembles, aggregated by CrossMax with the median."""
    return _three(setting, Design(backbone, variant, light_adversarial=True), k)
