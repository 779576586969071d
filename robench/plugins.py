"""Plugins: the door through which defenses and attacks come, the built-in ones by the same way as anyone else's.

A plugin is an entry point, whose value is a module or a package (every module of a package is imported), or a file given by
path. What it registers is its own affair; one that fails to import registers nothing and does not take the others down.
"""

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

from robench.errors import UserError


@dataclass(frozen=True)
class Failure:
    """A plugin that could not be imported, and why."""

    origin: str
    reason: str


_REGISTRIES: list[Callable[[], dict[str, Any]]] = []
_FAILURES: dict[str, Failure] = {}
_loaded: set[str] = set()


def track(registry: Callable[[], dict[str, Any]]) -> None:
    """Have what a failing plugin registered taken out of the registry that the function returns."""
    _REGISTRIES.append(registry)


def discover(group: str) -> None:
    """Import the entry points of a group, each once."""
    for point in _entry_points(group):
        _load_once(f"entry point {point.name} = {point.value}", partial(import_tree, point.value))


@cache
def _entry_points(group: str) -> tuple[importlib.metadata.EntryPoint, ...]:
    """Return the group's entry points: looked up once, for that reads the metadata of every installed distribution (7 ms)."""
    return tuple(importlib.metadata.entry_points(group=group))


def load(files: Iterable[Path]) -> None:
    """Import files, each once.

    Raises:
        UserError: for a file that does not exist, or a name that is taken.
    """
    for path in files:
        if not path.is_file():
            raise UserError(f"plugin file {path} does not exist")
        _load_once(f"plugin file {path.resolve()}", partial(import_file, path))


def failures() -> list[Failure]:
    """Return the plugins that failed to import."""
    return list(_FAILURES.values())


def _load_once(origin: str, load: Callable[[], object]) -> None:
    if origin in _loaded:
        return
    _loaded.add(origin)
    _guarded(origin, load)


def _guarded(origin: str, load: Callable[[], object]) -> None:
    before = [(registry(), set(registry())) for registry in _REGISTRIES]
    try:
        load()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a stranger's code may fail in any way
        for registry, names in before:
            for name in set(registry) - names:
                del registry[name]
        _FAILURES[origin] = Failure(origin, f"{type(error).__name__}: {error}".splitlines()[0])


def import_tree(name: str) -> None:
    """Import a module, and every module of a package."""
    module = importlib.import_module(name)
    for child in pkgutil.iter_modules(getattr(module, "__path__", [])):
        full = f"{name}.{child.name}"
        _guarded(f"module {full}", partial(importlib.import_module, full))


class _Source(SourceFileLoader):
    """Compiles a file anew each time: kept bytecode would be a file beside the user's, and goes stale if two edits share a second."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def import_file(path: Path) -> Any:
    """Import a Python file by its path and return the module."""
    name = f"robench_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_Source(name, str(path)))
    if path.suffix != ".py" or spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # Last, so that the files beside it stand behind everything else.
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    spec.loader.exec_module(module)
    return module
