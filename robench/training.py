"""Training in resumable stages: plain, adversarial on an ensemble as one model, per member, or of a last layer only.

A stage trains one module of a defense by one recipe. Its result is stored under a hash of everything that determines it (initial
weights and what the module computes with them, recipe, data, seed, precision), so a stage that two defenses share is trained once,
and a stage that was interrupted goes on from its last epoch to the same weights.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from robench import noise
from robench.attacks.steps import steepest
from robench.data import Dataset, as_float
from robench.defense import Defense, as_defense
from robench.errors import OutOfTimeError, UserError
from robench.files import write_atomic
from robench.parameters import Value
from robench.threat import ThreatModel

VERSION = 1
"""Part of every stage's hash: raise it when training changes what it computes."""

CHECKPOINT_SECONDS = 5.0
"""An interrupted stage goes on from the last epoch that ended at least this long after the one kept before it."""

Progress = Callable[[str], None]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class InnerAttack:
    """The attack inside adversarial training, on the defense as one model, in evaluation mode.

    Attributes:
        threat: the threat model's text form, ``Linf:8/255``.
        steps: steepest-ascent steps on the cross-entropy.
        step_size: in units of the pixel range.
        start: the clean image, a uniform point of the ball, or Gaussian noise of half the budget per value, projected
            (arXiv 1811.09300, Algorithm 1; its variance is not stated there).
    """

    threat: str
    steps: int
    step_size: float
    start: Literal["clean", "uniform", "gaussian"]


@dataclass(frozen=True)
class Recipe:
    """How a stage trains.

    Attributes:
        epochs: passes over the training set.
        learning_rate: the peak rate.
        schedule: ``one-cycle`` (linear up for 30 % of the steps, linear down), ``constant``, or ``step`` (x 0.1 at each third).
        optimiser: SGD with Nesterov momentum 0.9, or Adam.
        batch_size: images of one step.
        weight_decay: on all trained parameters.
        attack: None trains on clean images alone.
        clean_weight: weight of the clean loss beside the adversarial loss of weight one; 1 is rho = 1 of arXiv 1811.09300, 0 trains
            on adversarial images alone.
        loss_on: cross-entropy of the defense's prediction, or the mean cross-entropy of its predictors, each on its own.
        augmentation: random crop (an eighth of the side as padding) and flip; digits and letters must not be flipped.
        precision: ``bfloat16`` trains under autocast where the hardware computes it natively, else in float32.
    """

    epochs: int
    learning_rate: float
    schedule: Literal["one-cycle", "constant", "step"] = "one-cycle"
    optimiser: Literal["sgd", "adam"] = "sgd"
    batch_size: int = 128
    weight_decay: float = 5e-4
    attack: InnerAttack | None = None
    clean_weight: float = 0.0
    loss_on: Literal["prediction", "predictors"] = "prediction"
    augmentation: Literal["none", "crop", "crop-flip"] = "crop-flip"
    precision: Precision = "float32"


@dataclass(frozen=True)
class Stage:
    """One stage of a defense's training.

    Attributes:
        recipe: how.
        seed: of the data order, augmentation and attack starts.
        module: dotted path of the module to train within the defense; empty for the defense as a whole.
        trainable: dotted paths within that module whose parameters learn; empty for all. The rest is frozen, in evaluation mode.
    """

    recipe: Recipe
    seed: int
    module: str = ""
    trainable: tuple[str, ...] = ()


class NotTrainedError(UserError):
    """A stage is not in the folder of what was trained before, and may not be trained now."""


def train(
    defense: Defense, stages: tuple[Stage, ...], dataset: Dataset, *, folder: Path, device: str = "cpu", may_train: bool = True,
    anew: bool = False, progress: Progress | None = None, stop: Callable[[], bool] = lambda: False,
) -> None:  # fmt: skip
    """Train `defense` in place, stage by stage, taking from `folder` what was trained before.

    Args:
        defense: untrained, as the zoo builds it.
        stages: in order.
        dataset: the training split.
        folder: where stages and checkpoints are kept.
        device: ``cpu`` or ``cuda``.
        may_train: False only takes what was trained before.
        anew: train every stage from its beginning, whatever the folder holds, and keep that instead.
        progress: is told each epoch's line.
        stop: is asked before each epoch; where it says yes, what was trained so far is kept for the next call.

    Raises:
        OutOfTimeError: if `stop` ended the training.
        UserError: for an unwritable folder, or a checkpoint that is corrupt.
        NotTrainedError: for a stage that is not in the folder where none may be trained.
    """
    for number, stage in enumerate(stages):
        module = defense.get_submodule(stage.module)
        prefix = f"stage {number + 1}/{len(stages)}"
        _train_stage(module, stage, dataset, folder, device, may_train, anew, partial(_tell, progress, prefix), stop)
    defense.eval()


