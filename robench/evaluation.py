"""Evaluation: a defense, a data set, a threat model and an attack make a record with the outcome of every example."""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robench import attacks, contract, controls, data, parts, record, targets, zoo
from robench.attacks import Attack, Found
from robench.cost import Cost, counted
from robench.data import Dataset, as_float
from robench.defense import Defense
from robench.errors import OutOfTimeError, UserError
from robench.estimate import Estimate
from robench.exact import exact_arithmetic
from robench.fingerprint import attacked_hash, state_hash
from robench.folding import folded
from robench.noise import Draw
from robench.parts import Chunk, Controls, Part
from robench.recipe import Precision
from robench.record import Provenance, Record
from robench.replay import recording
from robench.targets import Target
from robench.threat import ThreatModel

SCORING_DRAWS = 10
"""Fresh draws that score a random defense."""

BATCH_SIZE = {"cpu": 100, "cuda": 500}
"""Examples attacked together unless it is said: on a GPU the smallest number that keeps it busy."""

Progress = Callable[[str], None]


def evaluate(
    model: nn.Module, *, dataset: str | Dataset, threat: str | ThreatModel, attack: str | Attack = "autoattack", n: int | None = None,
    seed: int = 0, batch_size: int | None = None, device: str = "cpu", scale: zoo.Scale = "cpu", name: str | None = None,
) -> Record:  # fmt: skip
    """Attack a model and return the record.

    Args:
        model: from images (B, C, H, W) in [0, 1] to logits (B, classes), normalisation inside; a `Defense` tells more.
        dataset: a name (its test split is taken) or a data set.
        threat: ``Linf:8/255`` or a threat model.
        attack: an attack's name, ``pgd-20,restarts=5``.
        n: the first n examples; all by default.
        seed: the attack's seed.
        batch_size: examples attacked together; by default `BATCH_SIZE`.
        device: ``cpu`` or ``cuda``.
        scale: what the record says of the protocol's scale.
        name: what the record calls the model; its class by default.

    Raises:
        UserError: for anything that does not fit, in one line.
    """
    split = data.load(dataset, "test") if isinstance(dataset, str) else dataset
    return measure(
        targets.of_module(model, name), split if n is None else split.first(n),
        ThreatModel.parse(threat) if isinstance(threat, str) else threat,
        attacks.parse(attack) if isinstance(attack, str) else attack, seed=seed, batch_size=batch_size, device=device, scale=scale,
    )  # fmt: skip


