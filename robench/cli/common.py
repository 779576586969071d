"""What the commands share: the group with its exit codes, common options, and checks of what they name."""

import contextlib
import errno
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from robench import duration
from robench.errors import UserError, nearest

RECORDS = Path("leaderboard/records")
LAST_SEED = 2**31 - 1
SEED = click.IntRange(0, LAST_SEED)


class _Path(click.Path):
    """A path that is not empty, as an unset variable leaves it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


PATH = _Path(path_type=Path)


def in_seconds(_context: click.Context, _option: click.Parameter, text: str | None) -> float | None:
    """Read an option that is a duration, ``9m``."""
    try:
        return None if text is None else duration.seconds(text)
    except UserError as error:
        raise click.BadParameter(str(error)) from error


class _Main(click.Group):
    """A group that reports bad usage and input in one line on stderr."""

    def main(self, *args: Any, **settings: Any) -> Any:
        try:
            code = super().main(*args, **(settings | {"standalone_mode": False}))
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = 2
        except (click.ClickException, UserError) as error:
            text = error.format_message() if isinstance(error, click.ClickException) else str(error)
            click.echo(f"robench: error: {' '.join(text.split())}", err=True)
            code = 2
        except OSError as error:
            if error.errno != errno.ENOSPC or error.filename is not None:
                raise
            click.echo(f"robench: error: cannot write what is printed: {error.strerror}", err=True)
            code = 2
        except click.Abort:
            click.echo("robench: interrupted; what was finished is kept in the cache", err=True)
            code = 130
        sys.exit(code if isinstance(code, int) else 0)


dataset_option = click.option("--dataset", default="digits", show_default=True, help="See: robench data list.")
scale_option = click.option(
    "--scale", type=click.Choice(["smoke", "cpu", "gpu", "paper"]), help="Computation.  [default: smoke for digits, else cpu]"
)
device_option = click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
cache_option = click.option("--cache-dir", type=PATH, help="Trained weights and unfinished work.  [default: $ROBENCH_CACHE]")
plugin_option = click.option("--plugin", "plugins", type=PATH, multiple=True, help="A file that registers defenses or attacks; repeatable.")


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="robench", message="%(prog)s %(version)s")
def main() -> None:
    """Settle whether a defense's robustness claim holds."""


def writable(folder: Path) -> Path:
    """Return the folder, having made sure that it can be written, which would otherwise show only after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise UserError(f"cannot write in the folder {folder}: {error.strerror or error}") from error


def available(device: str | None) -> str:
    """Return a device that torch has here."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if device is None:
        return "cuda" if count else "cpu"
    if device not in known:
        raise UserError(f"torch has no device {device!r} here; it has {', '.join(known)}{nearest(device, known)}")
    return device


def no_folder(path: Path | None) -> None:
    """Make sure that a file can be written at a path that is given, which would otherwise show only after hours."""
    if path and path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")


def load_plugins(plugins: tuple[Path, ...]) -> None:
    """Load every plugin and warn of those that fail."""
    from robench import zoo

    # What a plugin prints is no result.
    with contextlib.redirect_stdout(sys.stderr):
        zoo.discover(plugins)
    for failure in zoo.failures():
        click.echo(f"robench: warning: {failure.origin} failed to load: {failure.reason}", err=True)
