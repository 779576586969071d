"""What is evaluated: a defense with its name, version and origin, found by a TARGET text or given as a module."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from robench import data, fingerprint, overfitting, recipe, sources, training, weights, zoo
from robench.data import Dataset
from robench.defense import Defense, as_defense
from robench.errors import UserError
from robench.files import cache_folder
from robench.parameters import Value
from robench.threat import ThreatModel

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """A defense ready for evaluation, and what a record says of it.

    Attributes:
        defense: in evaluation mode.
        name: its full name with parameters.
        version: the defense's version; 0 where none is kept.
        origin: ``zoo``, ``robustbench``, ``timm``, ``file`` or ``module``.
        paper: its arXiv identifier, or an empty string.
        training_seed: which independently trained copy.
        training: the recipes it was trained by, the precision, and where its weights came from if they were not trained here; None
            where that is not known.
    """

    defense: Defense
    name: str
    version: int = 0
    origin: str = "module"
    paper: str = ""
    training_seed: int = 0
    training: dict[str, Value] | None = None


def of_module(module: nn.Module, name: str | None = None) -> Target:
    """Return a module of one's own as a target, named after its class unless a name is given."""
    return Target(as_defense(module).eval(), name or type(module).__name__)


def resolve(
    text: str,
    dataset: Dataset,
    threat: ThreatModel,
    *,
    scale: zoo.Scale,
    seed: int = 0,
    device: str = "cpu",
    cache: Path | None = None,
    progress: Progress = lambda _line: None,
) -> Target:
    """Return the target that `text` names, training a defense of the zoo that has no trained weights yet.

    Args:
        text: a name of the zoo with parameters (``robust_average,k=8,eps=0.22``), ``robustbench:NAME``, ``timm:NAME``, or
            ``path/to/file.py:factory``.
        dataset: what it is evaluated on; the zoo trains on its training split.
        threat: the threat model; robustbench keeps its models by norm.
        scale: the scale of a defense of the zoo.
        seed: the training seed of a defense of the zoo.
        device: where it is trained.
        cache: the cache folder.
        progress: is told each line of training.

    Raises:
        UserError: if there is no such target, or it cannot be loaded.
    """
    source, _, rest = text.partition(":")
    if source in ("robustbench", "timm") and rest:
        load = sources.from_robustbench if source == "robustbench" else sources.from_timm
        module = load(rest, dataset, threat, cache_folder(cache))
        return Target(as_defense(module).eval(), text, origin=source)
    if text.endswith(".py"):
        raise UserError(f"{text} names no factory; write {text}:FUNCTION, a function that returns the model")
    if ".py:" in text:
        return Target(as_defense(sources.from_file(text)).eval(), Path(text).name, origin="file")
    return trained(zoo.parse(text), dataset, scale=scale, seed=seed, device=device, cache=cache, progress=progress)


def setting_for(dataset: Dataset, scale: zoo.Scale, seed: int) -> zoo.Setting:
    """Return the setting in which the zoo builds its defenses for a data set."""
    return zoo.Setting(dataset.name, len(dataset.classes), dataset.image_shape, scale, seed)


def trained(
    named: zoo.Named,
    dataset: Dataset,
    *,
    scale: zoo.Scale,
    seed: int = 0,
    device: str = "cpu",
    cache: Path | None = None,
    ready_made: bool = True,
    anew: bool = False,
    progress: Progress = lambda _line: None,
    stop: Callable[[], bool] = lambda: False,
) -> Target:
    """Return a defense of the zoo with weights that were pulled or come with the zoo, else trained on the training split of `dataset`.

    See `resolve`; `ready_made` False trains, unless it was trained here before, whatever other weights there are, and `anew` trains in
    any case, after which that is used until weights are pulled. `stop` may end the training with OutOfTimeError, as `training.train` says.
    """
    setting, entry = setting_for(dataset, scale, seed), named.entry
    specimen = named.build(setting)
    defense, stages, summary = specimen.defense, specimen.stages, dict[str, Value]()
    if stages:
        split, folder = data.load(dataset.name, "train"), cache_folder(cache)
        found = weights.find(named, setting, split, cache=folder, progress=progress) if ready_made and not anew else None
        if found is not None:
            defense, summary = found.defense, found.config.training | {"weights": f"from {found.source}"}
            for stage in stages:
                training.place(defense.get_submodule(stage.module), device)
        else:
            check_classes(Target(defense, named.text), tuple(fingerprint.reference_logits(defense, split).shape), split)
            history = training.train(
                defense, stages, split, folder=folder / "training", version=named.trained_as, device=device, anew=anew, progress=progress,
                stop=stop,
            )  # fmt: skip
            if anew:
                # Else the next evaluation would take the weights that were not wanted.
                weights.prefer_own(named, setting, cache=folder)
            summary = recipe.summary(stages, [training.precision(stage.recipe, device) for stage in stages])
            summary |= overfitting.report(history)
    return Target(defense.eval(), named.text, entry.version, "zoo", entry.paper.arxiv, seed, summary)


def check_settled(target: Target, state: str) -> None:
    """Make sure that a defense in evaluation mode is in it throughout, and that its weights and buffers are what they were.

    Args:
        target: what is attacked.
        state: `fingerprint.state_hash` of its defense before.

    Raises:
        UserError: if a module stays in training mode, where answers depend on the batch, or anything changed.
    """
    if stuck := [name or type(module).__name__ for name, module in target.defense.named_modules() if module.training]:
        raise UserError(f"{target.name} stays in training mode after eval() ({stuck[0]}), where its answers may depend on the batch")
    if fingerprint.state_hash(target.defense) != state:
        raise UserError(f"{target.name} changes its weights or buffers while it is attacked, so no two answers are of the same model")


def check_classes(target: Target, logits_shape: tuple[int, ...], dataset: Dataset) -> None:
    """Make sure that logits (B, classes) fit the data set.

    Raises:
        UserError: if they do not.
    """
    if len(logits_shape) != 2 or logits_shape[1] != len(dataset.classes):
        raise UserError(
            f"{target.name} returns outputs of shape {logits_shape}; {dataset.name} needs logits of shape (batch, {len(dataset.classes)})"
        )