def place(module: nn.Module, device: str) -> torch.memory_format:
    """Move a module to the device it trains on, in the memory layout it trains in, which decides a logit's last bits."""
    layout = _memory_format(module, device)
    module.to(device).to(memory_format=layout)
    return layout


def _tell(progress: Progress | None, prefix: str, line: str) -> None:
    if progress is not None:
        progress(f"{prefix} {line}")


def state_hash(module: nn.Module) -> str:
    """Return the SHA-256 of a module's parameters and buffers, names, shapes and types included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def behaviour_hash(module: nn.Module, dataset: Dataset) -> str:
    """Return a hash of a module's predictions on two images, for what its weights do not tell: strides, aggregation, noise.

    They are rounded, so that threads, memory layouts and machines do not change the hash.
    """
    # Adding 0 turns a rounded -0.0 into 0.0.
    return hashlib.sha256((reference_logits(module, dataset).round(decimals=6) + 0.0).numpy().tobytes()).hexdigest()


def reference_logits(module: nn.Module, dataset: Dataset) -> Tensor:
    """Return a module's logits (2, classes) of a data set's first two images, in float64, on the CPU, of one fixed draw."""
    defense, x = as_defense(module).eval(), as_float(dataset.images[:2]).double()
    draw = noise.Draw(0, torch.arange(len(x))) if defense.random else None
    weights = {name: t.cpu().double() if t.is_floating_point() else t.cpu() for name, t in
               itertools.chain(defense.named_parameters(), defense.named_buffers())}  # fmt: skip
    with torch.no_grad(), noise.isolated_generator(0):
        logits: Tensor = torch.func.functional_call(defense, weights, (x, draw))
    return logits


def precision(recipe: Recipe, device: str) -> Precision:
    """Return what a recipe trains in on a device: bfloat16 where the recipe asks for it and the hardware has it."""
    return "bfloat16" if recipe.precision == "bfloat16" and native_bfloat16(device) else "float32"


def native_bfloat16(device: str) -> bool:
    """Return whether the device multiplies bfloat16 natively."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())


def summary(stages: Sequence[Stage], precisions: Sequence[Precision]) -> dict[str, Value]:
    """Return what was trained how, and in which precision, a line per stage."""
    lines: dict[str, Value] = {}
    for number, (stage, trained_in) in enumerate(zip(stages, precisions, strict=True)):
        recipe = stage.recipe
        attack = "clean images" if recipe.attack is None else " ".join(f"{k}={v}" for k, v in dataclasses.asdict(recipe.attack).items())
        part = ",".join(stage.trainable) or "all"
        lines[f"stage {number + 1}"] = (
            f"{stage.module or 'whole'}/{part}: {recipe.epochs} epochs, {recipe.optimiser} {recipe.learning_rate} {recipe.schedule}, "
            f"batch {recipe.batch_size}, {attack}, clean weight {recipe.clean_weight}, {trained_in}"
        )
    return lines


def _memory_format(module: nn.Module, device: str) -> torch.memory_format:
    """Return channels_last, the faster layout, but on the CPU only where no convolution has fewer than 16 outputs.

    There the backward pass of torch 2.13 to 2.15 corrupts memory in that layout with several threads and odd batch sizes.
    """
    narrow = any(isinstance(m, nn.Conv2d) and m.out_channels < 16 for m in module.modules())
    return torch.contiguous_format if narrow and torch.device(device).type == "cpu" else torch.channels_last


def stage_path(module: nn.Module, stage: Stage, dataset: Dataset, folder: Path, device: str) -> Path:
    """Return the file that keeps what `stage` makes of `module`, in the state it is in now, named by a hash of all that decides it."""
    recipe = stage.recipe
    identity = json.dumps(
        {
            "version": VERSION,
            "initial": state_hash(module),
            "behaviour": behaviour_hash(module, dataset),
            "recipe": dataclasses.asdict(recipe),
            "trainable": stage.trainable,
            "seed": stage.seed,
            "data": dataset.fingerprint,
            "images": len(dataset),
            "bfloat16": precision(recipe, device) == "bfloat16",
            "device": torch.device(device).type,
        },
        sort_keys=True,
    )
    return folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.safetensors"


def checkpoint_path(path: Path) -> Path:
    """Return the file that keeps an unfinished stage, beside the one that keeps it finished."""
    return path.with_suffix(".checkpoint")


