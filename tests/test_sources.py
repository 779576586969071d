"""Models from robustbench, timm and files: loaded as upstream has them, and every failure is one clear line."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robench import data, sources
from robench.data import Dataset
from robench.errors import UserError
from robench.threat import ThreatModel

LINF = ThreatModel.parse("Linf:8/255")
ROBUSTBENCH = "Wong2020Fast"

needs_robustbench = pytest.mark.skipif(importlib.util.find_spec("robustbench") is None, reason="robustbench is not installed")


@pytest.fixture(scope="module")
def cifar10() -> Dataset:
    """Digits of CIFAR-10's size under its name: enough for everything but the accuracy."""
    digits = data.load("digits", "test").first(4)
    return replace(digits, name="cifar10", images=digits.images.repeat_interleave(2, 2).repeat_interleave(2, 3))


def reason(call: Callable[[], object]) -> str:
    """Return the one line of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# --- robustbench


@pytest.fixture
def architecture() -> nn.Module:
    """Robustbench's own network for one of its names, with random weights and statistics."""
    models, _ = sources._import_robustbench()
    of_name = {d.value: {t.value: named for t, named in norms.items()} for d, norms in models.items()}
    network: nn.Module = of_name["cifar10"]["Linf"][ROBUSTBENCH]["model"]().eval()
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return network


@needs_robustbench
def test_a_checkpoint_on_disk_gives_the_architectures_logits(
    architecture: nn.Module, cifar10: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "robustbench" / "cifar10" / "Linf" / f"{ROBUSTBENCH}.pt"
    path.parent.mkdir(parents=True)
    torch.save(architecture.state_dict(), path)
    loaded = sources.from_robustbench(ROBUSTBENCH, cifar10, LINF, tmp_path)
    x = data.as_float(cifar10.images)
    assert torch.equal(loaded(x), architecture(x))
    assert not loaded.training
    assert not [name for name in sys.modules if name.partition(".")[0] == "autoattack"]
    assert capsys.readouterr().out == ""


@needs_robustbench
def test_an_unknown_model_names_the_nearest(cifar10: Dataset, tmp_path: Path) -> None:
    assert f"did you mean '{ROBUSTBENCH}'" in reason(lambda: sources.from_robustbench("Wong2020Fst", cifar10, LINF, tmp_path))


@needs_robustbench
@pytest.mark.parametrize(("name", "threat"), [("digits", "Linf:8/255"), ("cifar10", "L1:12"), ("cifar100", "L2:0.5")])
def test_no_models_for_a_data_set_or_norm(cifar10: Dataset, tmp_path: Path, name: str, threat: str) -> None:
    other, within = replace(cifar10, name=name), ThreatModel.parse(threat)
    message = reason(lambda: sources.from_robustbench(ROBUSTBENCH, other, within, tmp_path))
    assert f"no models for {name} and {within.norm}; it has cifar10 Linf, cifar10 L2" in message


@needs_robustbench
@pytest.mark.parametrize(
    ("name", "files"),
    [(ROBUSTBENCH, [f"{ROBUSTBENCH}.pt"]), ("Chen2020Adversarial", [f"Chen2020Adversarial.pt_m{i}.pt" for i in range(3)])],
)
def test_a_failed_download_says_where_the_checkpoint_belongs(
    cifar10: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: list[str]
) -> None:
    _, load_model = sources._import_robustbench()

    def offline(*_: object) -> None:
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(sys.modules[load_model.__module__], "download_gdrive_new", offline)
    message = reason(lambda: sources.from_robustbench(name, cifar10, LINF, tmp_path))
    assert "ConnectionError: no network)" in message
    folder = tmp_path / "robustbench" / "cifar10" / "Linf"
    assert message.endswith("placed by hand at " + ", ".join(str(folder / file) for file in files))


@needs_robustbench
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<!DOCTYPE html><html>quota exceeded</html>", "is a web page, not the checkpoint"),
        (b"nothing of the kind", "damaged"),
        (b"", "placed by hand at"),
    ],
)
def test_what_is_no_checkpoint_is_named(cifar10: Dataset, tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "robustbench" / "cifar10" / "Linf" / f"{ROBUSTBENCH}.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    message = reason(lambda: sources.from_robustbench(ROBUSTBENCH, cifar10, LINF, tmp_path))
    assert expected in message
    assert str(path) in message
    assert "weights_only" not in message


@needs_robustbench
def test_a_checkpoint_of_another_network_is_named(cifar10: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "robustbench" / "cifar10" / "Linf" / f"{ROBUSTBENCH}.pt"
    path.parent.mkdir(parents=True)
    torch.save(nn.Linear(2, 2).state_dict(), path)
    message = reason(lambda: sources.from_robustbench(ROBUSTBENCH, cifar10, LINF, tmp_path))
    assert "Error(s) in loading state_dict" in message
    assert str(path) in message


def test_robustbench_not_installed_says_how_to_get_it(cifar10: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "robustbench"]:
        monkeypatch.delitem(sys.modules, name)

    class Blocker:
        """Finds nothing under the name robustbench, as where it is not installed."""

        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name.partition(".")[0] == "robustbench":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Blocker, *sys.meta_path])
    message = reason(lambda: sources.from_robustbench(ROBUSTBENCH, cifar10, LINF, tmp_path))
    assert message.endswith("pip install robench[robustbench]")
    assert "autoattack" not in sys.modules


