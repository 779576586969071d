"""Estimates: a value with its 95 % interval, and what may honestly be done with several of them.

One proportion has Wilson's interval; a difference over the same examples is paired (Bonett and Price); a difference
without shared examples has Newcombe's. The examples are the sample: how much independently trained models differ is
kept apart, in `seeds`.
"""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from robench.errors import UserError

Kind = Literal["share", "difference", "paired difference"]
Z = float(ndtri(0.975))


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share (Newcombe, Statistics in Medicine 17:857, 1998, method 3).

    A fractional number of successes is the sum of n values in [0, 1], such as shares over draws. Such a value of mean
    p has a variance of at most p (1 - p), that of a 0/1 value, so the interval is then conservative.

    Args:
        successes: in [0, n].
        n: the number of examples, at least 1.
    """
    share = successes / n
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Estimate:
    """A value with its number of examples and its 95 % interval.

    Attributes:
        value: a share in [0, 1], or a difference of shares.
        low: the interval's lower end, at most `value`.
        high: its upper end, at least `value`.
        n: the number of examples (of an unpaired difference: the smallest number).
        values: float64 (n,) one value per example, where they are known; read-only.
        examples: int64 (n,) the examples' identities, all different; read-only.
        seeds: the value of each independently trained model, where `value` is their mean.
        kind: ``share``, ``difference`` (unpaired) or ``paired difference``.
        dataset: what the identities are identities in (a fingerprint); examples of two data sets are never paired.
    """

    value: float
    low: float
    high: float
    n: int
    values: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)
    examples: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)
    seeds: tuple[float, ...] = ()
    kind: Kind = "share"
    dataset: str = ""

    @classmethod
    def of(cls, values: ArrayLike, examples: ArrayLike | None = None, seeds: Sequence[float] = (), dataset: str = "") -> "Estimate":
        """Estimate a share from one value per example, with Wilson's interval (conservative for values that are not 0
        or 1).

        Args:
            values: (n,) in [0, 1]: whether the example is classified correctly, or in what share of the draws.
            examples: (n,) whole numbers that tell the examples apart.
            seeds: the value of each trained model, where `values` are means over models.
            dataset: the fingerprint of the data set.

        Raises:
            UserError: for no values, values that are not finite or leave [0, 1], or examples that do not match or
            repeat.
        """
        array = np.array(values, dtype=np.float64)
        if array.ndim != 1 or not array.size:
            raise UserError(f"an estimate needs one value for each of at least one example, not an array of shape {array.shape}")
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise UserError(f"per-example values must be finite and in [0, 1]; they span [{array.min():g}, {array.max():g}]")
        identities = None if examples is None else np.array(examples, dtype=np.int64)
        if identities is not None and (identities.shape != array.shape or len(np.unique(identities)) != len(identities)):
            raise UserError(f"{len(array)} values need {len(array)} different example identities")
        for kept in (array, identities):
            if kept is not None:
                kept.setflags(write=False)
        share = cls.proportion(float(array.sum()), len(array))
        return replace(share, values=array, examples=identities, seeds=tuple(float(seed) for seed in seeds), dataset=dataset)

    @classmethod
    def proportion(cls, successes: float, n: int) -> "Estimate":
        """Estimate a share of which only the totals are known, as a paper prints it.

        Raises:
            UserError: unless n is at least 1 and successes lie in [0, n].
        """
        if n < 1 or not 0 <= successes <= n:
            raise UserError(f"{successes:g} of {n} is no proportion: it needs n of at least 1 and 0 to n successes")
        value = successes / n
        low, high = wilson(successes, n)
        # Rounding must not leave the value outside its own interval at 0 and 1.
        return cls(value, min(low, value), max(high, value), n)

    def __sub__(self, other: "Estimate") -> "Estimate":
        return contrast([(1, self), (-1, other)])

    def __str__(self) -> str:
        details = f"n={self.n}"
        if self.kind != "share":
            details += ", paired" if self.kind == "paired difference" else ", unpaired"
        if self.seeds:
            details += f"; {len(self.seeds)} seed{'s' * (len(self.seeds) > 1)}"
        if len(self.seeds) > 1:
            details += f", sd {100 * statistics.stdev(self.seeds):.1f}"
        # Adding 0 turns a rounded -0.0 into 0.0.
        value, low, high = (round(100 * x, 1) + 0.0 for x in (self.value, self.low, self.high))
        head = f"{value:.1f} %" if self.kind == "share" else f"{value:+.1f} points"
        return f"{head} [{low:.1f}, {high:.1f}] ({details})"


def contrast(terms: Sequence[tuple[float, Estimate]]) -> Estimate:
    """Return the sum of coefficient * share, in [-1, 1] for a - b, which is ``[(1, a), (-1, b)]``.

    A difference of differences (a - b) - (c - d) is ``[(1, a), (-1, b), (-1, c), (1, d)]``.

    Where all shares have values on shared examples, it is paired: the coefficients combine the values of each shared
    example, the value is the mean of the combinations, and the interval is the Laplace-adjusted Wald interval of
    Bonett and Price (Journal of Educational and Behavioral Statistics 37:479, 2012), made general: to the n
    combinations one pseudo-observation is added at each end of their possible range (+1 and -1 for a difference), and
    the interval is mean' +- z sqrt(var' / (n + 2)) of the n + 2. For 0/1 values that is their interval exactly; it
    always has a width and always contains the value.

    Otherwise the shares count as independent, and the interval is Newcombe's hybrid score interval (Statistics in
    Medicine 17:873, 1998, method 10) from the intervals of the shares, for any coefficients as in Zou and Donner
    (Statistics in Medicine 27:1693, 2008).

    Seeds are combined in order where every share has equally many.

    Raises:
        UserError: for no terms, or a term that is itself a difference (write it as one contrast of shares).
    """
    if not terms:
        raise UserError("a contrast needs at least one estimate")
    if any(estimate.kind != "share" for _, estimate in terms):
        raise UserError("a difference cannot be subtracted again; write the whole as one contrast of shares")
    coefficients, estimates = [float(coefficient) for coefficient, _ in terms], [estimate for _, estimate in terms]
    bottom, top = sum(c for c in coefficients if c < 0), sum(c for c in coefficients if c > 0)
    counts = {len(estimate.seeds) for estimate in estimates}
    per_seed = zip(*(estimate.seeds for estimate in estimates), strict=True) if len(counts) == 1 else ()
    seeds = tuple(math.fsum(c * value for c, value in zip(coefficients, models, strict=True)) for models in per_seed)

    shared = _shared(estimates)
    if shared is None:
        value = sum(c * e.value for c, e in zip(coefficients, estimates, strict=True))
        below, above = 0.0, 0.0
        for c, e in zip(coefficients, estimates, strict=True):
            to_low, to_high = (e.value - e.low, e.high - e.value) if c > 0 else (e.high - e.value, e.value - e.low)
            below, above = below + (c * to_low) ** 2, above + (c * to_high) ** 2
        low, high = value - math.sqrt(below), value + math.sqrt(above)
        n = min(estimate.n for estimate in estimates)
        return Estimate(value, max(low, bottom), min(high, top), n, seeds=seeds, kind="difference")

    rows, examples = shared
    values = np.asarray(coefficients) @ rows
    values.setflags(write=False)
    padded = np.append(values, [bottom, top])
    middle, half = float(padded.mean()), Z * math.sqrt(float(padded.var()) / len(padded))
    return Estimate(
        value=float(values.mean()),
        low=max(middle - half, bottom),
        high=min(middle + half, top),
        n=len(values),
        values=values,
        examples=examples,
        seeds=seeds,
        kind="paired difference",
        dataset=estimates[0].dataset,
    )


def average(terms: Sequence[tuple[float, Estimate]]) -> Estimate:
    """Return the weighted mean of shares, itself a share: per example where all have values on shared examples.

    Wilson's interval with the smallest n is conservative in both cases: the variance of a weighted mean is at most
    the weighted mean of the variances, and that is at most the variance p (1 - p) / n of the 0/1 share of the same
    mean.

    Raises:
        UserError: for terms that are differences, or weights that are negative or do not sum to 1.
    """
    weights, estimates = [float(weight) for weight, _ in terms], [estimate for _, estimate in terms]
    if any(weight < 0 for weight in weights) or not math.isclose(sum(weights), 1, abs_tol=1e-9):
        raise UserError(f"the weights of an average must be at least 0 and sum to 1, not {sum(weights):g}")
    if any(estimate.kind != "share" for estimate in estimates):
        raise UserError("an average is over shares; a difference cannot be averaged")
    shared = _shared(estimates)
    if shared is None:
        n = min(estimate.n for estimate in estimates)
        value = sum(weight * estimate.value for weight, estimate in zip(weights, estimates, strict=True))
        return Estimate.proportion(min(value, 1.0) * n, n)
    rows, examples = shared
    return Estimate.of(np.clip(np.asarray(weights) @ rows, 0, 1), examples, dataset=estimates[0].dataset)


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean over independently trained models, measured on the same examples.

    The interval is over the examples, of the mean over the models on each; the spread over the models is in `seeds`.

    Raises:
        UserError: for no estimates, or estimates without per-example values on the same examples.
    """
    shared = _shared(estimates) if estimates else None
    if shared is None or any(estimate.n != shared[0].shape[1] for estimate in estimates):
        raise UserError("a mean over seeds needs every model's values on the same examples")
    mean = average([(1 / len(estimates), estimate) for estimate in estimates])
    return replace(mean, seeds=tuple(estimate.value for estimate in estimates))


