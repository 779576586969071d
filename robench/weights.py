"""Trained weights that travel: a folder that holds one defense's weights and says what they are.

    model.safetensors    the state of the whole defense
    config.json          which defense it is, how it was trained, and the hashes that it is checked by
    README.md            the model card, and
    records/*.json       the records of exactly these weights; both only where weights are shared

They are found in the cache, where a pull puts them, and in a folder ``weights`` beside the file that registers the defense. They are
used only while the code still describes the same training and the same outputs.
"""

import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from robench import overfitting, training, zoo
from robench.data import Dataset
from robench.defense import Defense
from robench.errors import UserError
from robench.files import write_atomic
from robench.fingerprint import reference_logits, state_hash
from robench.parameters import Value
from robench.recipe import Precision, Stage, plain, summary

CONFIG, STATE, CARD, RECORDS, FOLDER = "config.json", "model.safetensors", "README.md", "records", "weights"

OWN = "trained-here"
"""An empty file in a defense's folder in the cache: it was trained anew here since the last pull, which is what is to be used."""

TOLERANCE = 1e-3
"""Of the reference logits, absolute and relative: machines differ by less, a changed stride or aggregation by more."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Config(BaseModel):
    """What weights are of.

    Attributes:
        defense: its full name with all parameters, and `version` its version.
        paper: its arXiv identifier, or an empty string.
        dataset: the data set's name; `classes` and `image_shape` (channels, height, width) are its.
        fingerprint: of the training split.
        scale: the scale, and `seed` the training seed.
        stages: the recipes, as the zoo gave them.
        training_version: the version of the training's own code.
        precision: what each stage was trained in.
        training: what a record says of the training, a line per stage.
        logits: of the training split's first two images, as `fingerprint.reference_logits` gives them.
        weights_sha256: `fingerprint.state_hash`, which records keep.
        file_sha256: of the file model.safetensors.
        source: where they were pulled from; empty where they were trained.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    schema_version: Literal[1] = 1
    defense: str
    version: int
    paper: str
    dataset: str
    classes: Annotated[int, Field(ge=1)]
    image_shape: tuple[int, int, int]
    fingerprint: Sha256
    scale: zoo.Scale
    seed: Annotated[int, Field(ge=0)]
    stages: list[dict[str, Any]]
    training_version: int
    precision: list[Precision]
    training: dict[str, Value]
    logits: list[list[float]]
    weights_sha256: Sha256
    file_sha256: Sha256
    source: str = ""

    @property
    def setting(self) -> zoo.Setting:
        """What the defense was built for."""
        return zoo.Setting(self.dataset, self.classes, self.image_shape, self.scale, self.seed)


@dataclass(frozen=True)
class Trained:
    """A defense with its trained weights, in evaluation mode on the CPU, the stages that trained it, and what is known of both."""

    defense: Defense
    stages: tuple[Stage, ...]
    config: Config

    @property
    def source(self) -> str:
        """Where the weights come from."""
        return self.config.source or "the zoo"


class MisfitError(UserError):
    """Weights that are whole, but of a defense, recipe or data set that the code does not have."""


def describe(
    named: zoo.Named, setting: zoo.Setting, defense: Defense, stages: Sequence[Stage], split: Dataset, *,
    precision: Sequence[Precision], how: dict[str, Value], source: str = "",
) -> tuple[Config, bytes]:  # fmt: skip
    """Return what describes a trained defense, and its weights as the bytes of a safetensors file.

    Args:
        named: the defense's name.
        setting: what it was built for.
        defense: trained.
        stages: that trained it.
        split: the training split.
        precision: what each stage was trained in.
        how: it was trained, a line per stage.
        source: where the weights were pulled from, if they were.
    """
    content = safetensors.torch.save(training.apart(defense.state_dict()))
    return Config(
        defense=named.text, version=named.entry.version, paper=named.entry.paper.arxiv, dataset=setting.dataset, classes=setting.classes,
        image_shape=setting.image_shape, fingerprint=split.fingerprint, scale=setting.scale, seed=setting.seed,
        stages=_plain(stages), training_version=training.VERSION, precision=list(precision),
        training=how, logits=reference_logits(defense, split).tolist(),
        weights_sha256=state_hash(defense), file_sha256=hashlib.sha256(content).hexdigest(), source=source,
    ), content  # fmt: skip


