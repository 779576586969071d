"""Threat models: what an attacker may change. Norm balls of exact budget, intersected with the images' range [0, 1]."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from robench import noise
from robench.errors import UserError
from robench.parameters import exact

Norm = Literal["Linf", "L2", "L1"]
NORMS: tuple[Norm, ...] = get_args(Norm)

# float32 images in [0, 1]: the rounding of x + delta stays below this.
TOLERANCE = 1e-6

LARGEST = 10**8
"""No budget is larger: images of more values than this do not fit a model."""


@dataclass(frozen=True)
class ThreatModel:
    """All images within `budget` of the clean image in `norm`, with values in [0, 1].

    Attributes:
        norm: ``Linf``, ``L2`` or ``L1``, over all values of one image.
        budget: the exact budget, in units of the pixel range [0, 1] (``8/255``), at least 0.
    """

    norm: Norm
    budget: Fraction

    @classmethod
    def parse(cls, text: str) -> "ThreatModel":
        """Read ``Linf:8/255`` or ``L2:0.5`` exactly.

        Raises:
            UserError: if the norm is unknown, or the budget is no number, negative or beyond every image.
        """
        norm, separator, budget = text.partition(":")
        if not separator or norm not in NORMS:
            known = ", ".join(NORMS)
            raise UserError(f"threat model {text!r} is not NORM:BUDGET with a norm of {known}, as in Linf:8/255 or L2:0.5")
        try:
            value = exact(budget.strip())
            float(value)
        except (ValueError, ZeroDivisionError, OverflowError):
            raise UserError(f"threat model {text!r}: the budget {budget!r} is no number; write it as 8/255 or 0.5") from None
        if value < 0:
            raise UserError(f"threat model {text!r}: the budget must be at least 0")
        if value > LARGEST:
            raise UserError(f"threat model {text!r}: the budget must be at most {LARGEST:,}; no image is as large")
        return cls(norm, value)

    def __str__(self) -> str:
        return f"{self.norm}:{self.budget_text}"

    @property
    def budget_text(self) -> str:
        """The budget as the field writes it: ``8/255`` for Linf where it is one, a decimal where that is exact."""
        in_levels = self.budget * 255
        if self.norm == "Linf" and in_levels.denominator == 1 and self.budget.denominator > 1:
            return f"{in_levels.numerator}/255"
        decimal = Fraction(str(float(self.budget)))
        return str(float(self.budget)).removesuffix(".0") if decimal == self.budget else str(self.budget)

    @property
    def epsilon(self) -> float:
        """The budget as a float."""
        return float(self.budget)

    def scaled(self, factor: Fraction | int) -> "ThreatModel":
        """Return the threat model of the same norm with `factor` times the budget."""
        return ThreatModel(self.norm, self.budget * Fraction(factor))

    def size(self, delta: Tensor) -> Tensor:
        """Return the norm of each perturbation: (B, ...) -> (B,), computed in float64."""
        flat = delta.detach().double().flatten(1)
        return flat.abs().amax(1) if self.norm == "Linf" else flat.norm(p=2 if self.norm == "L2" else 1, dim=1)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and the largest that each value of clean images (B, ...) may become, the shape of the images each."""
        return (x - self.epsilon).clamp_(min=0), (x + self.epsilon).clamp_(max=1)

    def project(self, x_adv: Tensor, x: Tensor, rounds: int = 20, bounds: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the point of the threat model nearest to `x_adv` in the Euclidean sense.

        The projection is on the intersection of the ball and the box, not on one after the other: its solution is
        ``clip(shrink(delta, t), -x, 1 - x)`` for the one t that meets the budget (for L1: Croce and Hein, "Mind the box",
        arXiv 2103.01208, section 3).

        Args:
            x_adv: (B, ...) any finite values.
            x: (B, ...) the clean images, in [0, 1].
            rounds: for L2, how often at most the scale is solved for anew after values met the box (an attack's steps need
                about 3, points far outside the box up to 12); 0 scales and then clips, which stays inside the threat model
                but leaves budget unspent.
            bounds: those of `x`, where they are known; in Linf the projection clips to them.
        """
        if self.norm == "Linf":
            return x_adv.clamp(*(bounds or self.bounds(x)))
        delta, low, high = (x_adv - x).flatten(1), -x.flatten(1), 1 - x.flatten(1)
        meet = self._meet_l2(delta, low, high, rounds) if self.norm == "L2" else self._meet_l1(delta, low, high)
        return (x + meet.reshape(x.shape)).clamp(0, 1)

    def _meet_l2(self, delta: Tensor, low: Tensor, high: Tensor, rounds: int) -> Tensor:
        """Scale and clip perturbations (B, D) to the budget: hold the values that meet the box, solve for the others' scale.

        The scale grows from round to round and never passes the solution, so every round ends inside the ball.
        """
        norm = delta.norm(dim=1, keepdim=True)
        scale = (self.epsilon / norm.clamp(min=1e-30)).clamp(max=1)
        for _ in range(rounds):
            scaled = delta * scale
            clipped = scaled.clamp(low, high)
            free = clipped == scaled
            held = (clipped.masked_fill(free, 0) ** 2).sum(1, keepdim=True)
            movable = (delta.masked_fill(~free, 0) ** 2).sum(1, keepdim=True)
            # A difference of squares just below zero is rounding.
            solved = ((self.epsilon**2 - held).clamp(min=0) / movable.clamp(min=1e-30)).sqrt()
            grown = torch.maximum(scale, solved.clamp(max=1))
            if bool((grown == scale).all()):
                break
            scale = grown
        met: Tensor = (delta * scale).clamp(low, high)
        excess: Tensor = (self.epsilon / met.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
        return met * excess

    def _meet_l1(self, delta: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Bisect the soft threshold at which the clipped perturbations (B, D) meet the budget."""
        magnitude, cap = delta.abs(), torch.where(delta > 0, high, -low)

        def at(threshold: Tensor) -> Tensor:
            return (magnitude - threshold).clamp(min=0).minimum(cap)

        # At the upper threshold everything is 0; the norm falls with the threshold.
        fits = magnitude.amax(1, keepdim=True)
        exceeds = torch.zeros_like(fits)
        exceeds = torch.where(at(exceeds).sum(1, keepdim=True) <= self.epsilon, -1e-30, exceeds)
        whole = exceeds < 0
        for _ in range(40):
            middle = (fits + exceeds.clamp(min=0)) / 2
            inside = at(middle).sum(1, keepdim=True) <= self.epsilon
            fits, exceeds = torch.where(inside, middle, fits), torch.where(inside, exceeds, middle)
        return delta.sign() * at(torch.where(whole, 0, fits))

    def random_start(self, x: Tensor, examples: Tensor, seed: int, stream: str = "start") -> Tensor:
        """Return a random point of the threat model for each image: uniform in the Linf ball, and in a random direction at a
        uniform share of the budget for L2 and L1 (dense), then projected.

        Args:
            x: (B, C, H, W) clean images in [0, 1].
            examples: int64 (B,) identities; the start of an example depends on them and not on the batch.
            seed: the attack's seed.
            stream: tells restarts apart.
        """
        draw, shape = noise.Draw(seed, examples), tuple(x.shape[1:])
        if self.norm == "Linf":
            delta = (2 * noise.uniform(draw, stream, shape) - 1) * self.epsilon
        else:
            direction = noise.normal(draw, stream, shape)
            radius = noise.uniform(draw, stream + "/radius", (1,)).double() * self.epsilon
            scale = (radius[:, 0] / self.size(direction).clamp(min=1e-12)).to(direction.dtype)
            delta = direction * scale.reshape(-1, *[1] * len(shape))
        return self.project(x + delta.to(x), x)

    def violation(self, x_adv: Tensor, x: Tensor) -> str | None:
        """Say how `x_adv` leaves the threat model around the clean images `x`, or return None if no example does."""
        if not bool(torch.isfinite(x_adv).all()):
            return "an adversarial example is not finite"
        if x_adv.shape != x.shape:
            return f"adversarial examples have shape {tuple(x_adv.shape)}, the images {tuple(x.shape)}"
        if x_adv.numel() and (float(x_adv.min()) < 0 or float(x_adv.max()) > 1):
            return f"adversarial examples span [{float(x_adv.min()):.6g}, {float(x_adv.max()):.6g}], outside [0, 1]"
        sizes = self.size(x_adv - x)
        # The rounding of each value adds up over an image in L2 and L1.
        slack = TOLERANCE
        if self.norm != "Linf":
            values = x.shape[1:].numel()
            slack = TOLERANCE * max(1.0, self.epsilon) + 1e-7 * (values if self.norm == "L1" else values**0.5)
        worst = float(sizes.max()) if sizes.numel() else 0.0
        if worst > self.epsilon + slack:
            return f"an adversarial example lies {worst:.7g} from its image in {self.norm}; the budget is {self.epsilon:.7g}"
        return None
