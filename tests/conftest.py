"""Fixtures that several test files share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from robench.estimate import Estimate
from robench.record import Proportion, Record


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes`; a mapping changes the mapping it meets key by key."""
    merged = dict(base)
    for key, change in changes.items():
        both_map = isinstance(base.get(key), dict) and isinstance(change, Mapping)
        merged[key] = _merged(base[key], change) if both_map else change
    return merged


@pytest.fixture
def make_record() -> Callable[..., Record]:
    """Build a valid record from its outcomes: ``make_record([1, 0], defense={"name": "natural"}, seed=3)``.

    The accuracies, n and, for a random defense, the random score follow from the outcomes unless they are given;
    `clean` is all correct unless it is given.
    """

    def build(robust: Sequence[float] = (1, 0, 1), clean: Sequence[float] | None = None, **changes: Any) -> Record:
        clean = [1.0] * len(robust) if clean is None else list(clean)
        clean_share, share = (Proportion.of(Estimate.of(values)).model_dump() for values in (clean, robust))
        random = changes.get("defense", {}).get("random", False)
        base = {
            "defense": {
                "name": "robust_average,k=8,eps=0.22",
                "version": 1,
                "origin": "robench_zoo.average (average.py)",
                "paper": "Revisiting Ensembles (arXiv 2002.11572)",
                "random": False,
                "members": 8,
                "parameters": 1000,
                "weights_sha256": "ab" * 32,
                "training_seed": 0,
            },
            "dataset": {"name": "digits", "split": "test", "fingerprint": "cd" * 32, "n": len(robust), "classes": 10},
            "threat": "Linf:8/255",
            "attack": {"name": "pgd-20", "version": 1, "parameters": {"steps": 20, "restarts": 1, "loss": "ce"}},
            "scale": "smoke",
            "seed": 0,
            "clean_accuracy": clean_share,
            "robust_accuracy": share,
            "cost": {"forwards": 160.0, "backwards": 160.0},
            "outcomes": {"clean": clean, "robust": list(robust)},
            "random_score": {"draws": 10, "mean": share, "majority": share, "worst": share} if random else None,
            "controls": {"tiny budget": 1.0},
            "training": {"epochs": 3, "recipe": "adversarial", "rate": 0.1, "augment": True, "schedule": None},
            "precision": "float32",
            "provenance": {
                "commit": "0" * 40,
                "dirty": False,
                "versions": {"torch": "2.11"},
                "device": "cpu",
                "processor": "A processor",
                "threads": 1,
            },
            "timing": {"created": "2025-01-31T12:00:00+00:00", "seconds": 1.5},
        }
        return Record.model_validate(_merged(base, changes))

    return build