def kept(
    named: zoo.Named, setting: zoo.Setting, split: Dataset, *, cache: Path, device: str, ready_made: bool = True,
    progress: Callable[[str], None] = lambda _line: None,
) -> tuple[Config, bytes]:  # fmt: skip
    """Return what `describe` does of a defense whose weights were pulled or come with the zoo, or that was trained here before.

    Raises:
        UserError: if there are no such weights, or the defense is not trained at all.
    """
    found = find(named, setting, split, cache=cache, progress=progress) if ready_made else None
    if found is not None:
        trained_in, how, source = found.config.precision, found.config.training, found.config.source
        return describe(named, setting, found.defense, found.stages, split, precision=trained_in, how=how, source=source)
    specimen = named.build(setting)
    if not specimen.stages:
        raise UserError(f"{named.text} is not trained, so there are no weights to share")
    try:
        history = training.train(
            specimen.defense, specimen.stages, split, folder=cache / "training", version=named.trained_as, device=device,
            may_train=False, progress=progress,
        )  # fmt: skip
    except training.NotTrainedError:
        command = f"robench train {named.text} --dataset {setting.dataset} --scale {setting.scale} --seed {setting.seed}"
        raise UserError(f"{named.text} is not trained yet for {device}; run: {command} --device {device}") from None
    precision = [training.precision(stage.recipe, device) for stage in specimen.stages]
    how = summary(specimen.stages, precision) | overfitting.report(history)
    return describe(named, setting, specimen.defense, specimen.stages, split, precision=precision, how=how)


def save(folder: Path, config: Config, content: bytes) -> None:
    """Write weights into a folder, what describes them last, so that an interrupted write is never taken for weights."""
    (folder / CONFIG).unlink(missing_ok=True)
    write_atomic(folder / STATE, content)
    write_atomic(folder / CONFIG, to_json(config))
    (folder / OWN).unlink(missing_ok=True)


def prefer_own(named: zoo.Named, setting: zoo.Setting, *, cache: Path) -> None:
    """Let `find` pass over whatever weights of a defense were pulled or come with the zoo, until the next pull of it.

    Raises:
        UserError: if the cache cannot be written.
    """
    write_atomic(_pulled(named, setting, cache) / OWN, "")


def _pulled(named: zoo.Named, setting: zoo.Setting, cache: Path) -> Path:
    return cache / FOLDER / folder_name(named.text, setting.dataset, setting.scale, setting.seed)


def to_json(config: Config) -> str:
    """Return the text of config.json."""
    return json.dumps(config.model_dump(mode="json"), indent=1) + "\n"


def folder_name(defense: str, dataset: str, scale: str, seed: int) -> str:
    """Return the folder name of a defense's weights, in characters that every file system takes; the digest tells names apart."""
    readable = re.sub(r"[^A-Za-z0-9.,=+-]+", "-", f"{dataset}_{defense}".replace("_", "-"))[:60]
    digest = hashlib.sha256(json.dumps([defense, dataset, scale, seed]).encode()).hexdigest()[:8]
    return f"{readable}_{scale}_s{seed}_{digest}"


