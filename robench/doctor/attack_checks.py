"""The doctor's checks by attacks: what must break a defense, and what must not break it more than its gradient does.

Ideas from Athalye et al. (arXiv 1802.00420, section 3.1) and Carlini et al. (arXiv 1902.06705, section 5).
"""

from collections.abc import Mapping
from fractions import Fraction

import torch

from robench import attacks
from robench.attacks import mean_surrogate
from robench.defense import Defense
from robench.doctor.examination import Examination, Member, Run
from robench.doctor.finding import ATHALYE, CARLINI, EOT, PINTOR, TRANSFER, Finding, clearly_lower, share, skipped
from robench.doctor.gradient_checks import FEW, cosines
from robench.errors import UserError
from robench.estimate import Estimate
from robench.threat import ThreatModel

LEFT = 0.1
"""Robust accuracy that may be left without a bound: a guess among ten classes."""
MOST = 0.5
"""Share of what PGD leaves that another loss or `fast` must break to call the robustness an artefact, not PGD alone weak: of an honest
network, trained against single steps, `fast` broke a seventh (10 points), of the decoys that only seem robust nearly all."""
GAIN = 0.1
"""What another loss, more steps, restarts or draws may break without suspicion: honest models on digits lost up to 4 points so."""
LATE = 0.3
"""Share of the whole rise of the loss that may fall in the last fifth of the steps: an even rise has 0.2 there."""
AGREEMENT, SURROGATE_COSINE = 0.8, 0.2
"""What a surrogate needs to say something of the defense: the same class on most images, and gradients that share a direction."""
SQUARE_QUERIES = 200
"""Queries of the gradient-free attack: as many passes as the gradient attacks take."""
MEMBERS = 4
"""Predictors attacked one by one, at most: each costs passes of the whole defense."""


def main_run(e: Examination) -> Run:
    """Return the white-box attack that the others are held against, as a paper would report it."""
    return e.pgd(50)


def white_box(e: Examination) -> Run:
    """Return the strongest attack on the defense itself: the main one, or for a random defense one that averages draws."""
    runs = [main_run(e)] + ([e.pgd(10, draws=16)] if e.defense.random else [])
    return min(runs, key=lambda run: run.share)


def unbounded(e: Examination) -> Finding:
    """An attack with the whole box as its budget must fool every example."""
    values = e.x[0].numel()
    budget = {"Linf": 1, "L2": int(values**0.5) + 1, "L1": values}[e.threat.norm]
    whole = type(e.threat)(e.threat.norm, Fraction(budget))
    # From the clean image: a random start in the whole box is fooled before any gradient is asked.
    left = e.pgd(50, threat=whole, from_clean=True).share
    return Finding("unbounded attack", {"robust": left}, left > LEFT, "robust accuracy without a bound; must be about 0", ATHALYE)


def _falls(check: str, runs: Mapping[str, Run], more: str, source: str) -> Finding:
    """Say whether robust accuracy clearly rises somewhere along runs of growing strength."""
    chain = list(runs.values())
    rises = any(clearly_lower(weaker.estimate, stronger.estimate) for i, weaker in enumerate(chain) for stronger in chain[i + 1 :])
    values = {name: run.share for name, run in runs.items()}
    return Finding(check, values, rises, f"robust accuracy by {more}; must not rise", source)


def _breaks_more(check: str, runs: Mapping[str, Run], meaning: str, source: str) -> Finding:
    """Say whether the second of two attacks breaks far more than the first; it decides only where that is most of what the first left."""
    first, second = runs.values()
    flagged, most = clearly_lower(second.estimate, first.estimate, GAIN), second.share <= (1 - MOST) * first.share
    return Finding(check, {name: run.share for name, run in runs.items()}, flagged, meaning, source, decisive=most or not flagged)


def falls_with_budget(e: Examination) -> Finding:
    """Robust accuracy must fall with the budget."""
    factors = (Fraction(1, 2), Fraction(1), Fraction(2))
    runs = {f"{float(f):g} eps": e.pgd(10, threat=e.threat.scaled(f)) for f in factors}
    return _falls("falls with budget", runs, "budget", CARLINI)


