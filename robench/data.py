"""Data sets: uint8 images and labels, identified by their content.

`digits` (the handwritten digits bundled with scikit-learn) needs nothing; `cifar10`, `cifar100` and added data sets lie
in the data folder, ``$ROBENCH_DATA`` or a folder of the cache, as ``<name>/{train,test}.npz``.
"""

import hashlib
import os
import pickle
import re
import warnings
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robench.errors import UserError, nearest
from robench.files import cache_folder

SPLITS = ("train", "test")
CIFAR = {"cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python")}
"""The data sets that can be fetched: the class of torchvision.datasets that knows where from, and its folder's name."""

LAYOUT = "images (uint8, N x H x W x 3), labels (int64, N) and classes (names)"

Arrays = tuple[NDArray[Any], NDArray[Any], tuple[str, ...]]
"""Images (N, H, W, 3), labels (N,) and the classes' names."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a data set, or its first examples.

    Attributes:
        name: the data set's name.
        split: ``train`` or ``test``.
        images: uint8 (N, C, H, W), or float32 in [0, 1], on the CPU.
        labels: int64 (N,), from 0 to the number of classes less one.
        classes: the classes' names, in the order of the labels.
        fingerprint: SHA-256 (hexadecimal) of the whole split's images and labels, whatever the data set is called.
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (3, H, W) of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def first(self, n: int) -> "Dataset":
        """Return the first `n` examples; the fingerprint stays that of the whole split.

        Raises:
            UserError: if `n` is not between 1 and the number of examples.
        """
        if not 1 <= n <= len(self):
            raise UserError(f"n = {n} is not between 1 and {len(self)}, the {self.split} examples of {self.name}")
        return replace(self, images=self.images[:n], labels=self.labels[:n])


def as_float(images: Tensor) -> Tensor:
    """Return images as float32 in [0, 1], of the same shape and on the same device: uint8 ones divided by 255."""
    return images.to(torch.float32) / 255 if images.dtype == torch.uint8 else images


def check_labels(labels: Tensor, classes: int) -> None:
    """Make sure that labels (N,) lie from 0 to `classes` - 1.

    Raises:
        UserError: if they do not.
    """
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserError(f"labels span {int(labels.min())} to {int(labels.max())}, and there are {classes} classes")


def from_tensors(images: Tensor, labels: Tensor, classes: int, name: str = "custom") -> Dataset:
    """Return images and labels of one's own as the test split of a data set.

    Args:
        images: (N, C, H, W), uint8, or floating point in [0, 1].
        labels: (N,) whole numbers from 0 to `classes` - 1.
        classes: how many there are.
        name: the data set's name in records.

    Raises:
        UserError: for a wrong shape, a value outside [0, 1] (normalisation belongs inside the model), or a label out of range.
    """
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        shapes = f"images of shape {tuple(images.shape)} and labels of shape {tuple(labels.shape)}"
        raise UserError(f"{shapes} are not (N, C, H, W) and (N,)")
    if images.dtype != torch.uint8:
        images = images.to(torch.float32)
        low, high = (float(images.min()), float(images.max())) if images.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= 1):
            raise UserError(f"images span [{low:.4g}, {high:.4g}], not [0, 1]; scale them, and normalise inside the model")
    labels = labels.to(torch.int64)
    check_labels(labels, classes)
    names = tuple(str(label) for label in range(classes))
    return Dataset(name, "test", images.cpu(), labels.cpu(), names, _fingerprint(images.cpu(), labels.cpu()))


def data_folder(given: Path | None = None) -> Path:
    """Return the folder of the data sets: `given`, else ``$ROBENCH_DATA``, else ``data`` in the cache folder."""
    return given or Path(os.environ.get("ROBENCH_DATA") or cache_folder() / "data").expanduser()


def load(name: str, split: str, folder: Path | None = None) -> Dataset:
    """Return one split of a data set.

    Args:
        name: ``digits``, ``cifar10``, ``cifar100`` or the name of an added data set.
        split: ``train`` or ``test``.
        folder: the data folder; see `data_folder`.

    Raises:
        UserError: if there is no such data set or split, or if its file is not what it should be.
    """
    folder = data_folder(folder)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; a data set has {' and '.join(SPLITS)}{nearest(split, SPLITS)}")
    if name == "digits":
        return _digits(split)
    known = [known for known, _ in names(folder)]
    if name not in known:
        hint = nearest(name, known) or "; one of your own is added with: robench data add"
        raise UserError(f"unknown data set {name!r}; known: {', '.join(known)}{hint}")
    path, present = folder / name / f"{split}.npz", splits(name, folder)
    if path.is_file():
        return _read(name, split, path)
    if split in present:
        return _read_torchvision(name, split, folder / name)
    if present:
        raise UserError(f"data set {name} has no {split} split in {folder / name}, only {present[0]}")
    raise UserError(f"{name} is not in {folder}; get it with: robench data fetch {name}, or {instead(name)}")


def names(folder: Path | None = None) -> list[tuple[str, str]]:
    """Return every data set's name and whether it is there, or how to get it."""
    folder = data_folder(folder)
    listed = [("digits", "present (bundled with scikit-learn): train, test")]
    added = sorted(path.name for path in folder.iterdir() if valid_name(path.name)) if folder.is_dir() else []
    for name in dict.fromkeys([*CIFAR, *added]):
        if present := splits(name, folder):
            listed.append((name, f"present in {folder / name}: {', '.join(present)}"))
        elif name in CIFAR:
            listed.append((name, f"absent; get it with: robench data fetch {name}"))
    return listed