def find(
    named: zoo.Named, setting: zoo.Setting, split: Dataset, *, cache: Path, progress: Callable[[str], None] = lambda _line: None
) -> Trained | None:
    """Return a defense with weights that were pulled or that come with the zoo, or None; None too where `prefer_own` said so.

    Weights that the code no longer describes are passed over, and `progress` is told why.

    Args:
        named: the defense.
        setting: what it is built for.
        split: the training split.
        cache: the cache folder.
        progress: is told which weights are taken or passed over.

    Raises:
        UserError: for weights that are corrupt.
    """
    pulled = _pulled(named, setting, cache)
    if (pulled / OWN).exists():
        return None
    beside = Path(inspect.getsourcefile(named.entry.factory) or ".").parent
    for folder in (pulled, beside / FOLDER / pulled.name):
        if not (folder / CONFIG).exists():
            continue
        try:
            found = load(folder, split)
            if (found.config.defense, found.config.setting) != (named.text, setting):
                raise MisfitError(f"the weights in {folder} are of {found.config.defense} in another setting")
        except MisfitError as error:
            progress(f"{error}; they are not used")
            continue
        progress(f"weights from {found.source}")
        return found
    return None


def load(folder: Path, split: Dataset | None) -> Trained:
    """Return the defense whose weights a folder holds.

    Args:
        folder: with model.safetensors and config.json.
        split: the training split; None, where it is absent, leaves out the checks that need it.

    Raises:
        UserError: if a file is missing, corrupt or of another content than its hash, or the zoo has no such defense.
        MisfitError: if the defense, its recipe, its outputs or the data are not those of the weights.
    """
    config = read_config(folder / CONFIG)
    state = _read_state(folder / STATE, config)
    named = zoo.parse(config.defense)
    specimen = named.build(config.setting)
    if (problem := _difference(config, named, specimen, split, state)) is not None:
        raise MisfitError(f"the weights in {folder} are of {config.defense} {problem}")
    defense = specimen.defense
    defense.load_state_dict(state)
    defense.eval()
    if state_hash(defense) != config.weights_sha256:
        raise UserError(f"{folder / STATE} does not have the weights that {CONFIG} names (SHA-256 {config.weights_sha256}); get them anew")
    if split is not None:
        stated, logits = torch.tensor(config.logits, dtype=torch.float64), reference_logits(defense, split)
        if stated.shape != logits.shape or not torch.allclose(stated, logits, rtol=TOLERANCE, atol=TOLERANCE):
            raise MisfitError(f"the weights in {folder} are of {config.defense} with other outputs than it gives here")
    return Trained(defense, specimen.stages, config)


def read_config(path: Path) -> Config:
    """Read and check a config.json.

    Raises:
        UserError: if it cannot be read or is no such file.
    """
    try:
        return Config.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"there are no weights in {path.parent}: cannot read {path.name} ({error.strerror or error})") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise UserError(f"{path} does not describe weights: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _read_state(path: Path, config: Config) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if (found := hashlib.sha256(content).hexdigest()) != config.file_sha256:
        raise UserError(f"{path} is corrupt: its SHA-256 is {found}, and {CONFIG} says {config.file_sha256}; get it anew")
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is no safetensors file ({error})") from error


def _difference(config: Config, named: zoo.Named, specimen: zoo.Specimen, split: Dataset | None, state: dict[str, Tensor]) -> str | None:
    """Return what tells the code's defense from the one that the weights are of, or None."""
    if config.defense != named.text:
        return f"which is called {named.text} here"
    if config.version != named.entry.version:
        return f"in version {config.version}, and the version here is {named.entry.version}"
    if config.training_version != training.VERSION or config.stages != _plain(specimen.stages):
        return "trained by another recipe than it has here"
    if split is not None and config.fingerprint != split.fingerprint:
        return f"trained on other images than {config.dataset} has here"
    if _shapes(state) != _shapes(specimen.defense.state_dict()):
        return "with other layers than it has here"
    return None


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def _plain(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Return stages as JSON holds them."""
    made: list[dict[str, Any]] = json.loads(json.dumps([dataclasses.asdict(stage) | {"recipe": plain(stage.recipe)} for stage in stages]))
    return made
