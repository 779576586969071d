"""Decoys: defenses that only seem robust. Each is a wrapper around trained networks that tells its structure honestly.

What is known of a decoy is the robust accuracy of its networks: no decoy adds to it, they only hide the gradient, so an attack
or a check that is any good must come down to it. Four are held out: the doctor's thresholds were set without them.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from robench import noise
from robench.aggregate import crossmax, majority_vote, mean_of_logits
from robench.defense import Defense, Ensemble
from robench.errors import UserError
from robench.noise import Draw
from robench.surrogate import Substitute

Networks = Sequence[nn.Module]
Builder = Callable[[Networks], Defense]


@dataclass(frozen=True)
class Decoy:
    """A builder ``networks -> Defense``, how many of the networks it uses, and whether it is held out."""

    name: str
    build: Builder
    networks: int
    held_out: bool

    @property
    def summary(self) -> str:
        return (self.build.__doc__ or "").strip()


DECOYS: dict[str, Decoy] = {}


def decoy(networks: int = 1, held_out: bool = False) -> Callable[[Builder], Builder]:
    """Register a builder under its function's name."""

    def add(build: Builder) -> Builder:
        DECOYS[build.__name__] = Decoy(build.__name__, build, networks, held_out)
        return build

    return add


class Behind(Defense):
    """One network behind a transformation of the image, with a function of its logits after it.

    Args:
        network: from images to logits.
        before: from images (B, C, H, W) and the draw to images.
        after: from logits (B, classes) to logits.
        random: whether `before` uses the draw, which it is then always given.
    """

    def __init__(
        self,
        network: nn.Module,
        before: Callable[[Tensor, Draw | None], Tensor] = lambda x, _draw: x,
        after: Callable[[Tensor], Tensor] = lambda logits: logits,
        random: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.before = before
        self.after = after
        self.random = random

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        if self.random and draw is None:
            draw = Draw(0, torch.arange(len(x), device=x.device))
        logits: Tensor = self.network(self.before(x, draw))
        return logits[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return self.after(logits[:, 0])

    def members(self) -> list[nn.Module]:
        return [self.network]


# On the logits


@decoy()
def saturated_logits(networks: Networks) -> Defense:
    """Logits times 2000: the cross-entropy's gradient underflows (defensive distillation, arXiv 1511.04508)."""
    return Behind(networks[0], after=lambda logits: 2000 * logits)


@decoy()
def rounded_logits(networks: Networks) -> Defense:
    """Logits rounded to whole numbers: no gradient."""
    return Behind(networks[0], after=lambda logits: logits.round())


@decoy()
def probabilities(networks: Networks) -> Defense:
    """Probabilities of sharpened logits in the place of logits: the softmax of them is flat."""
    return Behind(networks[0], after=lambda logits: (20 * logits).softmax(1))


@decoy()
def stopped_gradient(networks: Networks) -> Defense:
    """Logits cut off from the image in the graph."""
    return Behind(networks[0], after=lambda logits: logits.detach())


@decoy(networks=3)
def hard_vote(networks: Networks) -> Defense:
    """The majority vote of three networks: no gradient."""
    return Ensemble(list(networks[:3]), majority_vote)


@decoy(networks=3)
def crossmax_median(networks: Networks) -> Defense:
    """CrossMax with the median over three networks (arXiv 2408.05446): the gradient goes through one of them at a time."""
    return Ensemble(list(networks[:3]), crossmax)


# On the image


@decoy()
def quantised_input(networks: Networks) -> Defense:
    """Pixels rounded to eight levels, without a gradient (arXiv 1704.01155)."""
    return Behind(networks[0], before=lambda x, _draw: (7 * x).round() / 7)


@decoy()
def thermometer(networks: Networks) -> Defense:
    """Pixels as a thermometer code of 15 thresholds, read back as their share (Buckman et al., ICLR 2018): no gradient."""

    def code(x: Tensor, _draw: Draw | None) -> Tensor:
        thresholds = (torch.arange(15, device=x.device) + 0.5) / 15
        return (x[..., None] > thresholds).to(x.dtype).mean(-1)

    return Behind(networks[0], before=code)


@decoy()
def jpeg(networks: Networks) -> Defense:
    """Rounded coefficients of the cosine transform of 8 x 8 blocks, coarser for higher frequencies (arXiv 1711.00117)."""
    k = torch.arange(8, dtype=torch.float64)
    basis = torch.cos(math.pi * (k[None, :] + 0.5) * k[:, None] / 8) * torch.where(k == 0, 0.125, 0.25).sqrt()[:, None]
    steps = 0.05 * (1 + k[:, None] + k[None, :])

    def compress(x: Tensor, _draw: Draw | None) -> Tensor:
        batch, channels, height, width = x.shape
        if height % 8 or width % 8:
            raise UserError(f"the jpeg decoy takes images of whole 8 x 8 blocks, and these are {height} x {width}")
        transform, table = basis.to(x), steps.to(x)
        blocks = x.reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
        kept = (transform @ blocks @ transform.T / table).round() * table
        return (transform.T @ kept @ transform).transpose(3, 4).reshape(x.shape).clamp(0, 1)

    return Behind(networks[0], before=compress)


@decoy()
def palette(networks: Networks) -> Defense:
    """Pixels looked up in a table of twelve levels: no gradient, nor one straight through; it declares the identity as its surrogate."""

    def look_up(x: Tensor, _draw: Draw | None) -> Tensor:
        levels = torch.linspace(0, 1, 12, device=x.device, dtype=x.dtype)
        return levels[(11 * x + 0.5).long().clamp(0, 11)]

    return Behind(networks[0], before=Substitute(look_up, lambda x, _draw: x))


@decoy(held_out=True)
def steep_staircase(networks: Networks) -> Defense:
    """Eight levels by steep sigmoids: a gradient everywhere that tells next to nothing of the stairs."""

    def stairs(x: Tensor, _draw: Draw | None) -> Tensor:
        level = (7 * x).detach().floor().clamp(max=6)
        return (level + torch.sigmoid(50 * (7 * x - level - 0.5))) / 7

    return Behind(networks[0], before=stairs)


@decoy()
def shattered(networks: Networks) -> Defense:
    """A ripple of the pixels of amplitude 0.01 and slope 100: the gradient is that of the ripple."""
    return Behind(networks[0], before=lambda x, _draw: x + 0.01 * torch.sin(1e4 * x))


class Rippled(nn.Module):
    """A network that adds a ripple to its images, without a word and without a layer for it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x + 0.0075 * torch.sin(400 * x))
        return logits


@decoy()
def coarse_ripple(networks: Networks) -> Defense:
    """A ripple of period 4/255 and slope 3: a gradient that holds nearby, and turns within the budget."""
    return honest([Rippled(networks[0])])


class _Scrambled(torch.autograd.Function):
    """The identity; its gradient comes back half an image, or half the features, away."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(_ctx: object, gradient: Tensor) -> Tensor:
        places = range(max(1, gradient.ndim - 2), gradient.ndim)
        return gradient.roll([gradient.shape[place] // 2 for place in places], dims=list(places))


@decoy()
def scrambled_gradient(networks: Networks) -> Defense:
    """The image itself, with a backward pass that is wrong."""

    def before(x: Tensor, _draw: Draw | None) -> Tensor:
        scrambled: Tensor = _Scrambled.apply(x)
        return scrambled

    return Behind(networks[0], before=before)


class Detector(Defense):
    """A network that abstains on images of unsure softmax and defers to a coarse look at them (MagNet, arXiv 1705.09064).

    There are as many outputs as classes, so abstaining cannot be an answer of its own: the answer to an image that the detector
    rejects is the network's on its blurred and rounded form, which gives no gradient. An abstention on a perturbed image thus
    counts as misclassified only if the coarse look is wrong too.
    """

    def __init__(self, network: nn.Module, unsure: float) -> None:
        super().__init__()
        self.network = network
        self.unsure = unsure

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        blurred = functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        own, coarse = self.network(x), self.network((3 * blurred).round() / 3)
        return torch.stack([own, coarse], dim=1)

    def aggregate(self, logits: Tensor) -> Tensor:
        odd = logits[:, 0].softmax(1).amax(1, keepdim=True) < self.unsure
        return torch.where(odd, logits[:, 1], logits[:, 0])

    def members(self) -> list[nn.Module]:
        return [self.network]


@decoy(held_out=True)
def detector(networks: Networks) -> Defense:
    """Where the softmax is below 0.9, the answer to the blurred and rounded image, which has no gradient."""
    return Detector(networks[0], 0.9)


# Inside the network


class Hooked(Defense):
    """One network with some of its layers' inputs or outputs changed.

    Args:
        network: from images to logits.
        change: from a layer's output (or, of `inputs_of`, input), its number among the layers changed, and the draw.
        outputs_of: kinds of layers whose outputs are changed.
        inputs_of: a layer whose input is changed.
        random: whether `change` uses the draw.
    """

    def __init__(
        self,
        network: nn.Module,
        change: Callable[[Tensor, Draw | None], Tensor],
        outputs_of: Sequence[nn.Module] = (),
        inputs_of: Sequence[nn.Module] = (),
        random: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.change = change
        # In tuples, so that the layers are not registered twice.
        self.outputs_of, self.inputs_of = tuple(outputs_of), tuple(inputs_of)
        self.random = random

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        if self.random and draw is None:
            draw = Draw(0, torch.arange(len(x), device=x.device))
        handles = [layer.register_forward_hook(lambda _m, _i, out: self.change(out, draw)) for layer in self.outputs_of]
        handles += [layer.register_forward_pre_hook(lambda _m, given: self.change(given[0], draw)) for layer in self.inputs_of]
        try:
            logits: Tensor = self.network(x)
        finally:
            for handle in handles:
                handle.remove()
        return logits[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        return [self.network]


@decoy(held_out=True)
def k_winners(networks: Networks) -> Defense:
    """Only the largest third of the activations of each layer pass (k-winners-take-all, arXiv 1905.10510)."""

    def winners(out: Tensor, _draw: Draw | None) -> Tensor:
        flat = out.flatten(1)
        least = flat.topk(max(1, flat.shape[1] // 3), dim=1).values[:, -1:]
        return torch.where(flat >= least, flat, 0).reshape(out.shape)

    layers = [layer for layer in networks[0].modules() if isinstance(layer, nn.BatchNorm2d | nn.ReLU)]
    return Hooked(networks[0], winners, outputs_of=layers)


class Table(nn.Module):
    """Values looked up in a table of levels a sixteenth apart: no gradient, nor one straight through."""

    def forward(self, x: Tensor) -> Tensor:
        levels = torch.arange(-128, 129, device=x.device, dtype=x.dtype) / 16
        return levels[(16 * x + 128.5).long().clamp(0, 256)]


class Scrambled(nn.Module):
    """What it is given, with a backward pass that is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        scrambled: Tensor = _Scrambled.apply(x)
        return scrambled


def _after_activations(network: nn.Module, layer: Callable[[], nn.Module]) -> Defense:
    """Return a copy of a network with a layer after every batch norm and ReLU module, as a defense."""
    changed = copy.deepcopy(network)
    for module in list(changed.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d | nn.ReLU):
                setattr(module, name, nn.Sequential(child, layer()))
    return Behind(changed)


@decoy()
def tabulated_features(networks: Networks) -> Defense:
    """Activations looked up in a table at every batch norm: the gradient ends inside the network."""
    return _after_activations(networks[0], Table)


@decoy()
def scrambled_features(networks: Networks) -> Defense:
    """A wrong backward pass at every batch norm: the gradient is lost inside the network."""
    return _after_activations(networks[0], Scrambled)


class SteepSoftmax(nn.Module):
    """The softmax of a network's sharpened logits, which is flat, beside a small linear term of the image, which alone has a slope."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        weight = noise.normal(Draw(0, torch.arange(1)), "decoy/term", (x[0].numel(), logits.shape[1])).to(x)[0].sign()
        return 5 * (20 * logits).softmax(1) + (x - 0.5).flatten(1) @ weight / len(weight)


@decoy()
def steep_softmax(networks: Networks) -> Defense:
    """A flat softmax beside a small linear term, within a module that does not tell: the gradient is the term's."""
    return Behind(SteepSoftmax(networks[0]))


@decoy()
def dropout(networks: Networks) -> Defense:
    """A fresh three tenths of the last layer's inputs dropped at each forward (arXiv 1803.01442)."""

    def drop(given: Tensor, draw: Draw | None) -> Tensor:
        assert draw is not None
        kept = noise.uniform(draw, "decoy/dropout", tuple(given.shape[1:])) >= 0.3
        return given * kept / 0.7

    last = [layer for layer in networks[0].modules() if isinstance(layer, nn.Linear)][-1]
    return Hooked(networks[0], drop, inputs_of=[last], random=True)


# At random


@decoy()
def gaussian_noise(networks: Networks) -> Defense:
    """Gaussian noise of standard deviation 0.25 on the image."""

    def noisy(x: Tensor, draw: Draw | None) -> Tensor:
        assert draw is not None
        return x + 0.25 * noise.normal(draw, "decoy/noise", tuple(x.shape[1:])).to(x)

    return Behind(networks[0], before=noisy, random=True)


@decoy(held_out=True)
def resize_and_pad(networks: Networks) -> Defense:
    """The image shrunk by up to a tenth and put at a random place (arXiv 1711.01991)."""

    def place(x: Tensor, draw: Draw | None) -> Tensor:
        assert draw is not None
        drawn = noise.uniform(draw, "decoy/place", (3,)).to(x)
        size = 1 - 0.1 * drawn[:, 0]
        shift = (2 * drawn[:, 1:] - 1) * (1 - size[:, None])
        # The grid maps places of the result to places of the image.
        scale = (1 / size)[:, None, None] * torch.eye(2, device=x.device, dtype=x.dtype)
        grid = functional.affine_grid(torch.cat([scale, -(shift / size[:, None])[:, :, None]], dim=2), list(x.shape), align_corners=False)
        return functional.grid_sample(x, grid, align_corners=False)

    return Behind(networks[0], before=place, random=True)


def honest(networks: Networks) -> Defense:
    """Return the undefended mean of networks."""
    return Ensemble(list(networks), mean_of_logits)
