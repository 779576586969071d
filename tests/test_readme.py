"""Every command and snippet of the README runs as written."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_hub import TOKEN, FakeHub

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
SNIPPETS = [block for kind, block in BLOCKS if kind == "python"]


def run(command: list[str], folder: Path, cache: Path | None, hub: FakeHub | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = str(folder)
    if cache is not None:
        environment["ROBENCH_CACHE"] = str(cache)
    if hub is not None:
        environment |= {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's files, and the checkout's folders that its commands name."""
    path = tmp_path_factory.mktemp("readme")
    model, _, plugin, attack = SNIPPETS
    (path / "my_model.py").write_text(model)
    (path / "median.py").write_text(plugin)
    (path / "random_start.py").write_text(attack)
    for name in ("claims", "leaderboard"):
        (path / name).symlink_to(ROOT / name)
    (path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_the_readme_has_what_is_tested() -> None:
    assert len(SNIPPETS) == 4
    assert any(command.startswith("robench evaluate median_of_small") for command in COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("robench")])
def test_robench_commands(command: str, folder: Path, cache: Path, running_hub: FakeHub) -> None:
    """In order, against a hub of this machine: what one command pushes, the next one pulls."""
    done = run(shlex.split(command), folder, cache, running_hub)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("pytest")])
def test_pytest_commands_select_claims(command: str, folder: Path) -> None:
    """The claims themselves run with the suite; here the selection is what is tested."""
    done = run([sys.executable, "-m", *shlex.split(command), "--collect-only", "-q"], folder, None)
    assert done.returncode == 0, done.stdout
    assert "test_claim[" in done.stdout


def test_gpu_claims_skip_with_the_reason(folder: Path) -> None:
    done = run([sys.executable, "-m", "pytest", "claims/", "-m", "cifar10", "--gpu", "-q", "-rs"], folder, None)
    assert done.returncode == 0, done.stdout
    assert "no CUDA device" in done.stdout


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    assert all(command.startswith(("robench", "pytest")) for command in COMMANDS)


def test_the_python_snippet_prints_a_record(folder: Path, cache: Path) -> None:
    done = run([sys.executable, "-c", SNIPPETS[1]], folder, cache)
    assert done.returncode == 0, done.stderr
    assert "n=100" in done.stdout


def test_adding_a_defense_takes_under_25_lines() -> None:
    lines = [line for line in SNIPPETS[2].splitlines() if line.strip()]
    assert len(lines) < 25


@pytest.mark.parametrize("target", re.findall(r"\bmake (\w+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
def test_make_targets_exist(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tables_are_what_the_committed_records_say() -> None:
    done = run([sys.executable, str(ROOT / "leaderboard" / "render.py"), "--check"], ROOT, None)
    assert done.returncode == 0, done.stderr


def test_files_the_readme_names_exist() -> None:
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / name).exists(), name
