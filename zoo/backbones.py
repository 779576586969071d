"""Networks that the defenses are built from: WRN-d-w (and the ResNet-8 within it), CIFAR ResNet-18, ResNet-152, any timm model.

All take images (B, C, H, W) in [0, 1], normalise them inside, and return logits (B, classes).
"""

import math
import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robench.errors import UserError


class Normalise(nn.Module):
    """Shift and scale images (B, C, H, W) by a mean and standard deviation per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = (x - self.mean) / self.std
        return scaled


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, around a shortcut (He et al., arXiv 1603.05027)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        change = stride != 1 or channels_in != channels
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if change else None

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(functional.relu(self.norm2(self.conv1(out))))
        total: Tensor = out + shortcut
        return total


class WideResNet(nn.Module):
    """A wide residual network (Zagoruyko and Komodakis, arXiv 1605.07146) of three stages.

    Args:
        blocks: residual blocks in each stage; WRN-d has (d - 4) / 6.
        width: channels of the first stage, doubled in each next one; WRN-d-w has 16 w.
        classes: logits.
        channels: input channels.
        stem: channels of the first convolution; 16 in WRN-d-w, the first stage's by default.
    """

    def __init__(self, blocks: int, width: int, classes: int, channels: int = 3, stem: int | None = None) -> None:
        super().__init__()
        self.normalise = Normalise((0.5,) * channels, (0.25,) * channels)
        channels_in = stem or width
        self.stem = nn.Conv2d(channels, channels_in, 3, 1, 1, bias=False)
        stages = []
        for stage in range(3):
            out = width * 2**stage
            layers = [PreActivationBlock(channels_in if i == 0 else out, out, 2 if i == 0 and stage > 0 else 1) for i in range(blocks)]
            stages.append(nn.Sequential(*layers))
            channels_in = out
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels_in)
        self.fc = nn.Linear(channels_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def features(self, x: Tensor) -> Tensor:
        """Return the penultimate features (B, 4 * width)."""
        out = functional.relu(self.norm(self.stages(self.stem(self.normalise(x)))))
        return out.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x))
        return logits


class Trunk(nn.Module):
    """A timm network as a backbone: normalised input, its pooled features, and a linear layer of its own.

    Args:
        trunk: a timm model without classifier (``num_classes=0``).
        classes: logits.
        channels: input channels.
        side: the image side the trunk sees, reached by bicubic interpolation; None leaves the image as it is.
    """

    def __init__(self, trunk: nn.Module, classes: int, channels: int, side: int | None = None) -> None:
        super().__init__()
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        copies = math.ceil(channels / 3)
        self.normalise = Normalise((mean * copies)[:channels], (std * copies)[:channels])
        self.side = side
        self.stages = trunk
        self.fc = nn.Linear(int(trunk.num_features), classes)  # type: ignore[arg-type]

    def features(self, x: Tensor) -> Tensor:
        """Return the penultimate features (B, F)."""
        if self.side is not None:
            x = functional.interpolate(x, size=(self.side, self.side), mode="bicubic")
        features: Tensor = self.stages(self.normalise(x))
        return features

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x))
        return logits


Backbone = WideResNet | Trunk


def backbone(name: str, classes: int, *, channels: int = 3, widen: float = 1.0, pretrained: bool = False) -> Backbone:
    """Build a backbone by name, its weights drawn from torch's current generator.

    Names: ``wrn-28-10`` (any depth 6n + 4 and width factor), ``resnet8-32`` (one block a stage, the first 32 wide), ``resnet8-32s2``
    (its stem halves the image), ``resnet18`` (3x3 stem, for small images), ``resnet18-unnormalised`` (without batch norm, as
    arXiv 2408.05446 trains it from scratch), ``resnet152`` (images enlarged to 224, as in
    arXiv 2408.05446), ``timm:NAME``.

    Args:
        name: which network.
        classes: logits.
        channels: input channels.
        widen: multiplies the width of a wide residual network and of resnet18.
        pretrained: ImageNet weights for resnet152 and timm networks; the first layer is drawn anew when channels is not 3.

    Raises:
        UserError: for an unknown name.
    """
    if (wide := re.fullmatch(r"wrn-([1-9]\d*)-([1-9]\d*)", name)) and int(wide[1]) >= 10 and int(wide[1]) % 6 == 4:
        return WideResNet((int(wide[1]) - 4) // 6, round(16 * int(wide[2]) * widen), classes, channels, stem=16)
    if small := re.fullmatch(r"resnet8-([1-9]\d*)(s2)?", name):
        network = WideResNet(1, round(int(small[1]) * widen), classes, channels)
        if small[2]:
            network.stem.stride = (2, 2)
        return network
    if name in ("resnet18", "resnet18-unnormalised"):
        half = round(32 * widen)
        widths = tuple(2 * half * 2**stage for stage in range(4))
        norm = {} if name == "resnet18" else {"norm_layer": nn.Identity}
        # Only timm's deep stem takes a width; it is replaced, but the first stage is built for what it gives.
        trunk = _timm("resnet18", channels, pretrained=False, stem_type="deep", stem_width=half, channels=widths, **norm)
        trunk.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        trunk.maxpool = nn.Identity()
        return Trunk(trunk, classes, channels)
    if name == "resnet152":
        trunk = _timm("resnet152.tv2_in1k", channels, pretrained)
        if channels != 3:
            trunk.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        return Trunk(trunk, classes, channels, side=224)
    if name.startswith("timm:"):
        return Trunk(_timm(name.removeprefix("timm:"), channels, pretrained), classes, channels)
    raise UserError(f"unknown backbone {name!r}; write wrn-28-10, resnet8-32, resnet18, resnet152 or timm:NAME")


def _timm(name: str, image_channels: int, pretrained: bool, **settings: Any) -> nn.Module:
    with warnings.catch_warnings():
        # timm 1.0.9 uses what torch has since deprecated.
        warnings.simplefilter("ignore")
        import timm  # heavy, and needed by few

    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}")
    model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, in_chans=image_channels, **settings)
    return model