def valid_name(name: str) -> bool:
    """Say whether a data set may have that name: letters, digits, ``-`` and ``_``, a letter or digit first."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) is not None


def splits(name: str, folder: Path) -> list[str]:
    """Return the splits of a data set that are in the folder, in either format."""
    if name in CIFAR and (folder / name / CIFAR[name][1]).is_dir():
        return list(SPLITS)
    return [split for split in SPLITS if (folder / name / f"{split}.npz").is_file()]


def _fingerprint(images: Tensor, labels: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    digest.update(images.contiguous().numpy().data)
    digest.update(labels.numpy().astype("<i8").data)
    return digest.hexdigest()


def _dataset(name: str, split: str, images: NDArray[Any], labels: NDArray[Any], classes: tuple[str, ...]) -> Dataset:
    """Return the data set of images (N, H, W, 3)."""
    channels_first = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    targets = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64))
    return Dataset(name, split, channels_first, targets, classes, _fingerprint(channels_first, targets))


def _rank_in_class(labels: NDArray[Any]) -> NDArray[Any]:
    """Return how many examples of its class come before each example."""
    rank = np.empty_like(labels)
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum())
    return rank


def interleaved(labels: NDArray[Any]) -> NDArray[Any]:
    """Return the order that takes one example of each class in turn."""
    return np.lexsort((labels, _rank_in_class(labels)))


def _digits(split: str) -> Dataset:
    """Return scikit-learn's digits as 16 x 16 images: levels 0 to 16 scaled to 0 to 255, each pixel doubled, as RGB.

    They have no split of their own: every fifth example of a class is a test example.
    """
    from sklearn.datasets import load_digits

    bundled = load_digits()
    levels = np.rint(bundled.images * 255 / 16).astype(np.uint8)
    images = np.repeat(levels.repeat(2, axis=1).repeat(2, axis=2)[..., None], 3, axis=-1)
    labels = bundled.target.astype(np.int64)
    chosen = np.flatnonzero((_rank_in_class(labels) % 5 == 0) == (split == "test"))
    chosen = chosen[interleaved(labels[chosen])]
    return _dataset("digits", split, images[chosen], labels[chosen], tuple(str(digit) for digit in range(10)))


def _read(name: str, split: str, path: Path) -> Dataset:
    try:
        # numpy takes anything that is no zip file for a pickle.
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("not a zip file")
        with np.load(path, allow_pickle=False) as archive:
            if missing := {"images", "labels", "classes"} - set(archive.files):
                raise UserError(f"{path} lacks {', '.join(sorted(missing))}; it must hold {LAYOUT}")
            images, labels, classes = archive["images"], archive["labels"], archive["classes"]
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be read ({reason}); delete it and fetch or add {name} again") from error
    wrong = None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        wrong = f"images are {images.dtype} of shape {images.shape}"
    elif labels.dtype != np.int64 or labels.shape != images.shape[:1]:
        wrong = f"labels are {labels.dtype} of shape {labels.shape} for {len(images)} images"
    elif classes.dtype.kind != "U" or classes.ndim != 1 or len(set(classes.tolist())) != len(classes):
        wrong = f"classes are {classes.dtype} of shape {classes.shape}, not a list of different names"
    elif labels.min() < 0 or labels.max() >= len(classes):
        wrong = f"labels span {labels.min()} to {labels.max()} for {len(classes)} classes"
    if wrong:
        raise UserError(f"{path}: {wrong}; it must hold {LAYOUT}")
    return _dataset(name, split, images, labels, tuple(classes.tolist()))


def torchvision_class(name: str) -> Any:
    """Return the class of torchvision.datasets that reads CIFAR-10 or CIFAR-100."""
    import torchvision.datasets

    return getattr(torchvision.datasets, CIFAR[name][0])


def torchvision_arrays(name: str, split: str, root: Path, download: bool) -> Arrays:
    """Return a split of CIFAR-10 or CIFAR-100 from its authors' files in `root`, downloaded first where that is asked for.

    Raises:
        OSError, RuntimeError, pickle.UnpicklingError: where the files are missing, or not the official ones.
    """
    with warnings.catch_warnings():
        # The official files are pickles of an old numpy, which numpy 2.4.0 to 2.4.4 warn of.
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        data = torchvision_class(name)(root, train=split == "train", download=download)
    return data.data, np.array(data.targets, dtype=np.int64), tuple(data.classes)


def _read_torchvision(name: str, split: str, root: Path) -> Dataset:
    try:
        return _dataset(name, split, *torchvision_arrays(name, split, root, download=False))
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        stored = root / CIFAR[name][1]
        wrong = f"{stored} is not the official {name} (a file is missing or differs)"
        raise UserError(f"{wrong}; delete it and run: robench data fetch {name}") from error


def instead(name: str) -> str:
    """Say in which form a data set can be given that cannot be downloaded."""
    return f"set ROBENCH_DATA to a folder with {name}/train.npz and {name}/test.npz, each with {LAYOUT}"
