"""What is still to be trained of a defense of the zoo: its unfinished stages, and how much work each is."""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn

from robench import training, weights, zoo
from robench.data import Dataset
from robench.defense import as_defense
from robench.errors import UserError
from robench.recipe import Recipe


@dataclass(frozen=True)
class Unfinished:
    """A stage of training that is not in the cache.

    Attributes:
        key: the same for two defenses exactly where they share the stage.
        epochs: still to train, those of a checkpoint left out.
        passes: image passes through one member, forwards and backwards, that they take.
    """

    key: str
    epochs: int
    passes: float


def remaining(named: zoo.Named, setting: zoo.Setting, split: Dataset, *, cache: Path, device: str = "cpu") -> tuple[Unfinished, ...]:
    """Return the stages that training a defense here would still train, in order; none where there are ready-made weights.

    Args:
        named: the defense.
        setting: what it is built for.
        split: the training split.
        cache: the cache folder.
        device: where it would be trained.
    """
    specimen = named.build(setting)
    if not specimen.stages or weights.find(named, setting, split, cache=cache) is not None:
        return ()
    left: list[Unfinished] = []
    untrained: list[tuple[str, str]] = []
    for stage in specimen.stages:
        module = specimen.defense.get_submodule(stage.module)
        path = training.stage_path(module, stage, split, cache / "training", device, named.trained_as)
        # What starts from weights that are still to be trained has a name in the cache that nobody knows yet.
        if before := [key for name, key in untrained if _overlap(name, stage.module)]:
            key, epochs = "+".join([*before, path.stem]), stage.recipe.epochs
        elif path.exists():
            module.load_state_dict(safetensors.torch.load_file(path))
            continue
        else:
            key, epochs = path.stem, stage.recipe.epochs - _epochs_kept(training.checkpoint_path(path))
        untrained.append((stage.module, key))
        left.append(Unfinished(key, epochs, epochs * len(split) * passes_per_image(stage.recipe) * _members(module)))
    return tuple(left)


def passes_per_image(recipe: Recipe) -> float:
    """Return the passes, forwards and backwards, that one epoch takes for each image: each attack step two, the update two or four."""
    if recipe.attack is None:
        return 2
    return 2 * recipe.attack.steps + (4 if recipe.clean_weight > 0 or recipe.trades > 0 else 2)


def _overlap(one: str, other: str) -> bool:
    """Say whether a dotted path lies within the other, or they are the same; the empty path is the whole defense."""
    first, second = sorted((f"{one}." if one else "", f"{other}." if other else ""), key=len)
    return second.startswith(first)


def _members(module: nn.Module) -> int:
    return len(as_defense(module).members())


def _epochs_kept(checkpoint: Path) -> int:
    """Return the epochs that training would go on from: none where a checkpoint has no history of them, which it ignores."""
    try:
        with safetensors.safe_open(checkpoint, framework="pt") as saved:
            epochs, history = int(saved.get_tensor("epoch")), json.loads((saved.metadata() or {}).get(training.HISTORY, "[]"))
    except FileNotFoundError:
        return 0
    except (OSError, safetensors.SafetensorError, ValueError, TypeError) as error:
        raise UserError(f"weights file {checkpoint} is corrupt or unreadable ({error}); delete it to train again") from error
    return epochs if len(history) == epochs else 0