def falls_with_steps(e: Examination) -> Finding:
    """Robust accuracy must fall with the attack's steps."""
    runs = {"1 step": e.pgd(1), "10": e.pgd(10), "50": main_run(e)}
    return _falls("falls with steps", runs, "steps of PGD", ATHALYE)


def averaging_draws(e: Examination) -> Finding:
    """Robust accuracy by the draws that the attack averages: it must not rise, and if it falls far, one draw was too few."""
    if not e.defense.random:
        return skipped("averaging draws", "the defense is deterministic", EOT)
    runs = {"1 draw": e.pgd(10), "4": e.pgd(10, draws=4), "16": e.pgd(10, draws=16)}
    rising = _falls("averaging draws", runs, "draws averaged (EOT)", EOT)
    falls = clearly_lower(runs["16"].estimate, runs["1 draw"].estimate, GAIN)
    meaning = f"robust accuracy by draws averaged (EOT); must not rise, and a fall of {GAIN:.0%} means that noise hid the gradient"
    return Finding("averaging draws", rising.values, rising.flagged or falls, meaning, EOT)


def black_box(e: Examination) -> Finding:
    """A gradient-free attack must not break more than the gradient does."""
    name = f"square,queries={SQUARE_QUERIES}"
    try:
        attack = attacks.parse(name)
    except UserError:
        return skipped("black-box", "no attack `square` with `queries` is registered", ATHALYE)
    white, black = white_box(e), e.attack(name, attack)
    values = {"white-box": white.share, "square": black.share}
    meaning = "robust accuracy under gradients and without; a gradient-free attack that breaks more shows that gradients mislead"
    return Finding("black-box", values, clearly_lower(black.estimate, white.estimate), meaning, ATHALYE)


def everyday(e: Examination) -> Finding:
    """PGD must come near what `fast` breaks, which goes by other losses, targets and gradients where the defense's own leads nowhere."""
    if e.defense.random:
        return skipped("everyday attack", "the defense is random, where one draw a step tells PGD little", EOT)
    name, strong = "apgd-ce,steps=50", e.attack("fast", attacks.parse("fast"))
    # In L1 it is PGD that misleads: its sparsity is fixed, and APGD's is not.
    more = [e.attack(name, attacks.parse(name))] if e.threat.norm == "L1" else []
    plain = min((main_run(e), e.pgd(50, loss="margin"), *more), key=lambda run: run.share)
    meaning = (
        "robust accuracy under PGD on the better loss, in L1 APGD if that is better, and under `fast`; if the latter breaks far more, "
        "the plain gradient misleads"
    )
    return _breaks_more("everyday attack", {"PGD": plain, "fast": strong}, meaning, PINTOR)


def transfer(e: Examination) -> Finding:
    """What fools the predictors alone, or their mean, must not fool the defense more than attacking the defense does."""
    surrogates = _surrogates(e)
    if not surrogates:
        return skipped("transfer", "the defense is the mean of its predictors, and attacking it is attacking them", TRANSFER)
    white = white_box(e)
    runs = {name: e.pgd(20, draws=2 if e.defense.random else 1, surrogate=(name, model)) for name, model in surrogates.items()}
    values = {"white-box": white.share} | {name: run.share for name, run in runs.items()}
    flagged = any(clearly_lower(run.estimate, white.estimate) for run in runs.values())
    meaning = "robust accuracy under PGD on the defense and on its predictors; if the latter breaks more, the combination hides gradients"
    return Finding("transfer", values, flagged, meaning, TRANSFER)


def _surrogates(e: Examination) -> dict[str, Defense]:
    """Return the mean of the predictors' logits and the first predictors alone, without those that are the defense itself."""
    with torch.no_grad():
        count = e.defense.predictors(e.x[:1], e.draw(e.examples[:1])).shape[1]
    mean = mean_surrogate(e.defense)
    found: dict[str, Defense] = {} if _same(e, mean) else {"mean of predictors": mean}
    if count > 1:
        found |= {f"predictor {i}": Member(e.defense, i) for i in range(min(count, MEMBERS))}
    return found


def _same(e: Examination, model: Defense) -> bool:
    """Return whether a model has the defense's logits and gradients."""
    if not torch.allclose(e.logits(e.x), e.logits(e.x, model), rtol=1e-4, atol=1e-5):
        return False
    cosine = cosines(e.gradient(e.x), e.gradient(e.x, model=model))
    return len(cosine) == len(e) and float(cosine.min()) > 0.999


