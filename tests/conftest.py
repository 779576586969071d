"""Fixtures that several test files share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robench import data, noise, plugins, zoo
from robench.data import as_float
from robench.estimate import Estimate
from robench.record import Proportion, Record
from tests.fake_hub import TOKEN, FakeHub


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes`; a mapping changes the mapping it meets key by key."""
    merged = dict(base)
    for key, change in changes.items():
        both_map = isinstance(base.get(key), dict) and isinstance(change, Mapping)
        merged[key] = _merged(base[key], change) if both_map else change
    return merged


@pytest.fixture(autouse=True)
def without_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all but a GPU's own tests run on the CPU wherever there is one: the numbers they know are its."""
    if request.path.name != "test_cuda.py":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


CONTROLS = [f"{budget}: {reading} accuracy" for budget in ("tiny budget", "unbounded") for reading in ("robust", "clean")]


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
            "controls": dict(zip(CONTROLS, (0.9, 0.9, 0.0, 0.9), strict=True)) if random else {},
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


def _fitted(features: Tensor, labels: Tensor) -> nn.Linear:
    """Return the linear layer of least squared error (ridge) from features (N, F) to ten classes, its logits of a few units."""
    inputs = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    targets = functional.one_hot(labels, 10).double()
    weights = torch.linalg.solve(inputs.T @ inputs + 10 * torch.eye(inputs.shape[1], dtype=torch.float64), inputs.T @ targets)
    layer = nn.Linear(features.shape[1], 10)
    with torch.no_grad():
        layer.weight.copy_(8 * weights[:-1].T)
        layer.bias.copy_(8 * weights[-1])
    return layer


@pytest.fixture(scope="session")
def linear_network() -> nn.Module:
    """A linear classifier of the digits in closed form; its parameters take no gradient."""
    split = data.load("digits", "train")
    return nn.Sequential(nn.Flatten(), _fitted(as_float(split.images).flatten(1), split.labels)).requires_grad_(False).eval()


@pytest.fixture(scope="session")
def networks() -> list[nn.Module]:
    """Three classifiers of the digits of two layers, the first random and the second in closed form, without robustness."""
    split = data.load("digits", "train")
    x = as_float(split.images).flatten(1)
    made: list[nn.Module] = []
    for seed in range(3):
        with noise.isolated_generator(seed), torch.no_grad():
            first = nn.Linear(x.shape[1], 300)
            last = _fitted(functional.relu(first(x)), split.labels)
        made.append(nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).requires_grad_(False).eval())
    return made


@pytest.fixture(scope="session")
def running_hub() -> Iterator[FakeHub]:
    """A hub of this machine, one for the session."""
    hub = FakeHub()
    server = hub.start()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(running_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    """The hub, empty, as the one that huggingface_hub speaks to, by plain HTTP."""
    from huggingface_hub import constants

    for kept in (running_hub.repositories, running_hub.private, running_hub.requests, running_hub.large):
        kept.clear()
    monkeypatch.setenv("HF_ENDPOINT", running_hub.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    # The library reads this when it is imported.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return running_hub


TINY = '''
from torch import nn
from robench.aggregate import mean_of_logits
from robench.defense import Ensemble
from robench.recipe import Recipe, Stage
from robench.zoo import Paper, Specimen, register

PAPER = Paper("A tiny paper", "1234.56789", "@misc{tiny, title = {A tiny paper}}", "tiny")


@register(paper=PAPER, version=1)
def tiny(setting, *, k: int = 2):
    """Linear networks, trained for one epoch."""
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(768, setting.classes, bias=True)) for _ in range(k)]
    recipe = Recipe(epochs=1, learning_rate=0.05, augmentation="none")
    return Specimen(Ensemble(networks, mean_of_logits), (Stage(recipe, setting.seed),))
'''


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Register the defense `tiny` by a plugin file; a call registers it anew, with a text of the file replaced by another."""
    path = tmp_path / "plugin" / "tiny.py"
    path.parent.mkdir()

    def again(*change: str) -> None:
        zoo.entries()
        zoo._ENTRIES.pop("tiny", None)
        path.write_text(TINY.replace(*change) if change else TINY)
        plugins.import_file(path)

    again()
    yield again
    zoo._ENTRIES.pop("tiny", None)
