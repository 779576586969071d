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


def worst_case(records: Sequence[Record]) -> tuple[Estimate, Record]:
    """Return the robust accuracy under the worst attack on each example, and the strongest single record.

    An attack that was run on fewer examples counts on those. For a random defense the least of several noisy shares of
    draws leans low, by less than their spread over draws. The strongest record has the lowest robust accuracy on the
    examples that all share, and of several such the highest cost.

    Args:
        records: of one defense (name, version and weights) on one data set, threat model and scale.

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
    shared = min(record.dataset.n for record in records)
    strongest = min(records, key=lambda r: (math.fsum(r.outcomes.robust[:shared]), -r.cost.forwards - r.cost.backwards))
    return _estimate(largest, worst.tolist()), strongest


def _estimate(record: Record, values: list[float]) -> Estimate:
    return Estimate.of(values, examples=range(len(values)), dataset=record.dataset.fingerprint)
