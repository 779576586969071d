"""Training in resumable stages: plain, adversarial on an ensemble as one model, per member, or of a last layer only.

A stage trains one module of a defense by one recipe. Its result is stored under a hash of everything that determines it (initial
weights and what the module computes with them, recipe, data, seed, precision), so a stage that two defenses share is trained once,
and a stage that was interrupted goes on from its last epoch to the same weights.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from robench import noise, overfitting, throughput
from robench.adversarial import folds
from robench.batches import batches
from robench.captured import Stepper, can_record
from robench.data import Dataset, as_float
from robench.defense import Defense
from robench.errors import OutOfTimeError, UserError
from robench.exact import exact_arithmetic
from robench.files import write_atomic
from robench.fingerprint import behaviour_hash, state_hash
from robench.layout import memory_format
from robench.overfitting import Epoch
from robench.recipe import Precision, Recipe, Stage, learning_rate, plain

VERSION = 1
"""Part of every stage's hash: raise it when training changes what it computes."""

CHECKPOINT_SECONDS = 5.0
"""An interrupted stage goes on from the last epoch that ended at least this long after the one kept before it."""

TELLING_SECONDS = 5.0
"""An epoch that takes at least this long is told with its floating-point operations a second."""

HISTORY = "history"
"""The entry of a kept file's metadata that holds its epochs."""

Progress = Callable[[str], None]


class NotTrainedError(UserError):
    """A stage is not in the folder of what was trained before, and may not be trained now."""


@exact_arithmetic()
def train(
    defense: Defense, stages: tuple[Stage, ...], dataset: Dataset, *, folder: Path, version: int | str = 1, device: str = "cpu",
    may_train: bool = True, anew: bool = False, progress: Progress | None = None, stop: Callable[[], bool] = lambda: False,
) -> tuple[tuple[Epoch, ...], ...]:  # fmt: skip
    """Train `defense` in place, stage by stage, taking from `folder` what was trained before.

    Args:
        defense: untrained, as the zoo builds it.
        stages: in order.
        dataset: the training split.
        folder: where stages and checkpoints are kept.
        version: the defense's (`robench.zoo.Named.trained_as`): what another one trained is not taken for this one's.
        device: ``cpu`` or ``cuda``.
        may_train: False only takes what was trained before.
        anew: train every stage from its beginning, whatever the folder holds, and keep that instead.
        progress: is told each epoch's line.
        stop: is asked before each epoch; where it says yes, what was trained so far is kept for the next call.

    Returns:
        what each epoch of each stage came to; of a stage that was kept before there was such a history, nothing.

    Raises:
        OutOfTimeError: if `stop` ended the training.
        UserError: for an unwritable folder, or a checkpoint that is corrupt.
        NotTrainedError: for a stage that is not in the folder where none may be trained.
    """
    histories = []
    for number, stage in enumerate(stages):
        module = defense.get_submodule(stage.module)
        tell = partial(_tell, progress, f"stage {number + 1}/{len(stages)}")
        path = stage_path(module, stage, dataset, folder, device, version)
        # Before the weights are read back too.
        layout = place(module, device)
        if path.exists() and not anew:
            state, history = _read(path)
            module.load_state_dict(state)
            tell("already trained")
        elif may_train:
            history = _train_stage(module, stage, dataset, path, device, layout, anew, tell, stop)
        else:
            raise NotTrainedError(f"there are no trained weights of {stage.module or 'the defense'} in {folder}")
        histories.append(tuple(history))
    defense.eval()
    return tuple(histories)


def place(module: nn.Module, device: str) -> torch.memory_format:
    """Move a module to the device it trains on, in the memory layout it trains in, which decides a logit's last bits."""
    layout = memory_format(module, device)
    module.to(device).to(memory_format=layout)
    return layout


def _tell(progress: Progress | None, prefix: str, line: str) -> None:
    if progress is not None:
        progress(f"{prefix} {line}")


def precision(recipe: Recipe, device: str) -> Precision:
    """Return what a recipe trains in on a device: bfloat16 where the recipe asks for it and the hardware has it."""
    return "bfloat16" if recipe.precision == "bfloat16" and native_bfloat16(device) else "float32"


