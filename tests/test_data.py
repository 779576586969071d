"""Data sets: digits, tensors of one's own, and files in the npz layout."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from robench import data
from tests.refusal import refused


def arrays(n: int = 12, classes: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "images": generator.integers(0, 256, (n, 4, 5, 3), dtype=np.uint8),
        "labels": np.arange(n) % classes,
        "classes": np.array([f"class{i}" for i in range(classes)]),
    }


def stored(folder: Path, name: str = "cifar10", split: str = "test", **changed: np.ndarray) -> Path:
    path = folder / name / f"{split}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{key: value for key, value in {**arrays(), **changed}.items() if value is not None})
    return path


# Digits


def test_digits_are_scaled_doubled_and_grey() -> None:
    test = data.load("digits", "test")
    bundled = load_digits()
    # The first test example is the first 0 of the bundled digits; a level v becomes the integer nearest to 255 v / 16.
    source = bundled.images[list(bundled.target).index(0)]
    expected = [[int(255 * v / 16 + 0.5) for v in row for _ in range(2)] for row in source for _ in range(2)]
    for channel in range(3):
        assert test.images[0, channel].tolist() == expected
    assert test.image_shape == (3, 16, 16)
    assert (test.images.dtype, test.labels.dtype) == (torch.uint8, torch.int64)
    assert test.classes == tuple("0123456789")
    assert (int(test.images.min()), int(test.images.max())) == (0, 255)


def test_digits_splits_share_every_bundled_example_out_once() -> None:
    parts = [data.load("digits", split) for split in data.SPLITS]
    assert [len(part) for part in parts] == [1433, 364]
    found = sorted(
        (image[0, ::2, ::2].numpy().tobytes(), int(label)) for part in parts for image, label in zip(part.images, part.labels, strict=True)
    )
    bundled = load_digits()
    levels = (bundled.images * 255 / 16 + 0.5).astype(np.uint8)
    assert found == sorted((levels[i].tobytes(), int(bundled.target[i])) for i in range(len(levels)))


@pytest.mark.parametrize("split", data.SPLITS)
def test_the_first_digits_are_class_balanced(split: str) -> None:
    digits = data.load("digits", split)
    for n in (10, 25, 100, 340):
        counts = digits.first(n).labels.bincount(minlength=10)
        assert int(counts.max() - counts.min()) == (0 if n % 10 == 0 else 1)
    assert int(digits.labels.bincount().max() - digits.labels.bincount().min()) <= 7


def test_digits_fingerprints_are_stable() -> None:
    # Results are compared across machines and years by these; a change here is a change of the data.
    assert data.load("digits", "test").fingerprint == DIGITS_TEST
    assert data.load("digits", "train").fingerprint == DIGITS_TRAIN


DIGITS_TEST = "2df3c9f2c13b996d9d964ba6f9dc7d3c90dba5a7477b9f3369a29b568d806de2"
DIGITS_TRAIN = "ecd4b96721ec19bd2f77b9a767992768d1e5f92777c951639fd1c4e3d052e81c"


# The Dataset


def test_first_keeps_the_fingerprint_of_the_split() -> None:
    digits = data.load("digits", "test")
    few = digits.first(7)
    assert len(few) == 7
    assert torch.equal(few.images, digits.images[:7])
    assert torch.equal(few.labels, digits.labels[:7])
    assert (few.fingerprint, few.name, few.split, few.classes) == (digits.fingerprint, "digits", "test", digits.classes)
    assert len(digits.first(364)) == 364


@pytest.mark.parametrize("n", [0, -1, 365])
def test_first_refuses_more_than_there_is(n: int) -> None:
    message = refused(data.load("digits", "test").first, n)
    assert f"n = {n}" in message
    assert "364" in message


def test_as_float_divides_by_255_exactly() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    floats = data.as_float(levels)
    assert floats.dtype == torch.float32
    assert floats.tolist() == [float(np.float32(v) / np.float32(255)) for v in range(256)]
    assert torch.equal((floats * 255).round().to(torch.uint8), levels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_of_ones_own_make_a_test_split(dtype: torch.dtype) -> None:
    images = torch.rand(5, 1, 4, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 2, 0])
    made = data.from_tensors(images, labels.int(), 3, "mine")
    assert (made.name, made.split, made.classes, len(made), made.image_shape) == ("mine", "test", ("0", "1", "2"), 5, (1, 4, 6))
    assert torch.equal(data.as_float(made.images), images.float())
    assert made.labels.dtype == torch.int64
    assert torch.equal(made.labels, labels)
    levels = (images * 255).to(torch.uint8)
    assert torch.equal(data.as_float(data.from_tensors(levels, labels, 3).images), levels.float() / 255)
    other = images.clone()
    other[4, 0, 3, 5] = 0
    assert len({data.from_tensors(one, labels, 3).fingerprint for one in (images, other, levels)}) == 3


def test_tensors_that_are_no_images_in_range_are_refused() -> None:
    images, labels = torch.zeros(3, 3, 4, 4), torch.tensor([0, 1, 2])
    assert "(N, C, H, W)" in refused(data.from_tensors, images[0], labels, 3)
    assert "labels of shape (2,)" in refused(data.from_tensors, images, labels[:2], 3)
    for value in (-0.1, 1.5, float("nan"), float("inf")):
        images[1, 0, 0, 0] = value
        message = refused(data.from_tensors, images, labels, 3)
        assert "not [0, 1]" in message
    images[1, 0, 0, 0] = 0
    assert "labels span 0 to 2, and there are 2 classes" in refused(data.from_tensors, images, labels, 2)
    assert "labels span -1" in refused(data.from_tensors, images, labels - 1, 3)


def test_the_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    def fingerprint(name: str, **changed: np.ndarray) -> str:
        stored(tmp_path, name, **changed)
        return data.load(name, "test", tmp_path).fingerprint

    content = arrays()
    original = fingerprint("cifar10")
    assert fingerprint("other") == original
    assert len(original) == 64
    channels_first = np.ascontiguousarray(content["images"].transpose(0, 3, 1, 2))
    digest = hashlib.sha256(b"(12, 3, 4, 5)" + channels_first.tobytes() + content["labels"].astype("<i8").tobytes())
    assert original == digest.hexdigest()
    changed = content["images"].copy()
    changed[-1, -1, -1, -1] ^= 1
    labels = content["labels"].copy()
    labels[-1] = 0
    reshaped = content["images"].reshape(12, 5, 4, 3)
    others = {fingerprint("a", images=changed), fingerprint("b", labels=labels), fingerprint("c", images=reshaped)}
    assert len({original, *others}) == 4


# Files


def test_npz_files_are_read(tmp_path: Path) -> None:
    stored(tmp_path, "cifar100", "train")
    read, content = data.load("cifar100", "train", tmp_path), arrays()
    assert torch.equal(read.images.permute(0, 2, 3, 1), torch.from_numpy(content["images"]))
    assert read.labels.tolist() == content["labels"].tolist()
    assert (read.image_shape, read.classes, len(read)) == ((3, 4, 5), ("class0", "class1", "class2"), 12)


def test_the_data_folder_is_robench_data_or_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ROBENCH_DATA", raising=False)
    assert data.data_folder() == tmp_path / "cache" / "data"
    monkeypatch.setenv("ROBENCH_DATA", str(tmp_path))
    assert data.data_folder() == tmp_path
    assert data.data_folder(tmp_path / "given") == tmp_path / "given"
    stored(tmp_path)
    assert len(data.load("cifar10", "test")) == 12


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"images": None}, "lacks images"),
        ({"labels": None, "classes": None}, "lacks classes, labels"),
        ({"images": arrays()["images"].astype(np.float32)}, "images are float32"),
        ({"images": arrays()["images"].transpose(0, 3, 1, 2)}, "of shape (12, 3, 4, 5)"),
        ({"images": arrays()["images"][:0], "labels": arrays()["labels"][:0]}, "of shape (0, 4, 5, 3)"),
        ({"labels": arrays()["labels"].astype(np.int32)}, "labels are int32"),
        ({"labels": arrays()["labels"][:5]}, "labels are int64 of shape (5,) for 12 images"),
        ({"labels": arrays()["labels"] + 1}, "labels span 1 to 3 for 3 classes"),
        ({"labels": arrays()["labels"] - 1}, "labels span -1 to 1"),
        ({"classes": np.arange(3)}, "classes are int64"),
        ({"classes": np.array(["a", "b", "a"])}, "different names"),
    ],
)
def test_a_wrong_npz_is_refused(tmp_path: Path, changed: dict[str, np.ndarray], part: str) -> None:
    path = stored(tmp_path, **changed)
    message = refused(data.load, "cifar10", "test", tmp_path)
    assert part in message
    assert str(path) in message
    assert "uint8, N x H x W x 3" in message


def flip_last_image_byte(content: bytes) -> bytes:
    position = content.index(arrays()["images"].tobytes()[-40:]) + 20
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def cut_in_half(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [cut_in_half, lambda content: b"<html>", lambda content: b"", flip_last_image_byte])
def test_a_damaged_npz_is_refused(tmp_path: Path, damage) -> None:
    path = stored(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    message = refused(data.load, "cifar10", "test", tmp_path)
    assert str(path) in message
    assert "cannot be read" in message
    assert "delete it" in message


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    stored(tmp_path, classes=np.array(["a", "b", 3], dtype=object))
    assert "cannot be read" in refused(data.load, "cifar10", "test", tmp_path)


def test_what_is_absent_is_said_with_how_to_get_it(tmp_path: Path) -> None:
    message = refused(data.load, "cifar10", "test", tmp_path)
    assert "robench data fetch cifar10" in message
    assert "ROBENCH_DATA" in message
    assert "int64" in message
    assert "did you mean 'cifar10'" in refused(data.load, "cifar-10", "test", tmp_path)
    assert "robench data add" in refused(data.load, "imagewoof", "test", tmp_path)
    assert "unknown data set '../cifar10'" in refused(data.load, "../cifar10", "test", tmp_path / "below")
    assert "did you mean 'test'" in refused(data.load, "digits", "tests")
    stored(tmp_path, "mine", "test")
    message = refused(data.load, "mine", "train", tmp_path)
    assert "no train split" in message
    assert "only test" in message


def test_names_say_what_is_there(tmp_path: Path) -> None:
    assert [name for name, _ in data.names(tmp_path / "nowhere")] == ["digits", "cifar10", "cifar100"]
    stored(tmp_path, "mine")
    stored(tmp_path, "cifar100")
    stored(tmp_path, "cifar100", "train")
    (tmp_path / "not-data").mkdir()
    listed = dict(data.names(tmp_path))
    assert list(listed) == ["digits", "cifar10", "cifar100", "mine"]
    assert listed["digits"].startswith("present")
    assert listed["cifar10"] == "absent; get it with: robench data fetch cifar10"
    assert listed["cifar100"] == f"present in {tmp_path / 'cifar100'}: train, test"
    assert listed["mine"] == f"present in {tmp_path / 'mine'}: test"


# The real thing, where there is one


def test_the_real_cifar10_has_its_known_statistics() -> None:
    folder = Path(os.environ.get("ROBENCH_DATA", ""))
    if not os.environ.get("ROBENCH_DATA") or not (folder / "cifar10").is_dir():
        pytest.skip("CIFAR-10 is not here: set ROBENCH_DATA to a folder with cifar10")
    train, test = (data.load("cifar10", split, folder) for split in data.SPLITS)
    assert (len(train), len(test), train.image_shape) == (50_000, 10_000, (3, 32, 32))
    assert train.labels.bincount().tolist() == [5000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    assert " ".join(train.classes) == "airplane automobile bird cat deer dog frog horse ship truck"
    assert test.classes == train.classes
    # The channel means that the literature normalises with.
    means = [float(train.images[:, channel].double().mean()) / 255 for channel in range(3)]
    assert means == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-3)
