"""Models from elsewhere as plain modules, images in [0, 1] to logits: robustbench, timm, and a file of one's own."""

import contextlib
import importlib.util
import inspect
import pickle
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robench import plugins
from robench.data import Dataset
from robench.errors import UserError, nearest
from robench.noise import isolated_generator
from robench.threat import NORMS, ThreatModel


def from_robustbench(name: str, dataset: Dataset, threat: ThreatModel, cache: Path) -> nn.Module:
    """Return a model of robustbench's zoo, in evaluation mode.

    Its checkpoint is downloaded to ``<cache>/robustbench/<dataset>/<norm>/<name>.pt`` unless it is there.

    Args:
        name: the model's name there, ``Wong2020Fast``.
        dataset: ``cifar10``, ``cifar100`` or ``imagenet``, by its name.
        threat: of the norm that the model was trained for.
        cache: the cache folder.

    Raises:
        UserError: if robustbench is not installed, has no such model, or cannot get or read its checkpoint.
    """
    # robustbench and gdown print to stdout, which belongs to the results.
    with _quiet(), contextlib.redirect_stdout(sys.stderr):
        models, load_model = _import_robustbench()
        available = {(d.value, t.value): named for d, norms in models.items() for t, named in norms.items() if t.value in NORMS}
        known = available.get((dataset.name, threat.norm))
        if known is None:
            have = ", ".join(" ".join(key) for key in available)
            raise UserError(f"robustbench has no models for {dataset.name} and {threat.norm}; it has {have}")
        if name not in known:
            raise UserError(f"robustbench has no model {name!r} for {dataset.name} and {threat.norm}{nearest(name, known)}")
        folder = cache / "robustbench"
        try:
            model: nn.Module = load_model(name, model_dir=folder, dataset=dataset.name, threat_model=threat.norm)
        except Exception as error:  # downloading, unpickling and strangers' constructors fail in many ways
            paths = _checkpoints(name, known[name]["gdrive_id"], folder / dataset.name / threat.norm)
            raise UserError(_checkpoint_problem(name, paths, error)) from error
    return model.eval()


def _import_robustbench() -> tuple[Any, Any]:
    """Return robustbench's models by data set and norm, and its `load_model`."""
    try:
        with _quiet(), _autoattack_alias():
            from robustbench.model_zoo import model_dicts
            from robustbench.utils import load_model
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "robustbench":
            raise UserError("robustbench is not installed; get it with: pip install robench[robustbench]") from error
        reason = f"robustbench cannot be imported ({_line(error)})"
        raise UserError(f"{reason}; install what it needs with: pip install robench[robustbench]") from error
    return model_dicts, load_model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings: robustbench and the timm it needs warn of their own age when they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _autoattack_alias() -> Iterator[None]:
    """Let robustbench 1.1.1 import `autoattack`, which its own dependency provides under the name `pyautoattack`."""
    if importlib.util.find_spec("autoattack") is not None:
        yield
        return
    import pyautoattack

    sys.modules["autoattack"] = pyautoattack
    try:
        yield
    finally:
        for alias in [m for m in sys.modules if m.partition(".")[0] == "autoattack"]:
            del sys.modules[alias]


def _checkpoints(name: str, drive: str | list[str] | None, folder: Path) -> list[Path]:
    """Return where `load_model` looks for checkpoints: one file, one for each member of an ensemble, or torch's own folder."""
    if drive is None:
        return [Path(torch.hub.get_dir()) / "checkpoints"]
    return [folder / f"{name}.pt"] if isinstance(drive, str) else [folder / f"{name}.pt_m{i}.pt" for i in range(len(drive))]


def _checkpoint_problem(name: str, paths: list[Path], error: Exception) -> str:
    """Return one line on why a model was not loaded, and where its checkpoint belongs."""
    for path in filter(Path.is_file, paths):
        with path.open("rb") as file:
            # Google Drive answers with a page where it refuses a download.
            if file.read(64).lstrip().startswith(b"<"):
                return f"{path} is a web page, not the checkpoint of robustbench's {name}; replace it by hand"
    # torch's own words advise to load the file without its safeguard.
    reason = "a checkpoint is damaged or holds more than tensors" if isinstance(error, pickle.UnpicklingError) else _line(error)
    return f"robustbench cannot load {name} ({reason}); its checkpoint can be placed by hand at {', '.join(map(str, paths))}"


class _Preprocessed(nn.Module):
    """A network behind its own preprocessing: images in [0, 1] of any size are resized and normalised."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.size: tuple[int, int] = tuple(config["input_size"][-2:])
        self.interpolation: str = config["interpolation"]
        self.register_buffer("mean", torch.tensor(config["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(config["std"])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self.size:
            x = functional.interpolate(x, self.size, mode=self.interpolation, antialias=True)
        logits: Tensor = self.network((x - self.mean) / self.std)
        return logits


def from_timm(name: str, _dataset: Dataset, _threat: ThreatModel, _cache: Path) -> nn.Module:
    """Return a pretrained model of timm, in evaluation mode, behind the resizing and normalisation it was trained with.

    timm keeps the weights in its own cache.

    Args:
        name: the model's name there, ``resnet18.a1_in1k``.

    Raises:
        UserError: if timm has no such model, or cannot get its weights.
    """
    with _quiet():
        import timm
        from timm.data import resolve_model_data_config

    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}{nearest(name, timm.list_models() + timm.list_models(pretrained=True))}")
    try:
        network = timm.create_model(name, pretrained=True)
    except Exception as error:  # every hub fails in its own way
        raise UserError(f"timm cannot load {name} ({_line(error)})") from error
    return _Preprocessed(network, resolve_model_data_config(network)).eval()


def from_file(text: str) -> nn.Module:
    """Return what a factory in a Python file makes; torch's generators are seeded for it, and restored after it.

    Args:
        text: ``path/to/file.py:factory``; the factory takes no arguments and returns an `nn.Module`.

    Raises:
        UserError: if there is no such file or factory, the file or the factory fails, or it returns something else.
    """
    location, _, name = text.rpartition(":")
    path = Path(location)
    if not path.is_file():
        raise UserError(f"{text}: there is no file {path}")
    try:
        module = plugins.import_file(path)
    except (Exception, SystemExit) as error:  # a stranger's code may fail in any way
        raise UserError(f"{path} cannot be imported ({_line(error)})") from error
    if not hasattr(module, name):
        functions = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
        raise UserError(f"{path} has no {name!r}; it has {', '.join(functions) or 'no functions'}{nearest(name, functions)}")
    factory = getattr(module, name)
    if not callable(factory) or isinstance(factory, nn.Module):
        raise UserError(f"{text} is of type {type(factory).__name__}, not a function that returns an nn.Module")
    try:
        # Weights that the factory does not load are then the same in every run.
        with isolated_generator(0):
            made = factory()
    except (Exception, SystemExit) as error:
        raise UserError(f"{text} failed ({_line(error)})") from error
    if not isinstance(made, nn.Module):
        raise UserError(f"{text} returned an object of type {type(made).__name__}, not an nn.Module")
    return made


def _line(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0].removesuffix(":")