def native_bfloat16(device: str) -> bool:
    """Return whether the device multiplies bfloat16 natively."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())


def stage_path(module: nn.Module, stage: Stage, dataset: Dataset, folder: Path, device: str, version: int | str = 1) -> Path:
    """Return the file that keeps what `stage` makes of `module`, in the state it is in now, named by a hash of all that decides it.

    `version` (`robench.zoo.Named.trained_as`) stands for what shows only while it trains, as in its training mode.
    """
    recipe, half = stage.recipe, precision(stage.recipe, device) == "bfloat16"
    identity = json.dumps(
        {
            "version": VERSION,
            "initial": state_hash(module),
            "behaviour": behaviour_hash(module, dataset),
            "recipe": plain(recipe),
            "trainable": stage.trainable,
            "seed": stage.seed,
            "data": dataset.fingerprint,
            "images": len(dataset),
            "bfloat16": half,
            "device": torch.device(device).type,
        }
        | ({"folded": True} if folds(recipe, half) else {})
        | ({"defense version": version} if version != 1 else {}),
        sort_keys=True,
    )
    return folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.safetensors"


def checkpoint_path(path: Path) -> Path:
    """Return the file that keeps an unfinished stage, beside the one that keeps it finished."""
    return path.with_suffix(".checkpoint")


@dataclass
class _Run:
    """A stage while it trains: all that a checkpoint keeps."""

    step: Stepper
    trained: dict[str, nn.Parameter]
    average: AveragedModel | None
    history: list[Epoch]

    def state(self) -> dict[str, Tensor]:
        state = self.step.module.state_dict() | {
            f"optimiser/{name}/{key}": value
            for name, parameter in self.trained.items()
            for key, value in self.step.optimiser.state[parameter].items()
            if isinstance(value, Tensor)
        }
        averaged = self.average.state_dict() if self.average is not None else {}
        return state | {f"average/{name}": tensor for name, tensor in averaged.items()} | {"epoch": torch.tensor(len(self.history))}

    def restore(self, saved: dict[str, Tensor], history: list[Epoch]) -> None:
        saved.pop("epoch")
        for full in [name for name in saved if name.startswith("optimiser/")]:
            name, _, key = full.removeprefix("optimiser/").rpartition("/")
            # Adam keeps its step count on the CPU.
            value = saved.pop(full)
            self.step.optimiser.state[self.trained[name]][key] = value if key == "step" else value.to(self.trained[name].device)
        averaged = {name.removeprefix("average/"): saved.pop(name) for name in list(saved) if name.startswith("average/")}
        if self.average is not None:
            self.average.load_state_dict(averaged)
        self.step.module.load_state_dict(saved)
        self.history = history


def _begin(module: nn.Module, stage: Stage, checkpoint: Path, anew: bool, device: str) -> _Run:
    """Return a stage at its beginning, or where its checkpoint left it."""
    recipe, trained = stage.recipe, freeze_but(module, stage.trainable)
    average = None
    if recipe.averaging:
        average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(recipe.averaging), use_buffers=True)
    optimiser, half = _optimiser(recipe, trained), precision(recipe, device) == "bfloat16"
    step = Stepper(module, optimiser, recipe, half, stage.trainable, can_record(module, device))
    run = _Run(step, trained, average, [])
    if checkpoint.exists() and not anew:
        saved, history = _read(checkpoint)
        # A checkpoint from before there was a history says too little to go on from.
        if int(saved["epoch"]) == len(history):
            run.restore(saved, history)
    return run


def _train_stage(
    module: nn.Module, stage: Stage, dataset: Dataset, path: Path, device: str, layout: torch.memory_format, anew: bool,
    progress: Progress, stop: Callable[[], bool],
) -> list[Epoch]:  # fmt: skip
    recipe, checkpoint = stage.recipe, checkpoint_path(path)
    run = _begin(module, stage, checkpoint, anew, device)
    images, labels = dataset.images.to(device), dataset.labels.to(device)
    saved_at, saved_epochs, operations = time.monotonic(), len(run.history), None
    for epoch in range(len(run.history), recipe.epochs):
        if stop():
            if epoch > saved_epochs:
                _write(checkpoint, run.state(), run.history)
            raise OutOfTimeError(f"training stopped after {epoch} of {recipe.epochs} epochs")
        started = time.monotonic()
        loss = _train_epoch(run, stage, images, labels, epoch, device, layout)
        speed = len(dataset) / (time.monotonic() - started)
        if operations is None and (time.monotonic() - started >= TELLING_SECONDS):
            operations = throughput.step_operations(module, recipe, dataset.image_shape, device, stage.trainable)
        run.history.append(Epoch(loss, *_own_and_strong(run, stage, images, labels, epoch)))
        progress(_line(run.history, recipe, speed, operations, device))
        # Writing after every short epoch would cost more than it saves.
        if epoch + 1 < recipe.epochs and time.monotonic() - saved_at >= CHECKPOINT_SECONDS:
            _write(checkpoint, run.state(), run.history)
            saved_at, saved_epochs = time.monotonic(), epoch + 1
    if run.average is not None:
        module.load_state_dict(run.average.module.state_dict())
    module.eval().requires_grad_(True)
    # A recorded step's gradients would keep its memory.
    run.step.optimiser.zero_grad(set_to_none=True)
    _write(path, module.state_dict(), run.history)
    checkpoint.unlink(missing_ok=True)
    return run.history


def _train_epoch(run: _Run, stage: Stage, images: Tensor, labels: Tensor, epoch: int, device: str, layout: torch.memory_format) -> float:
    """Train for one epoch and return its mean loss."""
    recipe, losses = stage.recipe, []
    steps = -(-len(images) // recipe.batch_size)
    for step, (indices, x, y) in enumerate(batches(images, labels, recipe, stage.seed, epoch, layout)):
        for group in run.step.optimiser.param_groups:
            group["lr"] = learning_rate(recipe, epoch * steps + step, recipe.epochs * steps)
        draw = noise.Draw(stage.seed, indices, epoch)
        with noise.isolated_generator(stage.seed * 1_000_003 + epoch * steps + step, device):
            try:
                losses.append(run.step(x, y, draw))
            except UserError as error:
                # Aggregators refuse logits that are not finite, before there is a loss.
                raise UserError(f"training failed in epoch {epoch + 1}: {error}; if it diverged, lower the learning rate") from error
        if run.average is not None:
            run.average.update_parameters(run.step.module)
    loss = float(torch.stack(losses).mean())
    if not math.isfinite(loss):
        raise UserError(f"training diverged in epoch {epoch + 1}: the loss is {loss}; lower the recipe's learning rate")
    return loss


def _own_and_strong(run: _Run, stage: Stage, images: Tensor, labels: Tensor, epoch: int) -> tuple[float, float] | tuple[()]:
    """Return what catastrophic overfitting shows in, of single-step training."""
    attack = stage.recipe.attack
    if attack is None or attack.steps != 1:
        return ()
    few = slice(overfitting.EXAMPLES)
    x = as_float(images[few])
    draw = noise.Draw(stage.seed, torch.arange(len(x), device=x.device), epoch)
    # What is kept in the end is the average.
    kept = run.step.module if run.average is None else run.average.module
    return overfitting.accuracies(kept, x, labels[few], attack, draw)


def _line(history: Sequence[Epoch], recipe: Recipe, speed: float, operations: float | None, device: str) -> str:
    """Return what progress is told of the last epoch."""
    last, fast = history[-1], f"{speed:.0f} images/s"
    if operations:
        fast = throughput.described(speed, operations, throughput.peak(device, precision(recipe, device)))
    line = f"epoch {len(history)}/{recipe.epochs}: loss {last.loss:.3f}, {fast}"
    return f"{line}; catastrophic overfitting: {last.own:.0%} withstand its own step, {last.strong:.0%} PGD" if last.overfitted else line


def freeze_but(module: nn.Module, trainable: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Let only the named parts learn and return the learning parameters by name."""
    prefixes = tuple(f"{name}." for name in trainable) or ("",)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _optimiser(recipe: Recipe, trained: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    if recipe.optimiser == "adam":
        return torch.optim.Adam(trained.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(trained.values(), lr=recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)


def _write(path: Path, tensors: dict[str, Tensor], history: Sequence[Epoch]) -> None:
    """Keep tensors, with what each epoch came to beside them."""
    told = {HISTORY: json.dumps([dataclasses.asdict(epoch) for epoch in history])}
    write_atomic(path, safetensors.torch.save(apart(tensors), told))


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU that share no memory, as those of tied weights do, which have two names."""
    held, found = set[int](), dict[str, Tensor]()
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        place = kept.untyped_storage().data_ptr()
        found[name] = kept.clone() if place in held else kept
        held.add(place)
    return found


def _read(path: Path) -> tuple[dict[str, Tensor], list[Epoch]]:
    """Read what `_write` kept."""
    try:
        with safetensors.safe_open(path, framework="pt") as kept:
            told = json.loads((kept.metadata() or {}).get(HISTORY, "[]"))
            return {name: kept.get_tensor(name) for name in kept.keys()}, [Epoch(**epoch) for epoch in told]  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, ValueError, TypeError) as error:
        raise UserError(f"weights file {path} is corrupt or unreadable ({error}); delete it to train again") from error
