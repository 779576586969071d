"""How data sets get into the data folder: downloaded from their authors, or stored from a tree of images."""

import contextlib
import http.client
import io
import pickle
import tarfile
import tempfile
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robench.data import CIFAR, SPLITS, Arrays, data_folder, instead, interleaved, splits, torchvision_arrays, torchvision_class, valid_name
from robench.errors import UserError, nearest
from robench.files import write_atomic

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif"}


def fetch(name: str, folder: Path | None = None, progress: Callable[[str], None] = lambda _line: None) -> Path:
    """Download CIFAR-10 or CIFAR-100 from its authors, check it and store it; return the data set's folder.

    Nothing is downloaded if the data set is there. `progress` is told each step.

    Raises:
        UserError: if the name is not one of the two, the download fails or is not the official archive, or the folder
            cannot be written.
    """
    if name not in CIFAR:
        raise UserError(f"cannot fetch {name!r}; what can be fetched: {', '.join(CIFAR)}{nearest(name, CIFAR)}")
    folder = data_folder(folder)
    if len(splits(name, folder)) == len(SPLITS):
        progress(f"{name} is already in {folder / name}")
        return folder / name
    with _staging(folder) as staging:
        url = torchvision_class(name).url
        progress(f"downloading {url}")
        for split in SPLITS:
            _write(folder / name / f"{split}.npz", *_downloaded(name, split, staging, url))
    progress(f"{name} is in {folder / name}")
    return folder / name


def add(name: str, source: Path, folder: Path | None = None) -> Path:
    """Store a tree of images as a data set; return the data set's folder.

    Examples are ordered so that the first n are balanced over the classes.

    Args:
        name: letters, digits, ``-`` and ``_``.
        source: ``<source>/{train,test}/<class>/<image>``, or ``<source>/<class>/<image>`` for a test split alone. Every
            image is RGB or grey, of one size.
        folder: the data folder; see `data_folder`.

    Raises:
        UserError: if the name is taken or invalid, or the tree is not as above.
    """
    folder = data_folder(folder)
    if not valid_name(name):
        raise UserError(f"{name!r} cannot name a data set; use letters, digits, '-' and '_', a letter or digit first")
    if name == "digits" or name in CIFAR or (folder / name).exists():
        raise UserError(f"there is a data set {name!r} already; choose another name")
    if not source.is_dir():
        raise UserError(f"{source} is not a folder")
    if (source / "train").is_dir() and not (source / "test").is_dir():
        raise UserError(f"{source} has a train folder and no test folder; a data set needs a test split")
    trees = {split: source / split for split in SPLITS if (source / split).is_dir()} or {"test": source}
    files = {split: _image_files(tree) for split, tree in trees.items()}
    classes = tuple(files[next(iter(files))])
    if unknown := sorted(set(files["test"]) - set(classes)):
        raise UserError(f"class {unknown[0]!r} is in {trees['test']} but not in {trees['train']}")
    sizes: dict[tuple[int, ...], Path] = {}
    with _staging(folder) as staging:
        for split, by_class in files.items():
            labels = np.array([classes.index(label) for label, paths in by_class.items() for _ in paths])
            images = [_read_image(path, sizes) for paths in by_class.values() for path in paths]
            order = interleaved(labels)
            _write(staging / name / f"{split}.npz", np.stack(images)[order], labels[order], classes)
        try:
            (staging / name).rename(folder / name)
        except OSError as error:
            raise UserError(f"cannot write {folder / name}: {error.strerror or error}") from error
    return folder / name


def _downloaded(name: str, split: str, staging: Path, url: str) -> Arrays:
    try:
        return torchvision_arrays(name, split, staging, download=True)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        reason = str(error).strip("<>")
        raise UserError(f"cannot download {name} from {url}: {reason}; try again, or {instead(name)}") from error
    except (RuntimeError, tarfile.TarError, EOFError, pickle.UnpicklingError) as error:
        wrong = f"what {url} sent is not the official archive of {name} (its checksum differs)"
        raise UserError(f"{wrong}; try again, or {instead(name)}") from error


def _write(path: Path, images: NDArray[Any], labels: NDArray[Any], classes: tuple[str, ...]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, images=images, labels=labels.astype(np.int64), classes=np.array(classes, dtype=str))
    write_atomic(path, buffer.getvalue())


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Make a temporary folder inside the data folder, so that what is finished can be renamed to its place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-", ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror or error}") from error
    with staging as path:
        yield Path(path)


def _image_files(tree: Path) -> dict[str, list[Path]]:
    """Return the image files of each class folder, both in the order of their names."""
    folders = sorted(path for path in tree.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = {path.name: sorted(f for f in path.rglob("*") if f.suffix.lower() in _IMAGE_SUFFIXES) for path in folders}
    if not any(files.values()):
        raise UserError(f"no images in {tree}; it must hold one folder of images for each class")
    if empty := [label for label, paths in files.items() if not paths]:
        raise UserError(f"no images in {tree / empty[0]}; every folder of {tree} is a class and must hold images")
    return files


def _read_image(path: Path, sizes: dict[tuple[int, ...], Path]) -> NDArray[Any]:
    """Return an image as uint8 (H, W, 3); `sizes` keeps the size of the images read before, and one that had it."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode, transparent = image.mode, image.has_transparency_data
            opaque = mode in ("RGB", "L", "P") and not transparent
            pixels = np.asarray(image.convert("RGB")) if opaque else None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not a readable image: {error}") from error
    if pixels is None:
        kind = f"its mode is {mode}{', with transparency' if transparent else ''}"
        raise UserError(f"{path} is neither an RGB nor a grey image ({kind}); convert it to RGB")
    sizes.setdefault(pixels.shape[:2], path)
    if len(sizes) > 1:
        (height, width), first = next(iter(sizes.items()))
        wrong = f"{path} is {pixels.shape[1]} x {pixels.shape[0]} pixels, and {first} is {width} x {height}"
        raise UserError(f"{wrong}; resize them to one size")
    return pixels
