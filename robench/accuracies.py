"""The accuracies that records tell, and the worst case over several attacks, as estimates that are compared example by example."""

import math
from collections.abc import Sequence

import numpy as np

from robench.errors import UserError
from robench.estimate import Estimate
from robench.record import Record


def clean_estimate(record: Record) -> Estimate:
    """Return the clean accuracy with its per-example values; an example's identity is its place in the split."""
    return _estimate(record, record.outcomes.clean)


def robust_estimate(record: Record) -> Estimate:
    """Return the robust accuracy with its per-example values; an example's identity is its place in the split."""
    return _estimate(record, record.outcomes.robust)


def worst_case(records: Sequence[Record], examples: int | None = None) -> tuple[Estimate, Record]:
    """Return the robust accuracy under the worst attack on each example, and the strongest single record.

    An attack that was run on fewer examples counts on those. The worst case is over the examples of the largest record, or over those
    of a smaller one where its interval lies below: a weak attack on many would else hide a strong one on few. For a random defense the
    least of several noisy shares of draws leans low, by less than their spread over draws. The strongest record has the lowest robust
    accuracy on the examples that all share, and of several such the highest cost.

    Args:
        records: of one defense (name, version and weights) on one data set, threat model and scale.
        examples: the first so many, at most as many as the largest record has.

    Raises:
        UserError: for no records, or records of different subjects.
    """
    subjects = {(r.defense.name, r.defense.version, r.defense.weights_sha256, r.dataset.fingerprint, r.threat, r.scale) for r in records}
    if len(subjects) != 1:
        raise UserError(f"a worst case is over records of one defense, data set, threat and scale, not of {len(subjects)}")
    largest = max(records, key=lambda record: record.dataset.n)
    worst = np.ones(largest.dataset.n)
    for record in records:
        np.minimum(worst[: record.dataset.n], record.outcomes.robust, out=worst[: record.dataset.n])
    counts = {r.dataset.n for r in records} if examples is None else {examples}
    found, *fewer = [_estimate(largest, worst[:count].tolist()) for count in sorted(counts, reverse=True)]
    for smaller in fewer:
        found = smaller if smaller.high < found.low else found
    shared = min(record.dataset.n for record in records)
    strongest = min(records, key=lambda r: (math.fsum(r.outcomes.robust[:shared]), -r.cost.forwards - r.cost.backwards))
    return found, strongest


def _estimate(record: Record, values: list[float]) -> Estimate:
    return Estimate.of(values, examples=range(len(values)), dataset=record.dataset.fingerprint)
