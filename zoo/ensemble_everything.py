"""Defenses of "Ensemble everything everywhere" (arXiv 2408.05446): multi-resolution inputs, self-ensembles, CrossMax.

The released code and the paper's text differ. ``variant=as_published`` is the code: uniform noise of 0.2 * U[0, 1), the contrast
factor tied to the colour amount, a second draw for the backbone's own prediction. ``as_described`` is the text: Gaussian noise of
standard deviation 0.2, contrast from 0.7 to 1.5, one draw.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from robench import noise
from robench.aggregate import crossmax, crossmax_kth
from robench.defense import Defense, Ensemble
from robench.errors import UserError
from robench.noise import Draw
from robench.training import Recipe, Stage
from robench.zoo import Setting, Specimen, register

from .backbones import Backbone
from .papers import ENSEMBLE_EVERYTHING
from .recipes import member_seed, natural, network, single_step, stage

VARIANTS = ("as_published", "as_described")

TAPS = {
    "smoke": ("stages.0", "stages.1", "stages.2"),
    "cpu": ("stages.0", "stages.1", "stages.2"),
    "gpu": ("stages.layer1.1", "stages.layer2.1", "stages.layer3.0", "stages.layer3.1", "stages.layer4.0", "stages.layer4.1"),
    # Layers 20, 30, 35, 40, 45 and 50 in the released code's numbering.
    "paper": ("stages.layer3.7", "stages.layer3.17", "stages.layer3.22", "stages.layer3.27", "stages.layer3.32", "stages.layer4.1"),
}
"""The layers with a head of their own, beside the pooled features and the backbone's prediction."""


def stack_resolutions(x: Tensor, draw: Draw, resolutions: Sequence[int], variant: str, stream: str) -> Tensor:
    """Return noisy, jittered copies of images (B, 3, S, S) at several resolutions, stacked to (B, 3 * N, S, S), in [0, 1].

    Args:
        x: images in [0, 1].
        draw: the noise draw.
        resolutions: sides, from high to low.
        variant: ``as_published`` or ``as_described``.
        stream: tells two draws of one forward apart.
    """
    side, many = x.shape[-1], len(resolutions)
    # Gaussian noise takes two words a number.
    each = 1 if variant == "as_published" else 2
    counts = {"colour": 1, "contrast": 1, "shift": 2}
    shapes = {(r, name): (3, s, s) for r in resolutions for name, s in (("low", r), ("high", side))}
    words = noise.words(
        draw,
        {f"{stream}/{r}/{name}": count for r in resolutions for name, count in counts.items() if name != "contrast" or each == 2}
        | {f"{stream}/{r}/{name}": each * math.prod(shape) for (r, name), shape in shapes.items()},
    )

    def levels(name: str, low: float, high: float) -> Tensor:
        """Return (B, N, 1, 1, 1) of 100 levels."""
        found = torch.cat([words[f"{stream}/{r}/{name}"] for r in resolutions], dim=1)
        return low + (high - low) * noise.as_integers(found, 0, 100, (many, 1, 1, 1)).to(x.dtype) / 99

    def perturbation(resolution: int, name: str) -> Tensor:
        numbers = noise.as_uniform if variant == "as_published" else noise.as_normal
        return 0.2 * numbers(words[f"{stream}/{resolution}/{name}"], shapes[resolution, name]).to(x.dtype)

    colour = levels("colour", 0.5, 1.0)
    contrast = colour if variant == "as_published" else levels("contrast", 0.7, 1.5)
    luma = (x * x.new_tensor([0.2989, 0.587, 0.114]).reshape(1, 3, 1, 1)).sum(1, keepdim=True)
    out = contrast * x[:, None] + (1 - contrast) * luma.mean((1, 2, 3), keepdim=True)[:, None]
    if variant != "as_published":
        # A factor of at most 1 does not leave [0, 1].
        out = out.clamp(0, 1)
    out = colour * out + (1 - colour) * out.mean(2, keepdim=True)
    pixels, copies = torch.arange(side, device=x.device), []
    for copy, resolution in zip(out.unbind(1), resolutions, strict=True):
        shift = noise.as_integers(words[f"{stream}/{resolution}/shift"], -3, 4, (2,))
        # The cyclic shift moves the matrix's columns instead of the image's pixels.
        down = _resizing(side, resolution).to(x)
        rows, columns = (down.T[(pixels + shift[:, axis, None]) % side][:, None] for axis in range(2))
        small = rows.mT @ copy @ columns + perturbation(resolution, "low")
        if resolution != side:
            up = _resizing(resolution, side).to(x)
            small = up @ small @ up.T
        copies.append(small + perturbation(resolution, "high"))
    return torch.cat(copies, dim=1).clamp(0, 1)


@cache
def _resizing(side: int, to: int) -> Tensor:
    """Return the matrix (to, side) of bicubic interpolation along one axis, without antialiasing, in float64."""
    identity = torch.eye(side, dtype=torch.float64)[None, None]
    return functional.interpolate(identity, size=(to, side), mode="bicubic")[0, 0]