@exact_arithmetic()
def measure(
    target: Target,
    dataset: Dataset,
    threat: ThreatModel,
    attack: Attack,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "cpu",
    scale: zoo.Scale = "cpu",
    precision: Precision | None = None,
    cache: Path | None = None,
    max_passes: int | None = None,
    max_seconds: float | None = None,
    progress: Progress = lambda _line: None,
    learnt: Callable[[Tensor], None] = lambda _what: None,
    stop: Callable[[], bool] = lambda: False,
) -> Record:
    """Evaluate a target and return the record.

    Args:
        target: what to attack.
        dataset: the examples, in order; an example's identity is its index.
        threat: the threat model.
        attack: the attack.
        seed: the attack's seed.
        batch_size: examples attacked together, by default `BATCH_SIZE`; an attack with a batch size of its own keeps it.
        device: ``cpu`` or ``cuda``.
        scale: what the record says of the protocol's scale.
        precision: of the attack; every success is scored in float32. bfloat16 on CUDA by default, else float32.
        cache: where finished chunks are kept, so that an interrupted evaluation goes on; None keeps nothing.
        max_passes: forwards and backwards at the members after which no further chunk of `batch_size` examples is attacked, those of
            learning from training images included; the record then covers the examples that were, and says so in `partial`.
        max_seconds: likewise, of attack time.
        progress: is told a line after each chunk.
        learnt: is given what the attack learnt from training images, if it is one that does.
        stop: is asked before each chunk that is not in the cache; where it says yes, there is no record.

    Raises:
        OutOfTimeError: if `stop` ended the evaluation; with a cache, the next one goes on from there.
        UserError: for a model that does not fit the data set, returns what is not finite or lets the images of a batch decide on each
            other, an attack that leaves the threat model, or an unwritable cache.
    """
    defense = target.defense.to(device).eval()
    if precision is None or "batch_size" in attack.parameters:
        reduced = torch.device(device).type == "cuda" and "batch_size" not in attack.parameters
        precision = "bfloat16" if reduced else "float32"
    size = int(attack.parameters.get("batch_size") or batch_size or BATCH_SIZE[torch.device(device).type])
    state = state_hash(defense)
    targets.check_settled(target, state)
    data.check_labels(dataset.labels, len(dataset.classes))
    first = as_float(dataset.images[: contract.TRIED]).to(device)
    draw = Draw(seed, torch.arange(len(first), device=device)) if defense.random else None
    logits = contract.honest_logits(target, first, draw, dataset)
    behaviour = attacked_hash(defense, first, logits, seed)
    made_by = record.provenance(device)
    started, given = time.monotonic(), attack
    with counted(defense) as learning, recording(learning):
        attack = fitted(attack, target, dataset, threat, seed=seed, device=device)
    key = _key(target, dataset, threat, attack, seed, size, precision, behaviour)
    # The key reads what was learnt, so that a GPU is done with it.
    learning_seconds = time.monotonic() - started
    if attack.learnt is not None:
        learnt(attack.learnt)
    folder = cache / "evaluations" / key if cache else None
    made: list[Part] = [] if attack is given else [Part(provenance=made_by)]
    chunks: list[Chunk] = []
    partial = None
    for start in range(0, len(dataset), size):
        end = min(start + size, len(dataset))
        path = folder / f"{start:06d}-{end:06d}.json" if folder else None
        chunk = parts.load(path, Chunk)
        if chunk is None:
            if stop():
                raise OutOfTimeError(f"the evaluation stopped after {start} of {len(dataset)} examples")
            chunk = _attack_chunk(target, dataset, start, end, threat, attack, seed, device, precision, made_by)
            targets.check_settled(target, state)
            if path:
                parts.save(chunk, path)
        chunks.append(chunk)
        spent = sum((Cost(c.forwards, c.backwards) for c in chunks), learning)
        passes, seconds = spent.forwards + spent.backwards, learning_seconds + sum(c.seconds for c in chunks)
        robust = np.concatenate([_correct(c.robust, dataset.labels, i * size).mean(0) for i, c in enumerate(chunks)])
        share = f"{end}/{len(dataset)} examples, robust accuracy so far {robust.mean():.1%}"
        progress(f"{target.name} under {attack.name} within {threat}: {share}")
        if end < len(dataset) and (passes >= (max_passes or math.inf) or seconds >= (max_seconds or math.inf)):
            what = f"{passes:,} passes" if passes >= (max_passes or math.inf) else f"{seconds:,.0f} s"
            partial = f"stopped after {end} of {len(dataset)} examples, its budget of passes or time spent ({what})"
            dataset = dataset.first(end)
            break
    control = _controls(target, dataset, threat, attack, seed, device, cache, behaviour, made_by) if defense.random else None
    made += [*chunks, *([control] if control else [])]
    readings = control.readings if control else {}
    return _record(target, dataset, threat, attack, seed, scale, precision, chunks, spent, seconds, readings, made, partial)


def fitted(attack: Attack, target: Target, dataset: Dataset, threat: ThreatModel, *, seed: int, device: str = "cpu") -> Attack:
    """Return the attack with what it learns from the data set's training images, for one that learns; others as they are.

    Raises:
        UserError: if the attack learns and the data set has no training split.
    """
    if attack.apply is None or attack.learnt is not None:
        return attack
    train = data.load(dataset.name, "train")
    train = train.first(min(len(train), int(attack.parameters["images"] or len(train))))
    defense = target.defense.to(device).eval()
    return attack.fitted(defense, as_float(train.images).to(device), train.labels.to(device), threat, seed=seed)


