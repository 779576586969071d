"""The doctor's checks of the defense's own behaviour: what it declares, its logits, and its input gradients.

Ideas from Athalye et al. (arXiv 1802.00420, section 3.1), Carlini et al. (arXiv 1902.06705, section 5) and Pintor et al.
(arXiv 2106.09947, the indicators of attack failure).
"""

from fractions import Fraction

import torch
from torch import Tensor

from robench import noise
from robench.attacks.bare import looked_at
from robench.attacks.layers import detours
from robench.attacks.steps import steepest
from robench.doctor.examination import Examination
from robench.doctor.finding import ATHALYE, CARLINI, EOT, PINTOR, Finding, share, skipped
from robench.noise import Draw

FEW = 0.1
"""Share of examples that may show an oddity of the gradient: a few lie on the kink of a ReLU or have an extreme margin."""
TIES = 0.02
"""Share of images whose two highest logits may be equal: sums of real numbers practically never are."""
SATURATED = 0.9
"""Share of examples of probability 1.0 in float32: a confident network may have some, logits scaled up have all."""
SHRUNK, GROWN = 0.25, 4.0
"""Change of the margin along a short step over what the gradient predicts: honest models on digits lie within 0.98 and 1.03."""
ALIKE = 0.3
"""Cosine of gradients a hair's breadth apart, median: above 0.99 for honest models on digits, 0 for a shattered gradient."""
ALMOST = 0.95
"""Of a random step's gain, which in few dimensions may be the gradient's own."""


def input_gradients(e: Examination) -> Finding:
    """Zero and non-finite gradients, at the clean images and at a random start."""
    points = (e.x, e.threat.random_start(e.x, e.examples, e.seed, "doctor/start"))
    ce, margin = ([e.gradient(x, loss) for x in points] for loss in ("ce", "margin"))
    finite = [torch.isfinite(g).flatten(1).all(1) for g in (*ce, *margin)]

    def zero(gradients: list[Tensor]) -> float:
        return max(share((g == 0).flatten(1).all(1)) for g in gradients)

    values = {
        "no gradient at all": float(not _differentiable(e)), "zero, cross-entropy": zero(ce), "zero, margin": zero(margin),
        "not finite": max(share(~f) for f in finite),
    }  # fmt: skip
    meaning = "share of examples whose input gradient is zero or not finite; gradient attacks do not move there"
    return Finding("input gradients", values, max(values.values()) > FEW, meaning, ATHALYE)


def _differentiable(e: Examination) -> bool:
    with torch.enable_grad():
        return bool(e.defense(e.x[:1].clone().requires_grad_(), e.draw(e.examples[:1])).requires_grad)


def ties(e: Examination) -> Finding:
    """Exact ties of the two highest logits, which rounding and voting make."""
    points = (e.x, e.threat.random_start(e.x, e.examples, e.seed, "doctor/start"))
    top = [e.logits(x).topk(2, dim=1).values for x in points]
    values = {"ties": max(share(t[:, 0] == t[:, 1]) for t in top)}
    meaning = "share of images whose two highest logits are equal: logits of few values"
    return Finding("ties", values, values["ties"] > TIES, meaning, PINTOR)


def saturation(e: Examination) -> Finding:
    """Probabilities of 1.0, and a cross-entropy whose gradient underflows where the margin's does not."""
    probability = e.logits(e.x).softmax(1).amax(1)
    ce, margin = ((e.gradient(e.x, loss) == 0).flatten(1).all(1) for loss in ("ce", "margin"))
    values = {"probability 1.0": share(probability == 1), "cross-entropy underflows": share(ce & ~margin)}
    flagged = values["probability 1.0"] > SATURATED or values["cross-entropy underflows"] > FEW
    meaning = "share of examples on which float32 loses the cross-entropy; attack the margin or DLR loss"
    return Finding("saturation", values, flagged, meaning, CARLINI)


