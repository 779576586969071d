"""What fails in a stranger's code, a model's or a plugin's, in one line that says where."""

import contextlib
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from robench.errors import OutOfTimeError, UserError

HERE = Path(__file__).resolve().parent
LIBRARIES = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib"))


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Name what fails inside the block and the line of the stranger's code that did; what fails in robench alone is left as it is.

    Args:
        what: is done (``natural under pgd-20``).

    Raises:
        UserError: in the place of any other exception, and of an exit, from code that is neither robench's nor a library's.
    """
    try:
        yield
    except (UserError, OutOfTimeError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        places = [frame for frame in traceback.extract_tb(error.__traceback__) if _strange(frame.filename)]
        if not places:
            raise
        line = f"{type(error).__name__}: {error}".strip().splitlines()[0].removesuffix(":")
        raise UserError(f"{what} fails: {line} ({Path(places[-1].filename).name}, line {places[-1].lineno})") from error


def _strange(filename: str) -> bool:
    path = Path(filename)
    if not path.is_file():
        return False
    parents = path.resolve().parents
    return HERE not in parents and not any(library in parents for library in LIBRARIES)
