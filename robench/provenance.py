"""What computes a measurement: the source's commit, the libraries' versions and the hardware."""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from robench.record import Provenance

PACKAGES = ("numpy", "robench", "pyautoattack")


def of_this_process(device: str | torch.device) -> Provenance:
    """Return the source, library versions and hardware of this process; `device` is what the measurement runs on."""
    device = torch.device(device)
    commit, dirty = LOADED
    return Provenance(
        commit=commit,
        dirty=dirty,
        versions={"python": platform.python_version(), "torch": str(torch.__version__)} | _versions(),
        device=str(device),
        processor=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        threads=torch.get_num_threads(),
    )


def source_state(folder: Path) -> tuple[str, bool]:
    """Return the git commit of the checkout that tracks `folder`, and whether the checkout differs from it.

    Files in its ``leaderboard`` do not count, since writing a record must not mark the next one. Without a commit, or
    where `folder` is not tracked (installed inside some other checkout), it is ``("unknown", False)``.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit or not _git(folder, "ls-files", "--", "."):
        return "unknown", False
    return commit, bool(_git(folder, "status", "--porcelain", "--", ":/", ":(top,exclude)leaderboard"))


def _git(folder: Path, *arguments: str) -> str:
    """Return what git prints, or nothing where it fails or is not installed."""
    # Inside a git hook the GIT_ variables would point git at another checkout.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _versions() -> dict[str, str]:
    found = dict.fromkeys(PACKAGES, "unknown")
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


LOADED = source_state(Path(__file__).parent)
"""The source when this process loaded it: a checkout may move on while it runs."""