def _train_stage(
    module: nn.Module, stage: Stage, dataset: Dataset, folder: Path, device: str, may_train: bool, anew: bool, progress: Progress,
    stop: Callable[[], bool],
) -> None:  # fmt: skip
    recipe = stage.recipe
    half = precision(recipe, device) == "bfloat16"
    path = stage_path(module, stage, dataset, folder, device)
    # Before the weights are read back too.
    layout = place(module, device)
    if path.exists() and not anew:
        _restore(module, _read(path))
        progress("already trained")
        return
    if not may_train:
        raise NotTrainedError(f"there are no trained weights of {stage.module or 'the defense'} in {folder}")
    trained = _freeze_but(module, stage.trainable)
    optimiser = _optimiser(recipe, trained)
    checkpoint, first = checkpoint_path(path), 0
    if checkpoint.exists() and not anew:
        saved = _read(checkpoint)
        first = int(saved.pop("epoch"))
        _restore_optimiser(optimiser, trained, {k: saved.pop(k) for k in list(saved) if k.startswith("optimiser/")})
        _restore(module, saved)
    steps = -(-len(dataset) // recipe.batch_size)
    images, labels = dataset.images.to(device), dataset.labels.to(device)
    saved_at, saved_epoch = time.monotonic(), first
    for epoch in range(first, recipe.epochs):
        if stop():
            if epoch > saved_epoch:
                _write(checkpoint, _unfinished(module, optimiser, trained, epoch))
            raise OutOfTimeError(f"training stopped after {epoch} of {recipe.epochs} epochs")
        started, losses = time.monotonic(), []
        for step, (indices, x, y) in enumerate(_batches(images, labels, recipe, stage.seed, epoch, layout)):
            rate = _rate(recipe, epoch * steps + step, recipe.epochs * steps)
            for group in optimiser.param_groups:
                group["lr"] = rate
            with noise.isolated_generator(stage.seed * 1_000_003 + epoch * steps + step, device):
                try:
                    losses.append(_step(module, optimiser, recipe, x, y, noise.Draw(stage.seed, indices, epoch), half, stage.trainable))
                except UserError as error:
                    # Aggregators refuse logits that are not finite, before there is a loss.
                    raise UserError(f"training failed in epoch {epoch + 1}: {error}; if it diverged, lower the learning rate") from error
        seconds = time.monotonic() - started
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise UserError(f"training diverged in epoch {epoch + 1}: the loss is {loss}; lower the recipe's learning rate")
        progress(f"epoch {epoch + 1}/{recipe.epochs}: loss {loss:.3f}, {len(dataset) / seconds:.0f} images/s")
        # Writing after every short epoch would cost more than it saves.
        if epoch + 1 < recipe.epochs and time.monotonic() - saved_at >= CHECKPOINT_SECONDS:
            _write(checkpoint, _unfinished(module, optimiser, trained, epoch + 1))
            saved_at, saved_epoch = time.monotonic(), epoch + 1
    module.eval().requires_grad_(True)
    _write(path, module.state_dict())
    checkpoint.unlink(missing_ok=True)


def _step(
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    draw: noise.Draw,
    half: bool,
    trainable: tuple[str, ...],
) -> Tensor:
    """Take one optimiser step on a batch and return its loss."""
    defense = as_defense(module)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        images, weights = x, torch.ones(len(x), device=x.device)
        if recipe.attack is not None:
            module.eval()
            images = attack_batch(defense, x, y, recipe.attack, draw)
            if recipe.clean_weight > 0:
                # One forward for both halves: batch norm then learns the statistics of the mixture it is evaluated with.
                images, y = torch.cat([images, x]), torch.cat([y, y])
                weights = torch.cat([weights, recipe.clean_weight * weights])
                draw = noise.Draw(draw.seed, torch.cat([draw.examples, draw.examples]), draw.number)
        _train_mode(module, trainable)
        predictors = defense.predictors(images, draw if defense.random else None)
        loss = (_losses(defense, predictors, y, recipe) * weights).sum() / weights.sum()
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return loss.detach()


def _losses(defense: Defense, predictors: Tensor, y: Tensor, recipe: Recipe) -> Tensor:
    """Return each example's loss (B,): of the prediction, or the mean over the predictors (B, N, classes)."""
    if recipe.loss_on == "prediction":
        return functional.cross_entropy(defense.aggregate(predictors.float()), y, reduction="none")
    losses = functional.cross_entropy(predictors.float().flatten(0, 1), y.repeat_interleave(predictors.shape[1]), reduction="none")
    return losses.reshape(predictors.shape[:2]).mean(1)


def attack_batch(defense: Defense, x: Tensor, y: Tensor, attack: InnerAttack, draw: noise.Draw) -> Tensor:
    """Return adversarial images of a training batch (B, C, H, W); the weights take no gradient.

    Args:
        defense: in evaluation mode.
        x: clean images in [0, 1].
        y: labels.
        attack: its threat model, steps and start.
        draw: identifies the batch's examples and epoch; the start and a random defense's noise come from it.
    """
    threat = ThreatModel.parse(attack.threat)
    shape = tuple(x.shape[1:])
    if attack.start == "uniform":
        x_adv = threat.random_start(x, draw.examples, draw.seed, f"training/{draw.number}")
    elif attack.start == "gaussian":
        x_adv = threat.project(x + 0.5 * threat.epsilon * noise.normal(draw, "training/gaussian", shape), x, rounds=0)
    else:
        x_adv = x
    for _ in range(attack.steps):
        point = x_adv.detach().requires_grad_()
        logits = defense(point, draw if defense.random else None)
        (gradient,) = torch.autograd.grad(functional.cross_entropy(logits.float(), y, reduction="sum"), point)
        # Training needs no exact projection, and scale-and-clip is the common one.
        x_adv = threat.project(point.detach() + attack.step_size * steepest(gradient.float(), threat.norm), x, rounds=0)
    return x_adv.detach()


def _train_mode(module: nn.Module, trainable: tuple[str, ...]) -> None:
    module.train(not trainable)
    for name in trainable:
        module.get_submodule(name).train()


def _freeze_but(module: nn.Module, trainable: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Let only the named parts learn and return the learning parameters by name."""
    prefixes = tuple(f"{name}." for name in trainable) or ("",)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _optimiser(recipe: Recipe, trained: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    if recipe.optimiser == "adam":
        return torch.optim.Adam(trained.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(trained.values(), lr=recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)


def _rate(recipe: Recipe, step: int, steps: int) -> float:
    done = (step + 1) / steps
    if recipe.schedule == "one-cycle":
        return recipe.learning_rate * min(done / 0.3, (1 - done) / 0.7 + 1 / steps)
    return recipe.learning_rate * (0.1 ** int(3 * step / steps) if recipe.schedule == "step" else 1.0)


def _batches(
    images: Tensor, labels: Tensor, recipe: Recipe, seed: int, epoch: int, layout: torch.memory_format
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield an epoch's batches: indices (B,), augmented float images (B, C, H, W) and labels (B,)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    for chosen in torch.randperm(len(images), generator=generator).split(recipe.batch_size):
        indices = chosen.to(images.device)
        x = as_float(_augmented(images[indices], recipe.augmentation, noise.Draw(seed, indices, epoch)))
        yield indices, x.contiguous(memory_format=layout), labels[indices]


def _augmented(images: Tensor, augmentation: str, draw: noise.Draw) -> Tensor:
    """Shift uint8 images (B, C, H, W) by up to an eighth of their side, zeros moving in, and mirror half of them."""
    if augmentation == "none":
        return images
    batch, _, height, width = images.shape
    padding = height // 8
    padded = functional.pad(images, (padding,) * 4)
    shift = noise.integers(draw, "augmentation/shift", 0, 2 * padding + 1, (2,))
    rows = shift[:, :1] + torch.arange(height, device=images.device)
    columns = shift[:, 1:] + torch.arange(width, device=images.device)
    if augmentation == "crop-flip":
        flip = noise.integers(draw, "augmentation/flip", 0, 2, (1,)) == 1
        columns = torch.where(flip, columns.flip(1), columns)
    batch_index = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch_index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _unfinished(module: nn.Module, optimiser: torch.optim.Optimizer, trained: dict[str, nn.Parameter], epochs: int) -> dict[str, Tensor]:
    """Return what a checkpoint keeps after so many epochs."""
    return module.state_dict() | _optimiser_state(optimiser, trained) | {"epoch": torch.tensor(epochs)}


def _optimiser_state(optimiser: torch.optim.Optimizer, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        f"optimiser/{name}/{key}": value
        for name, parameter in trained.items()
        for key, value in optimiser.state[parameter].items()
        if isinstance(value, Tensor)
    }


def _restore_optimiser(optimiser: torch.optim.Optimizer, trained: dict[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
    for full, value in saved.items():
        name, _, key = full.removeprefix("optimiser/").rpartition("/")
        # Adam keeps its step count on the CPU.
        optimiser.state[trained[name]][key] = value if key == "step" else value.to(trained[name].device)


def _restore(module: nn.Module, state: dict[str, Tensor]) -> None:
    module.load_state_dict(state)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    write_atomic(path, safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"weights file {path} is corrupt or unreadable ({error}); delete it to train again") from error