def predicted_change(e: Examination) -> Finding:
    """The change of the margin along a short ascent step beside the change that the gradient predicts."""
    gradient = e.gradient(e.x)
    step = _ascent(e, gradient, Fraction(1, 16))
    predicted = (gradient * step).flatten(1).sum(1)
    usable = torch.isfinite(predicted) & (predicted > 0)
    if not bool(usable.any()):
        return skipped("predicted change", "no example has a gradient to predict from", PINTOR)
    ratio = ((e.losses(e.x + step) - e.losses(e.x)) / predicted)[usable]
    values = {"median ratio": float(ratio.median()), "outside": share(~((ratio > SHRUNK) & (ratio < GROWN)))}
    meaning = "change of the margin along a short step over the gradient's prediction; far from 1, the gradient is shattered"
    return Finding("predicted change", values, values["outside"] > 0.5, meaning, ATHALYE)


def ascent_direction(e: Examination) -> Finding:
    """The gain along the gradient beside gains along random directions of the same size."""
    part, before = Fraction(1, 4), e.losses(e.x)
    gain = e.losses(e.x + _ascent(e, e.gradient(e.x).nan_to_num(0, 0, 0), part)) - before
    gains = []
    for number in range(8):
        random = noise.normal(Draw(e.seed, e.examples, number), "doctor/direction", tuple(e.x.shape[1:])).to(e.x)
        gains.append(e.losses(e.x + _ascent(e, random, part)) - before)
    best = torch.stack(gains).amax(0)
    worse = (gain <= 0) | (gain < ALMOST * best)
    values = {"no better than random": share(worse), "gain": float(gain.median()), "best random gain": float(best.median())}
    meaning = "share of examples on which a step along the gradient gains nothing, or less than the best of 8 random steps of its size"
    return Finding("ascent direction", values, values["no better than random"] > 0.5, meaning, PINTOR)


def gradient_stability(e: Examination) -> Finding:
    """The cosine of gradients at the image and a tiny random perturbation of it."""
    near = e.threat.scaled(Fraction(1, 64)).random_start(e.x, e.examples, e.seed, "doctor/near")
    cosine = cosines(e.gradient(e.x), e.gradient(near))
    if not cosine.numel():
        return skipped("gradient stability", "no example has a gradient", ATHALYE)
    values = {"median cosine": float(cosine.median())}
    meaning = "agreement of gradients 1/64 of the budget apart; near 0, the gradient is noise"
    return Finding("gradient stability", values, values["median cosine"] < ALIKE, meaning, ATHALYE)


def lost_inside(e: Examination) -> Finding:
    """Layers, and what is done between two, whose output changes otherwise than their gradient says."""
    found = detours(looked_at(e.defense, e.x)[1])
    names = {module: name for name, module in e.defense.named_modules()}
    where = ", ".join(names.get(detour.later.layer, "?") for detour in found[:3]) + ", ..." * (len(found) > 3)
    meaning = "places inside the networks at which the gradient vanishes or is wrong" + f": before or at {where}" * bool(found)
    return Finding("gradient inside", {"places": float(len(found))}, bool(found), meaning, ATHALYE)


def gradient_across_draws(e: Examination) -> Finding:
    """The cosine of gradients on two draws of a random defense."""
    if not e.defense.random:
        return skipped("gradient across draws", "the defense is deterministic", EOT)
    cosine = cosines(e.gradient(e.x, number=0), e.gradient(e.x, number=1))
    if not cosine.numel():
        return skipped("gradient across draws", "no example has a gradient", EOT)
    values = {"median cosine": float(cosine.median())}
    meaning = "agreement of gradients on two draws; the lower, the more draws an attack must average"
    return Finding("gradient across draws", values, values["median cosine"] < ALIKE, meaning, EOT, decisive=False)


def _ascent(e: Examination, gradient: Tensor, part: Fraction) -> Tensor:
    """Return the step of a part of the budget along a gradient, inside the box: (B, C, H, W)."""
    within = e.threat.scaled(part)
    return within.project(e.x + within.epsilon * steepest(gradient, within.norm, e.x), e.x) - e.x


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines of the gradients that are finite and not zero, at most (B,)."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    sizes = a.norm(dim=1) * b.norm(dim=1)
    usable = torch.isfinite(sizes) & (a.norm(dim=1) > 0) & (b.norm(dim=1) > 0)
    # Each is scaled first: the product of two tiny norms underflows.
    unit_a, unit_b = (g[usable] / g[usable].norm(dim=1, keepdim=True) for g in (a, b))
    cosine: Tensor = (unit_a * unit_b).sum(1)
    return cosine