def surrogate(e: Examination) -> Finding:
    """How far the mean of the predictors' logits stands for the defense: its predictions and gradients."""
    mean = mean_surrogate(e.defense)
    same = e.logits(e.x).argmax(1) == e.logits(e.x, mean).argmax(1)
    cosine = cosines(e.gradient(e.x), e.gradient(e.x, model=mean))
    values = {"agreement": share(same), "median cosine": float(cosine.median()) if len(cosine) else 0.0}
    flagged = values["agreement"] < AGREEMENT or values["median cosine"] < SURROGATE_COSINE
    meaning = "share of images that the predictors' mean puts in the defense's class, and agreement of their gradients"
    return Finding("surrogate", values, flagged, meaning, TRANSFER, decisive=False)


def other_loss(e: Examination) -> Finding:
    """The margin loss must not break far more than the cross-entropy."""
    runs = {"cross-entropy": main_run(e), "margin": e.pgd(50, loss="margin")}
    meaning = "robust accuracy under PGD by loss; if the margin breaks far more, the cross-entropy has no useful gradient"
    return _breaks_more("other loss", runs, meaning, CARLINI)


def optimisation(e: Examination) -> Finding:
    """The main attack must have come to its end: a level loss, and nothing to gain from more steps or restarts."""
    run, restarts = main_run(e), [e.pgd(20, restart=number) for number in (1, 2)]
    shares = torch.stack([run.correct, *(again.correct for again in restarts)])
    # For a random defense the best of each example would be luck of the draws.
    best = shares[shares.mean(1).argmin()] if e.defense.random else shares.amin(0)
    values = {"10 steps": e.pgd(10).share, "50": run.share, "and restarts": float(best.mean()), "late rise": _late_rise(run)}
    more_steps = clearly_lower(run.estimate, e.pgd(10).estimate, GAIN)
    more_starts = clearly_lower(Estimate.of(best.numpy()), run.estimate, GAIN)
    meaning = "robust accuracy by steps and restarts, and the share of the loss's rise that came in the last fifth of the steps"
    return Finding("optimisation", values, more_steps or more_starts or values["late rise"] > LATE, meaning, PINTOR)


def _late_rise(run: Run) -> float:
    """Return the median share of the highest loss's rise in the last fifth of the steps, where the example withstood; 0 where few
    did, whose median says nothing.
    """
    if run.share <= FEW:
        return 0.0
    highest = run.losses[run.correct > 0.5].cummax(1).values
    rise = highest[:, -1] - highest[:, 0]
    late = highest[:, -1] - highest[:, highest.shape[1] * 4 // 5]
    rose = rise > 0
    return float((late / rise)[rose].median()) if bool(rose.any()) else 0.0


def tiny_budget(e: Examination) -> Finding:
    """With next to no budget an attack must leave a random defense's clean accuracy standing."""
    if not e.defense.random:
        return skipped("tiny budget", "the defense is deterministic", CARLINI)
    within = ThreatModel(e.threat.norm, Fraction(1, 10**6))
    clean, attacked = e.score(e.x, within), e.pgd(10, threat=within)
    values = {"clean": clean.share, "attacked": attacked.share}
    flagged = clearly_lower(attacked.estimate, clean.estimate)
    meaning = "accuracy before and after an attack of no budget; a difference is the scoring's or a discontinuity, not the attack's"
    return Finding("tiny budget", values, flagged, meaning, CARLINI, decisive=False)


def scoring(e: Examination) -> Finding:
    """The two numbers of a random defense that the field confuses."""
    if not e.defense.random:
        return skipped("scoring of draws", "the defense is deterministic", EOT)
    run = white_box(e)
    values = {"mean over draws": run.share, "right on all 10 draws": float(run.every_draw.mean())}
    flagged = values["mean over draws"] - values["right on all 10 draws"] > GAIN
    meaning = "robust accuracy on fresh draws, and counting an example lost on any of 10; the latter breaks by luck, report the former"
    return Finding("scoring of draws", values, flagged, meaning, EOT, decisive=False)