@needs_robustbench
def test_upstream_still_needs_the_alias() -> None:
    command = [sys.executable, "-W", "ignore", "-c", "import robustbench"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "No module named 'autoattack'" in done.stderr, "robustbench imports without help now: delete the alias in sources.py"


# --- timm


@pytest.fixture
def timm_without_weights(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let timm make networks without downloading their weights; the calls are kept."""
    with sources._quiet():
        import timm

    create_model, calls = timm.create_model, []

    def create(name: str, **settings: Any) -> nn.Module:
        calls.append(settings)
        network: nn.Module = create_model(name, **(settings | {"pretrained": False}))
        return network

    monkeypatch.setattr(timm, "create_model", create)
    return calls


def test_a_timm_model_resizes_and_normalises_inside(cifar10: Dataset, tmp_path: Path, timm_without_weights: list[dict[str, Any]]) -> None:
    model = sources.from_timm("test_efficientnet.r160_in1k", cifar10, LINF, tmp_path)
    assert timm_without_weights == [{"pretrained": True}]
    assert not model.training
    x = data.as_float(cifar10.images)
    resized = functional.interpolate(x, (160, 160), mode="bicubic", antialias=True)
    # What timm says of that model: 160 x 160 pixels, bicubic, ImageNet's mean and deviation.
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    network = model.get_submodule("network")
    assert torch.equal(model(x), network((resized - mean) / deviation))
    assert model(x).shape == (4, 1000)
    at_size: Tensor = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(at_size), network((at_size - mean) / deviation))


def test_an_unknown_timm_model_names_the_nearest(cifar10: Dataset, tmp_path: Path) -> None:
    assert "did you mean 'resnet18'" in reason(lambda: sources.from_timm("resnet_18", cifar10, LINF, tmp_path))


def test_timm_weights_that_cannot_be_had_are_one_line(cifar10: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sources._quiet():
        import timm

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network\nsecond line")

    monkeypatch.setattr(timm, "create_model", offline)
    assert "OSError: no network" in reason(lambda: sources.from_timm("resnet18", cifar10, LINF, tmp_path))


# --- files

FACTORIES = """
import sys
import torch
from torch import nn

def linear():
    return nn.Linear(3, 2)

def fails():
    raise RuntimeError("no weights\\nsecond line")

def leaves():
    sys.exit(3)

def number():
    return 7

def with_argument(setting):
    return nn.Identity()

CONSTANT = 3
MODULE = nn.Identity()
"""


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    path = tmp_path / "factories.py"
    path.write_text(FACTORIES)
    return path


def test_a_files_factory_makes_the_module_the_same_every_time_and_leaves_torchs_generator_alone(factories: Path) -> None:
    before = torch.random.get_rng_state()
    first, again = (sources.from_file(f"{factories}:linear") for _ in range(2))
    assert isinstance(first, nn.Linear)
    assert torch.equal(first.weight, again.get_parameter("weight"))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linaer", "has no 'linaer'; it has linear, fails, leaves, number, with_argument (did you mean 'linear' or 'number'?)"),
        ("", "has no ''"),
        ("CONSTANT", "CONSTANT is of type int, not a function that returns an nn.Module"),
        ("MODULE", "MODULE is of type Identity, not a function"),
        ("fails", "failed (RuntimeError: no weights)"),
        ("leaves", "failed (SystemExit: 3)"),
        ("number", "returned an object of type int, not an nn.Module"),
        ("with_argument", "missing 1 required positional argument"),
    ],
)
def test_what_is_no_factory_is_named(factories: Path, name: str, expected: str) -> None:
    assert expected in reason(lambda: sources.from_file(f"{factories}:{name}"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
        ("def (:", "SyntaxError"),
        ("raise SystemExit", "SystemExit"),
    ],
)
def test_a_file_that_cannot_be_imported_says_why(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "broken.py").write_text(content)
    message = reason(lambda: sources.from_file(f"{tmp_path / 'broken.py'}:build"))
    assert "broken.py cannot be imported" in message
    assert expected in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none.py") in reason(lambda: sources.from_file(f"{tmp_path / 'none.py'}:build"))
