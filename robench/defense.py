"""The defense contract: what an attacker is told of a defense's structure."""

import hashlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robench.aggregate import Aggregator
from robench.errors import UserError
from robench.noise import Draw, isolated_generator


class Defense(nn.Module):
    """A classifier of images (B, C, H, W) in [0, 1] that tells its structure: several predictors and what combines them.

    Subclasses implement `predictors` and `aggregate`. Attacks use both; the prediction itself is `forward`.

    Attributes:
        random: whether two forwards of one image may differ. A random defense takes its noise from the `draw` it is given.
    """

    random: bool = False

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the logits of every member or head before they are combined: (B, C, H, W) -> (B, N, classes)."""
        raise NotImplementedError

    def aggregate(self, logits: Tensor) -> Tensor:
        """Combine the predictors' logits: (B, N, classes) -> (B, classes)."""
        raise NotImplementedError

    @property
    def nested(self) -> bool:
        """Whether a predictor is a defense with predictors and an aggregation of its own."""
        return False

    def innermost(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the logits of every predictor, with those of its own in the place of a nested defense: (B, C, H, W) -> (B, M, classes)."""
        return self.predictors(x, draw)

    def members(self) -> list[nn.Module]:
        """Return the modules whose forwards and backwards are the defense's cost; each counts one pass per image."""
        raise NotImplementedError

    def forward(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Return logits (B, classes) for images (B, C, H, W) in [0, 1]."""
        return self.aggregate(self.predictors(x, draw))


class Ensemble(Defense):
    """Networks that see the same image, combined by an aggregator. One network and the mean make a plain classifier.

    Args:
        networks: modules from images to logits (B, classes). A `Defense` among them is given the draw.
        aggregator: what combines their logits.
    """

    def __init__(self, networks: Sequence[nn.Module], aggregator: Aggregator) -> None:
        super().__init__()
        self.networks = nn.ModuleList([watchable(network) for network in networks])
        self.aggregator = aggregator
        self.random = any(isinstance(network, Defense) and network.random for network in networks)

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        return torch.stack([_logits(network, x, member_draw(draw, i)) for i, network in enumerate(self.networks)], dim=1)

    def aggregate(self, logits: Tensor) -> Tensor:
        return self.aggregator(logits)

    @property
    def nested(self) -> bool:
        return any(isinstance(network, Defense) and not isinstance(network, Plain) for network in self.networks)

    def innermost(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        parts = [
            network.innermost(x, member_draw(draw, i)) if isinstance(network, Defense) else network(x)[:, None]
            for i, network in enumerate(self.networks)
        ]
        return torch.cat(parts, dim=1)

    def members(self) -> list[nn.Module]:
        return [m for network in self.networks for m in (network.members() if isinstance(network, Defense) else [network])]


class Plain(Defense):
    """Any module from images to logits, as a defense with one predictor and no structure to tell.

    `aggregate` is the identity on the one predictor, whatever the module does inside. A random one draws from torch's global
    generators, which are seeded for its forward from the draw and restored after it.

    Attributes:
        takes_gradients: whether the module may be given images that take a gradient; one that refuses them is given copies that do not.
    """

    takes_gradients: bool = True

    def __init__(self, module: nn.Module, random: bool = False) -> None:
        super().__init__()
        self.module = watchable(module)
        self.random = random

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        if not self.takes_gradients:
            x = x.detach()
        if not self.random or draw is None:
            logits: Tensor = self.module(x)
        else:
            seed = hash((draw.seed, draw.number, int(draw.examples[0]) if len(draw.examples) else 0)) & 0x7FFFFFFF
            with isolated_generator(seed, x.device):
                logits = self.module(x)
        if not isinstance(logits, Tensor):
            raise UserError(f"its forward returns an object of type {type(logits).__name__}, where a tensor (batch, classes) is wanted")
        return logits[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        return [self.module]


class Scripted(nn.Module):
    """A TorchScript network within a module, whose calls can be counted and watched as its own cannot."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's logits (B, classes) for images (B, C, H, W)."""
        logits: Tensor = self.network(x)
        return logits


def watchable(network: nn.Module) -> nn.Module:
    """Return a network that hooks can be put on: itself, or where it is TorchScript, a module around it."""
    return Scripted(network) if isinstance(network, torch.jit.ScriptModule) else network


def as_defense(module: nn.Module) -> Defense:
    """Return `module` itself if it is a defense, else the module as a defense without structure."""
    return module if isinstance(module, Defense) else Plain(module)


def member_draw(draw: Draw | None, member: int) -> Draw | None:
    """Return the draw for one member, so that random members do not share their noise."""
    if draw is None:
        return None
    digest = hashlib.sha256(f"{draw.seed}/member {member}".encode()).digest()
    return Draw(int.from_bytes(digest[:8], "little"), draw.examples, draw.number)


def _logits(network: nn.Module, x: Tensor, draw: Draw | None) -> Tensor:
    logits: Tensor = network(x, draw) if isinstance(network, Defense) else network(x)
    return logits


class FreshDraws(nn.Module):
    """A random defense as a plain module: every forward takes the next draw, as the defense does in use.

    For attacks from elsewhere, which know nothing of draws. An image's identity is its position in the batch.
    """

    def __init__(self, defense: Defense, seed: int) -> None:
        super().__init__()
        self.defense = defense
        self.seed = seed
        self._numbers = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        examples = torch.arange(len(x), device=x.device)
        logits: Tensor = self.defense(x, Draw(self.seed, examples, next(self._numbers)))
        return logits
