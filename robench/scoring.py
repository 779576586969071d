"""Scoring: what a defense says of an attack's images, and the record's numbers made of it."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robench import parts, record, zoo
from robench.attacks import Attack
from robench.cost import Cost
from robench.data import Dataset
from robench.defense import Defense
from robench.errors import UserError
from robench.estimate import Estimate
from robench.fingerprint import state_hash
from robench.noise import Draw
from robench.parts import Chunk, Part
from robench.record import Record
from robench.targets import Target
from robench.threat import ThreatModel

SCORING_DRAWS = 10
"""Fresh draws that score a random defense."""


@torch.no_grad()
def predictions(defense: Defense, x: Tensor, examples: Tensor, seed: int, draws: int = SCORING_DRAWS) -> Tensor:
    """Return predicted classes (draws, B), over fresh draws for a random defense, one row for a deterministic one.

    The scoring draws are independent of every draw that an attack with this seed can have used.

    Raises:
        UserError: for logits that are not finite.
    """
    if not defense.random:
        return _classes(defense(x))[None]
    score_seed = int.from_bytes(hashlib.sha256(f"score/{seed}".encode()).digest()[:6], "little")
    return torch.stack([_classes(defense(x, Draw(score_seed, examples, number))) for number in range(draws)])


def _classes(logits: Tensor) -> Tensor:
    """Return the predicted classes (B,): NaN would pass for a logit above all others."""
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the defense returns logits that are not finite (NaN or infinity) on an image that it is scored on")
    return logits.argmax(1)


def correct(predicted: list[list[int]], labels: Tensor, start: int) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Return which of predicted classes (draws, B) are the labels of as many examples from `start` on."""
    classes = np.asarray(predicted)
    right: np.ndarray[Any, np.dtype[np.bool_]] = classes == labels[start : start + classes.shape[1]].numpy()[None]
    return right


def recorded(
    target: Target,
    dataset: Dataset,
    threat: ThreatModel,
    attack: Attack,
    seed: int,
    scale: zoo.Scale,
    precision: str,
    chunks: list[Chunk],
    spent: Cost,
    seconds: float,
    control: dict[str, float],
    made: list[Part],
    partial: str | None,
) -> Record:
    """Return the record of an attack's chunks.

    Args:
        target: what was attacked.
        dataset: the examples that were.
        threat: the threat model.
        attack: the attack.
        seed: the attack's seed.
        scale: what the record says of the protocol's scale.
        precision: of the attack.
        chunks: what came of the examples, in order.
        spent: the passes of all of it.
        seconds: likewise.
        control: a random defense's readings.
        made: all parts, of whose making the record tells.
        partial: why there are fewer examples than were asked for, if there are.
    """
    labels = dataset.labels.numpy()
    clean_classes = np.concatenate([np.asarray(c.clean) for c in chunks], axis=1)
    robust_classes = np.concatenate([np.asarray(c.robust) for c in chunks], axis=1)
    clean, robust = (classes == labels[None] for classes in (clean_classes, robust_classes))
    if not target.defense.random:
        # The clean image is in the threat model: what is misclassified there is not robust, wherever the attack ended.
        robust &= clean
    n, (provenance, *others) = len(dataset), parts.provenances(made)
    clean_estimate, robust_estimate = (Estimate.of(correct.mean(0), dataset=dataset.fingerprint) for correct in (clean, robust))
    return Record(
        schema_version=1,
        defense=defense_info(target),
        dataset=record.DatasetInfo(
            name=dataset.name, split=dataset.split, fingerprint=dataset.fingerprint, n=n, classes=len(dataset.classes)
        ),
        threat=str(threat),
        attack=record.AttackInfo(name=attack.name, version=attack.version_on(target.defense.random), parameters=dict(attack.parameters)),
        scale=scale,
        seed=seed,
        clean_accuracy=record.Proportion.of(clean_estimate),
        robust_accuracy=record.Proportion.of(robust_estimate),
        cost=record.CostPerImage(forwards=spent.forwards / n, backwards=spent.backwards / n),
        stages=_summed([c.stages for c in chunks]),
        outcomes=record.Outcomes(clean=clean.mean(0).tolist(), robust=robust.mean(0).tolist()),
        random_score=_random_score(robust, robust_classes, labels, len(dataset.classes), chunks) if target.defense.random else None,
        controls=control,
        training=target.training,
        precision=precision,
        partial=partial,
        provenance=provenance,
        other_provenance=others,
        timing=record.Timing(created=max(part.created for part in made), seconds=round(seconds, 3)),
    )  # fmt: skip


def defense_info(target: Target) -> record.DefenseInfo:
    """Return what a record says of the defense."""
    defense = target.defense
    return record.DefenseInfo(
        name=target.name, version=target.version, origin=target.origin, paper=target.paper, random=defense.random,
        members=len(defense.members()), parameters=sum(p.numel() for p in defense.parameters()),
        weights_sha256=state_hash(defense), training_seed=target.training_seed,
    )  # fmt: skip


def _random_score(correct: Any, classes: Any, labels: Any, count: int, chunks: list[Chunk]) -> record.RandomScore:
    """Return the three readings of a random defense's outcomes (draws, n), and the attack's own where it has one."""
    votes = np.stack([(classes == c).sum(0) for c in range(count)])

    def share(values: Any) -> record.Proportion:
        return record.Proportion.of(Estimate.of(np.asarray(values, dtype=float)))

    own = _summed([c.counted for c in chunks])
    standing = np.arange(len(labels)) < list(own.values())[-1] if own else None
    return record.RandomScore(
        draws=len(correct), mean=share(correct.mean(0)), majority=share(votes.argmax(0) == labels), worst=share(correct.all(0)),
        own_count=None if standing is None else share(standing), own_stages=own,
    )  # fmt: skip


def _summed(counts: list[dict[str, int]]) -> dict[str, int]:
    """Return each stage's count over all chunks, in the order run: an attack spends some stages on what needs them alone."""
    order: list[str] = []
    for names in counts:
        place = 0
        for name in names:
            if name not in order:
                order.insert(place, name)
            place = order.index(name) + 1
    return {name: sum(some.get(name, 0) for some in counts) for name in order}