def _key(
    target: Target, dataset: Dataset, threat: ThreatModel, attack: Attack, seed: int, size: int, precision: str, behaviour: str
) -> str:
    """Return the hash of all that determines a chunk's outcome; what the model does with some images stands for its code."""
    identity = [
        target.name, target.version, state_hash(target.defense), behaviour,
        dataset.fingerprint, str(threat), attack.name, attack.version, dict(attack.parameters), seed, size, precision,
        "" if attack.learnt is None else hashlib.sha256(attack.learnt.cpu().numpy().tobytes()).hexdigest(),
        # What earlier versions kept of a random defense lacks the attack's own count.
        *(["counted"] if target.defense.random else []),
        *(["folded"] if precision == "bfloat16" else []),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _attack_chunk(
    target: Target, dataset: Dataset, start: int, stop: int, threat: ThreatModel, attack: Attack, seed: int, device: str, precision: str,
    made_by: Provenance,
) -> Chunk:  # fmt: skip
    started = time.monotonic()
    defense = target.defense
    x, y = as_float(dataset.images[start:stop]).to(device), dataset.labels[start:stop].to(device)
    examples = torch.arange(start, stop, device=device)
    with counted(defense) as cost:
        found = _adversarial(defense, x, y, threat, attack, examples, seed, precision, cost)
    x_adv = found.x_adv
    if (problem := threat.violation(x_adv, x)) is not None:
        raise UserError(f"attack {attack.name} left the threat model {threat}: {problem}")
    clean, robust = predictions(defense, x, examples, seed), predictions(defense, x_adv, examples, seed)
    stages, counted_robust = ({name: int(marks.sum()) for name, marks in by.items()} for by in (found.stages, found.counted))
    return Chunk(
        provenance=made_by, clean=clean.tolist(), robust=robust.tolist(), forwards=cost.forwards, backwards=cost.backwards,
        seconds=time.monotonic() - started, stages=stages, counted=counted_robust,
    )  # fmt: skip


def _adversarial(
    defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, attack: Attack, examples: Tensor, seed: int, precision: str,
    cost: Cost,
) -> Found:  # fmt: skip
    """Attack in the given precision; what fools the defense only in reduced precision is attacked again in float32."""
    if precision == "float32":
        with recording(cost):
            return attack.run(defense, x, y, threat, examples=examples, seed=seed)
    like = Draw(seed, examples[:16]) if defense.random else None
    with folded(defense, x[:16], like), torch.autocast(x.device.type, torch.bfloat16), recording(cost):
        found = attack.run(defense, x, y, threat, examples=examples, seed=seed)
        x_adv = found.x_adv.float()
        claimed = predictions(defense, x_adv, examples, seed)[0] != y
    if not defense.random:
        again = claimed & (predictions(defense, x_adv, examples, seed)[0] == y)
        if bool(again.any()):
            with recording(cost):
                x_adv[again] = attack(defense, x[again], y[again], threat, examples=examples[again], seed=seed)
    return replace(found, x_adv=x_adv)


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


def _correct(predicted: list[list[int]], labels: Tensor, start: int) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    classes = np.asarray(predicted)
    correct: np.ndarray[Any, np.dtype[np.bool_]] = classes == labels[start : start + classes.shape[1]].numpy()[None]
    return correct


def _controls(
    target: Target, dataset: Dataset, threat: ThreatModel, attack: Attack, seed: int, device: str, cache: Path | None, behaviour: str,
    made_by: Provenance,
) -> Controls:  # fmt: skip
    """Return a random defense's controls on the first examples: with no budget the attack must leave the clean accuracy
    standing, with any budget none (see `robench.controls`). They are the same for every budget of a norm, but for an attack that
    learns, whose perturbation is scaled down for the first and learnt anew for the second.
    """
    few = dataset.first(min(controls.EXAMPLES, len(dataset)))
    key = _key(target, few, ThreatModel(threat.norm, Fraction(0)), attack, seed, len(few), "float32", behaviour)
    path = cache / "evaluations" / key / "controls.json" if cache else None
    if known := parts.load(path, Controls):
        return known
    values = few.images[0].numel()
    everything = {"Linf": 1, "L2": int(values**0.5) + 1, "L1": values}[threat.norm]
    results = {}
    for name, budget in ((controls.TINY, Fraction(1, 10**6)), (controls.UNBOUNDED, Fraction(everything))):
        within = ThreatModel(threat.norm, budget)
        if attack.apply and name == controls.UNBOUNDED:
            attack = fitted(replace(attack, learnt=None), target, dataset, within, seed=seed, device=device)
            results[controls.key(name, controls.CHANCE)] = float(few.labels.bincount().max()) / len(few)
        chunk = _attack_chunk(target, few, 0, len(few), within, attack, seed, device, "float32", made_by)
        results[controls.key(name, controls.ROBUST)] = float(_correct(chunk.robust, few.labels, 0).mean())
        results[controls.key(name, controls.CLEAN)] = float(_correct(chunk.clean, few.labels, 0).mean())
    made = Controls(provenance=made_by, readings=results)
    if path:
        parts.save(made, path)
    return made


def _record(
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
        attack=record.AttackInfo(name=attack.name, version=attack.version, parameters=dict(attack.parameters)),
        scale=scale,
        seed=seed,
        clean_accuracy=record.Proportion.of(clean_estimate),
        robust_accuracy=record.Proportion.of(robust_estimate),
        cost=record.CostPerImage(forwards=spent.forwards / n, backwards=spent.backwards / n),
        stages={name: sum(c.stages[name] for c in chunks) for name in chunks[0].stages},
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

    own = {stage: sum(c.counted[stage] for c in chunks) for stage in chunks[0].counted}
    standing = np.arange(len(labels)) < list(own.values())[-1] if own else None
    return record.RandomScore(
        draws=len(correct), mean=share(correct.mean(0)), majority=share(votes.argmax(0) == labels), worst=share(correct.all(0)),
        own_count=None if standing is None else share(standing), own_stages=own,
    )  # fmt: skip