def mcnemar(a: Estimate, b: Estimate) -> float:
    """Return the two-sided p-value of McNemar's exact test that `a` and `b` are equal on the examples they share, 1
    if they never differ.

    Raises:
        UserError: if they share no examples, or a value is not 0 or 1.
    """
    shared = _shared([a, b])
    if shared is None or not np.isin(shared[0], (0, 1)).all():
        raise UserError("McNemar's test needs two estimates with values of 0 or 1 on shared examples")
    first, second = shared[0]
    from scipy.stats import binomtest  # a second to import, and needed by few

    only_first, discordant = int((first > second).sum()), int((first != second).sum())
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def _shared(estimates: Sequence[Estimate]) -> tuple[NDArray[np.float64], NDArray[np.int64] | None] | None:
    """Return the values (K, n) of K estimates on the examples that all share, and those examples; None if they cannot
    be paired.

    Without identities, equally many values are taken to be of the same examples in the same order.
    """
    values = [estimate.values for estimate in estimates if estimate.values is not None]
    examples = [estimate.examples for estimate in estimates if estimate.examples is not None]
    if len(values) < len(estimates) or len({estimate.dataset for estimate in estimates}) > 1:
        return None
    if not examples:
        return (np.stack(values), None) if len({len(row) for row in values}) == 1 else None
    if len(examples) < len(estimates):
        return None
    common = functools.reduce(np.intersect1d, examples)
    orders = [np.argsort(identities) for identities in examples]
    places = [order[np.searchsorted(known, common, sorter=order)] for order, known in zip(orders, examples, strict=True)]
    rows = np.stack([row[place] for row, place in zip(values, places, strict=True)])
    return (rows, common) if len(common) else None