class MultiResolution(Defense):
    """A network on a stack of noisy copies of the image at several resolutions; random, every forward a fresh draw."""

    random = True

    def __init__(self, network: Backbone, resolutions: Sequence[int], variant: str) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise UserError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
        self.network = network
        self.resolutions = tuple(resolutions)
        self.variant = variant
        self._calls = itertools.count()

    def stacked(self, x: Tensor, draw: Draw | None, stream: str) -> Tensor:
        """Return the network's input for images `x`; without a draw, the next of the module's own."""
        draw = draw or Draw(0, torch.arange(len(x), device=x.device), next(self._calls))
        return stack_resolutions(x, draw, self.resolutions, self.variant, stream)

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        logits: Tensor = self.network(self.stacked(x, draw, "backbone"))
        return logits[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        return [self.network.stages]


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
        stacked = torch.zeros(1, image_shape[0] * len(backbone.resolutions), *image_shape[1:])
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
        if self.backbone.variant == "as_published":
            own = self.backbone.predictors(x, draw)[:, 0]
        return torch.stack([*(head(f) for head, f in zip(self.heads, features, strict=True)), own], dim=1)

    def aggregate(self, logits: Tensor) -> Tensor:
        return self.aggregator(logits)

    def members(self) -> list[nn.Module]:
        return self.backbone.members()


def _multires(setting: Setting, backbone: str | None, variant: str, member: int = 0) -> MultiResolution:
    resolutions = [setting.image_shape[-1] // 2**i for i in range(4)]
    channels = setting.image_shape[0] * len(resolutions)
    return MultiResolution(network(setting, backbone, paper="resnet152", member=member, channels=channels), resolutions, variant)


def _backbone_recipe(setting: Setting, light_adversarial: bool) -> Recipe:
    recipe = single_step(setting) if light_adversarial else natural(setting)
    if setting.scale != "paper":
        return replace(recipe, augmentation="none")
    return replace(recipe, epochs=6, learning_rate=3.3e-5, schedule="constant", optimiser="adam", weight_decay=0.0, augmentation="none")


def _head_recipe(setting: Setting) -> Recipe:
    rate, epochs = (3.3e-5, 1) if setting.scale == "paper" else (1e-3, 3 if setting.scale == "smoke" else 1)
    return replace(
        natural(setting), epochs=epochs, learning_rate=rate, schedule="constant", optimiser="adam", weight_decay=0.0,
        augmentation="none", batch_size=64, loss_on="predictors",
    )  # fmt: skip


def self_ensemble(
    setting: Setting, backbone: str | None, k: int, variant: str, light_adversarial: bool, member: int = 0, path: str = ""
) -> tuple[SelfEnsemble, list[Stage]]:
    """Return a self-ensemble and its stages: the backbone, then the heads on the frozen backbone, on clean images."""
    taps = TAPS[setting.scale]
    if backbone is not None and not backbone.startswith(("wrn", "resnet8")):
        taps = TAPS["paper" if backbone == "resnet152" else "gpu"]
    with noise.isolated_generator(member_seed(setting, 700 + member)):
        defense = SelfEnsemble(_multires(setting, backbone, variant, member), taps, setting.classes, setting.image_shape, k)
    return defense, [
        stage(_backbone_recipe(setting, light_adversarial), setting, f"{path}backbone", member),
        stage(_head_recipe(setting), setting, path.rstrip("."), member, trainable=("heads",)),
    ]


def _multires_specimen(setting: Setting, backbone: str | None, variant: str, light_adversarial: bool) -> Specimen:
    defense = _multires(setting, backbone, variant)
    return Specimen(defense, (stage(_backbone_recipe(setting, light_adversarial), setting),))


@register(paper=ENSEMBLE_EVERYTHING, version=1)
def multires(setting: Setting, *, variant: str = "as_published", backbone: str | None = None) -> Specimen:
    """One network on four noisy resolutions of the image, trained on clean images."""
    return _multires_specimen(setting, backbone, variant, light_adversarial=False)


@register(paper=ENSEMBLE_EVERYTHING, version=1)
def multires_adv(setting: Setting, *, variant: str = "as_published", backbone: str | None = None) -> Specimen:
    """`multires` with the paper's light adversarial training (single-step, no random start)."""
    return _multires_specimen(setting, backbone, variant, light_adversarial=True)


@register(paper=ENSEMBLE_EVERYTHING, version=1)
def multires_self_ensemble(setting: Setting, *, k: int = 3, variant: str = "as_published", backbone: str | None = None) -> Specimen:
    """Heads on the layers of `multires`, aggregated by CrossMax (Algorithm 1) with the k-th highest."""
    defense, stages = self_ensemble(setting, backbone, k, variant, light_adversarial=False)
    return Specimen(defense, tuple(stages))


@register(paper=ENSEMBLE_EVERYTHING, version=1)
def multires_self_ensemble_adv(setting: Setting, *, k: int = 3, variant: str = "as_published", backbone: str | None = None) -> Specimen:
    """`multires_self_ensemble` on a lightly adversarially trained network."""
    defense, stages = self_ensemble(setting, backbone, k, variant, light_adversarial=True)
    return Specimen(defense, tuple(stages))


def _ensemble3(setting: Setting, backbone: str | None, k: int, variant: str, light_adversarial: bool) -> Specimen:
    parts = [self_ensemble(setting, backbone, k, variant, light_adversarial, 10 + i, f"networks.{i}.") for i in range(3)]
    # The paper's Algorithm 1 takes the median over equivalent models; it does not say over which outputs. Here: the three predictions.
    return Specimen(Ensemble([defense for defense, _ in parts], crossmax), tuple(s for _, stages in parts for s in stages))


@register(paper=ENSEMBLE_EVERYTHING, version=1)
def multires_ensemble3(setting: Setting, *, k: int = 3, variant: str = "as_published", backbone: str | None = None) -> Specimen:
    """Three self-ensembles, their predictions aggregated by CrossMax with the median; the paper's strongest model."""
    return _ensemble3(setting, backbone, k, variant, light_adversarial=False)


@register(paper=ENSEMBLE_EVERYTHING, version=1)
def multires_ensemble3_adv(setting: Setting, *, k: int = 3, variant: str = "as_published", backbone: str | None = None) -> Specimen:
    """Three lightly adversarially trained self-ensembles, aggregated by CrossMax with the median."""
    return _ensemble3(setting, backbone, k, variant, light_adversarial=True)
