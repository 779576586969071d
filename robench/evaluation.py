"""Evaluation: a defense, a data set, a threat model and an attack make a record with the outcome of every example."""

import contextlib
import hashlib
import inspect
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from robench import attacks, contract, controls, data, parts, provenance, scoring, targets, zoo
from robench.attacks import Attack, Found
from robench.cost import Cost, counted
from robench.data import Dataset, as_float
from robench.defense import Defense
from robench.errors import OutOfTimeError, UserError
from robench.exact import exact_arithmetic
from robench.fingerprint import attacked_hash, state_hash
from robench.folding import folded
from robench.noise import Draw
from robench.parts import Chunk, Controls, Part
from robench.recipe import Precision
from robench.record import Provenance, Record
from robench.replay import recording
from robench.strangers import explained
from robench.targets import Target
from robench.threat import ThreatModel

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
        UserError: for a model that does not fit the data set, returns what is not finite, lets the images of a batch decide on each
            other or remembers what it was shown, an attack that leaves the threat model, or an unwritable cache.
    """
    defense = target.defense.to(device).eval()
    kind = torch.device(device).type
    if attack.batch_size:
        precision = "float32"
    precision = precision or ("bfloat16" if kind == "cuda" else "float32")
    size = attack.batch_size or batch_size or BATCH_SIZE[kind]
    state = state_hash(defense)
    targets.check_settled(target, state)
    data.check_labels(dataset.labels, len(dataset.classes))
    first = as_float(dataset.images[: contract.TRIED]).to(device)
    draw = Draw(seed, torch.arange(len(first), device=device)) if defense.random else None
    fresh = contract.copied(defense, first)
    logits = contract.honest_logits(target, first, draw, dataset)
    contract.check_memory(target, fresh, threat.random_start(first, torch.arange(len(first), device=device), seed, "memory"), draw)
    del fresh
    behaviour = attacked_hash(defense, first, logits, seed)
    made_by = provenance.of_this_process(device)
    started, given = time.monotonic(), attack
    with counted(defense) as learning, recording(learning):
        attack = fitted(attack, target, dataset, threat, seed=seed, device=device)
    key = _key(target, dataset, threat, attack, seed, size, precision, behaviour)
    # The key reads what was learnt, so that a GPU is done with it.
    learning_seconds = 0.0 if attack is given else time.monotonic() - started
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
        if chunk is not None and not chunk.fits(end - start, len(dataset.classes)):
            raise UserError(f"{path} is corrupt (its predictions do not fit {end - start} examples); delete it to measure again")
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
        robust = np.concatenate([scoring.correct(c.robust, dataset.labels, i * size).mean(0) for i, c in enumerate(chunks)])
        share = f"{end}/{len(dataset)} examples, robust accuracy so far {robust.mean():.1%}"
        progress(f"{target.name} under {attack.name} within {threat}: {share}")
        spent_passes, spent_seconds = passes >= _limit(max_passes), seconds >= _limit(max_seconds)
        if end < len(dataset) and (spent_passes or spent_seconds):
            what = f"{passes:,} passes" if spent_passes else f"{seconds:,.0f} s"
            partial = f"stopped after {end} of {len(dataset)} examples, its budget of passes or time spent ({what})"
            dataset = dataset.first(end)
            break
    control = _controls(target, dataset, threat, attack, seed, device, cache, behaviour, made_by) if defense.random else None
    made += [*chunks, *([control] if control else [])]
    readings = control.readings if control else {}
    return scoring.recorded(target, dataset, threat, attack, seed, scale, precision, chunks, spent, seconds, readings, made, partial)


def _limit(given: float | None) -> float:
    return math.inf if given is None else given


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
        dataset.fingerprint, str(threat), attack.name, attack.version_on(target.defense.random), dict(attack.parameters), seed, size,
        precision,
        "" if attack.learnt is None else hashlib.sha256(attack.learnt.cpu().numpy().tobytes()).hexdigest(),
        # What earlier versions kept of a random defense lacks the attack's own count.
        *(["counted"] if target.defense.random else []),
        "folded", *_source(attack),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _source(attack: Attack) -> list[str]:
    """Return the hash of the file that an attack from elsewhere is written in, whose version nobody may have raised."""
    module = getattr(attack.function, "__module__", "") or ""
    if module.partition(".")[0] == "robench":
        return []
    try:
        return [hashlib.sha256(Path(inspect.getsourcefile(attack.function) or "").read_bytes()).hexdigest()]
    except (TypeError, OSError):
        return []


def _attack_chunk(
    target: Target, dataset: Dataset, start: int, stop: int, threat: ThreatModel, attack: Attack, seed: int, device: str, precision: str,
    made_by: Provenance,
) -> Chunk:  # fmt: skip
    started = time.monotonic()
    defense = target.defense
    x, y = as_float(dataset.images[start:stop]).to(device), dataset.labels[start:stop].to(device)
    examples = torch.arange(start, stop, device=device)
    with explained(f"{target.name} under {attack.name}"):
        found, robust, cost = _adversarial(defense, x, y, threat, attack, examples, seed, precision)
        clean = scoring.predictions(defense, x, examples, seed)
    stages, counted_robust = ({name: int(marks.sum()) for name, marks in by.items()} for by in (found.stages, found.counted))
    return Chunk(
        provenance=made_by, clean=clean.tolist(), robust=robust.tolist(), forwards=cost.forwards, backwards=cost.backwards,
        seconds=time.monotonic() - started, stages=stages, counted=counted_robust,
    )  # fmt: skip


def _adversarial(
    defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, attack: Attack, examples: Tensor, seed: int, precision: str
) -> tuple[Found, Tensor, Cost]:
    """Return what an attack found, the defense's predictions of it (draws, B) as it is, in float32, and what the attack cost.

    The attack sees batch norm folded, and computes in the given precision; what fools the defense only so is attacked again as it is.
    An attack with a batch size of its own sees the defense as it is.
    """
    like, half = Draw(seed, examples[:16]) if defense.random else None, precision == "bfloat16"
    seen = contextlib.nullcontext(False) if attack.batch_size else folded(defense, x[:16], like)
    with seen as other, torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        with counted(defense) as cost, recording(cost):
            # An attack that works in place is given images of its own.
            found = attack.run(defense, x.clone(), y.clone(), threat, examples=examples, seed=seed)
        x_adv, stages = found.x_adv.float(), dict(found.stages)
        _check_within(threat, attack, x_adv, x)
        exact = defense.random or not (other or half)
        claimed = None if exact else scoring.predictions(defense, x_adv, examples, seed)[0] != y
    predicted = scoring.predictions(defense, x_adv, examples, seed)
    if claimed is None:
        return replace(found, x_adv=x_adv), predicted, cost
    for marks in stages.values():
        # Near the border a GPU may answer otherwise in a batch of another size.
        claimed = claimed | marks
    if bool((again := claimed & (predicted[0] == y)).any()):
        with counted(defense) as more, recording(more):
            anew = attack.run(defense, x[again], y[again], threat, examples=examples[again], seed=seed)
        cost += more
        x_adv[again] = anew.x_adv.float()
        _check_within(threat, attack, x_adv, x)
        predicted[:, again] = scoring.predictions(defense, x_adv[again], examples[again], seed)
        stages = {name: marks & ~again for name, marks in stages.items()}
        for name, marks in anew.stages.items():
            stages[name] = stages.get(name, torch.zeros_like(again)).masked_scatter(again, marks)
    stages = {name: marks & (predicted[0] != y) for name, marks in stages.items()}
    return replace(found, x_adv=x_adv, stages=stages), predicted, cost


def _check_within(threat: ThreatModel, attack: Attack, x_adv: Tensor, x: Tensor) -> None:
    if (problem := threat.violation(x_adv, x)) is not None:
        raise UserError(f"attack {attack.name} left the threat model {threat}: {problem}")


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
        results[controls.key(name, controls.ROBUST)] = float(scoring.correct(chunk.robust, few.labels, 0).mean())
        results[controls.key(name, controls.CLEAN)] = float(scoring.correct(chunk.clean, few.labels, 0).mean())
    made = Controls(provenance=made_by, readings=results)
    if path:
        parts.save(made, path)
    return made
