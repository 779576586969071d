"""Files that are either whole or absent."""

import os
import tempfile
from pathlib import Path

from robench.errors import UserError


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part.

    The bytes go to a temporary file in the same folder, are synced to disk and renamed over `path`, or over what it is a link to. What is
    no file, as a terminal or a pipe (``/dev/stdout``), is written to as it is.

    Raises:
        UserError: if the folder cannot be created or written.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BrokenPipeError:
        raise
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def cache_folder(given: Path | None = None) -> Path:
    """Return the folder for weights and unfinished work: `given`, else ``$ROBENCH_CACHE``, else ``~/.cache/robench``."""
    return given or Path(os.environ.get("ROBENCH_CACHE") or Path.home() / ".cache" / "robench").expanduser()
