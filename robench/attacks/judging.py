"""How good an image is against a defense: against a random one, judged on draws that no ascent takes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robench.defense import Defense
from robench.losses import margin, spread
from robench.noise import Draw

JUDGING = range(2**30, 2**30 + 20)
"""The draws."""
SHARPNESS = 4
"""How soon an image that is misclassified by more counts no better. On a random defense the share of draws that misclassify would be
the score itself, but its chance is large, and the more images there are to choose from, the luckier the one that is chosen."""


@dataclass(frozen=True)
class Judgement:
    """What a defense makes of a batch of images.

    Attributes:
        share: (B,) of the judging draws that misclassify, 0 or 1 for a deterministic defense.
        score: (B,) the higher the better the image; all that are misclassified by a deterministic defense above all that are not.
        shown: (B, N, classes) the predictors' log-probabilities, summed over the draws.
    """

    share: Tensor
    score: Tensor
    shown: Tensor


@torch.no_grad()
def judge(defense: Defense, x: Tensor, y: Tensor, *, examples: Tensor, seed: int) -> Judgement:
    """Judge images `x` (B, C, H, W) of the examples of identities (B,) with labels `y` (B,)."""
    share, score, shown = 0.0 * y, 0.0 * y, torch.zeros(1, device=x.device)
    numbers = JUDGING if defense.random else range(1)
    for number in numbers:
        predictors = defense.predictors(x, Draw(seed, examples, number) if defense.random else None).float()
        logits = defense.aggregate(predictors).float()
        share += (logits.argmax(1) != y) / len(numbers)
        score += torch.sigmoid(SHARPNESS * margin(logits, y) / spread(logits)[:, 0]) / len(numbers)
        shown = shown + predictors.log_softmax(-1)
    # Rounding must not leave the share of all draws below 1.
    share = (share * len(numbers)).round() / len(numbers)
    return Judgement(share, score if defense.random else share + score / 2, shown)
