"""What a record says of the process that made it."""

import re
import subprocess
from pathlib import Path

import torch

from robench import provenance


def test_provenance_says_what_ran_where() -> None:
    found = provenance.of_this_process("cpu")
    assert found.versions["torch"] == torch.__version__
    assert {"numpy", "robench", "pyautoattack", "python"} <= found.versions.keys()
    assert (found.device, found.threads) == ("cpu", torch.get_num_threads())
    assert found.processor
    assert found.commit == "unknown" or re.fullmatch("[0-9a-f]{40}", found.commit)


def test_the_commit_is_that_of_the_checkout_that_tracks_the_package(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity_settings = [
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
            "-c",
            "commit.gpgsign=false",
            "-c",
            "core.hooksPath=/dev/null",
        ]
        command = ["git", "-C", str(tmp_path), *identity_settings, *arguments]
        environment = {"PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": str(tmp_path)}
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()

    package, installed = tmp_path / "robench", tmp_path / "venv" / "robench"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "record.py").write_text("1")
    assert provenance.source_state(package) == ("unknown", False)  # no checkout
    git("init", "-q")
    assert provenance.source_state(package) == ("unknown", False)  # no commit
    (tmp_path / ".gitignore").write_text("venv\n")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert provenance.source_state(package) == (head, False)
    assert provenance.source_state(installed) == ("unknown", False)  # inside the checkout, but not of it
    (tmp_path / "leaderboard").mkdir()
    (tmp_path / "leaderboard" / "new.json").write_text("{}")
    assert provenance.source_state(package) == (head, False)
    (package / "plugin.py").write_text("2")
    assert provenance.source_state(package) == (head, True)
    (package / "plugin.py").unlink()
    (package / "record.py").write_text("2")
    assert provenance.source_state(package) == (head, True)
