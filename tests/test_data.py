"""Data sets: digits, files in the npz layout, the CIFAR download and image folders."""

import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from robench import data
from robench.errors import UserError


def refused(call, *arguments, **keywords) -> str:
    """Return the one-line message of the UserError that the call raises."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


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


# The download, from a server on this machine


class OldDtype:
    """Pickles as `numpy.dtype('uint8')` did under Python 2, with integers for flags, which numpy 2.4.0 warns of."""

    def __reduce__(self):
        return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)


class OldArray:
    """Pickles as an array of the official archives."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __reduce__(self):
        reconstruct, arguments, state = self.array.__reduce__()
        return reconstruct, arguments, (*state[:2], OldDtype(), *state[3:])


def official_archive(cifar100: bool) -> tuple[bytes, dict[str, str], np.ndarray, list[int]]:
    """Return a small archive in the official layout, its files' MD5 sums, and its images and labels in order."""
    folder = "cifar-100-python" if cifar100 else "cifar-10-batches-py"
    parts = ["train", "test"] if cifar100 else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    pixels = np.random.default_rng(5).integers(0, 256, (len(parts), 4, 3072), dtype=np.uint8)
    labels = [[(4 * part + i) % 10 for i in range(4)] for part in range(len(parts))]
    key = "fine_labels" if cifar100 else "labels"
    contents = {part: {"data": OldArray(pixels[i]), key: labels[i]} for i, part in enumerate(parts)}
    meta, key = ("meta", "fine_label_names") if cifar100 else ("batches.meta", "label_names")
    contents[meta] = {key: [f"kind {i}" for i in range(10)]}
    buffer, sums = io.BytesIO(), {}
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in contents.items():
            written = pickle.dumps(content, protocol=2)
            sums[name] = hashlib.md5(written).hexdigest()
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(written)
            archive.addfile(entry, io.BytesIO(written))
    # A row holds 1024 red values, then green, then blue: channels first.
    images = pixels.reshape(-1, 3, 32, 32)
    return buffer.getvalue(), sums, images, [label for part in labels for label in part]


class Server(http.server.ThreadingHTTPServer):
    """Serves one file at every path it is told of, and counts the downloads."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.downloads = 0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = self.server.files.get(self.path)
        self.server.downloads += content is not None
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(params=["cifar10", "cifar100"])
def official(request, server: Server, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, np.ndarray, list[int]]:
    """Point torchvision at a small archive on the local server; return the name, the path served, images and labels."""
    archive, sums, images, labels = official_archive(request.param == "cifar100")
    path = f"/{request.param}.tar.gz"
    server.files[path] = archive
    source = data._torchvision(request.param)
    monkeypatch.setattr(source, "url", f"http://127.0.0.1:{server.server_port}{path}")
    monkeypatch.setattr(source, "tgz_md5", hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(source, "train_list", [[name, sums[name]] for name, _ in source.train_list])
    monkeypatch.setattr(source, "test_list", [[name, sums[name]] for name, _ in source.test_list])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": sums[source.meta["filename"]]})
    return request.param, path, images, labels


def check_official(name: str, folder: Path, images: np.ndarray, labels: list[int]) -> None:
    train, test = (data.load(name, split, folder) for split in data.SPLITS)
    assert torch.equal(torch.cat([train.images, test.images]), torch.from_numpy(images))
    assert [*train.labels.tolist(), *test.labels.tolist()] == labels
    assert len(test) == 4
    assert train.classes == test.classes == tuple(f"kind {i}" for i in range(10))


def test_fetch_downloads_checks_and_converts(official, server: Server, tmp_path: Path) -> None:
    name, _, images, labels = official
    told: list[str] = []
    assert data.fetch(name, tmp_path / "data", told.append) == tmp_path / "data" / name
    check_official(name, tmp_path / "data", images, labels)
    # Neither the archive nor unfinished work is left.
    assert sorted(str(p.relative_to(tmp_path / "data")) for p in (tmp_path / "data").rglob("*")) == [
        name, f"{name}/test.npz", f"{name}/train.npz",
    ]  # fmt: skip
    assert [line.split()[0] for line in told] == ["downloading", name]
    assert (server.downloads, data.fetch(name, tmp_path / "data", told.append)) == (2, tmp_path / "data" / name)
    assert server.downloads == 2, "a data set that is there was downloaded again"
    assert "already" in told[-1]


def test_torchvisions_own_folder_is_read_in_place(official, server: Server, tmp_path: Path) -> None:
    name, _, images, labels = official
    with tarfile.open(fileobj=io.BytesIO(next(iter(server.files.values())))) as archive:
        archive.extractall(tmp_path / name, filter="data")
    check_official(name, tmp_path, images, labels)
    assert dict(data.names(tmp_path))[name].endswith("train, test")
    meta = next((tmp_path / name).rglob("*meta"))
    meta.write_bytes(meta.read_bytes()[:-1])
    message = refused(data.load, name, "test", tmp_path)
    assert "is not the official" in message
    assert f"robench data fetch {name}" in message


def nothing_left(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if path.is_file()]


def test_a_page_instead_of_the_archive_is_refused(official, server: Server, tmp_path: Path) -> None:
    name, path, _, _ = official
    server.files[path] = b"<html><body>Please log in</body></html>\n"
    message = refused(data.fetch, name, tmp_path)
    assert "is not the official archive" in message
    assert path in message
    assert "ROBENCH_DATA" in message
    assert nothing_left(tmp_path)
    assert "robench data fetch" in refused(data.load, name, "test", tmp_path)


def test_a_truncated_download_is_refused(official, server: Server, tmp_path: Path) -> None:
    name, path, _, _ = official
    server.files[path] = server.files[path][:1000]
    assert "is not the official archive" in refused(data.fetch, name, tmp_path)
    assert nothing_left(tmp_path)


def test_a_failed_download_is_said(official, server: Server, tmp_path: Path) -> None:
    name, path, _, _ = official
    del server.files[path]
    message = refused(data.fetch, name, tmp_path)
    assert "404" in message
    assert path in message
    assert nothing_left(tmp_path)


def test_an_unreachable_server_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server() as closed:
        url = f"http://127.0.0.1:{closed.server_port}/archive"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data._torchvision("cifar10"), "url", url)
    message = refused(data.fetch, "cifar10", tmp_path)
    assert "cannot download cifar10" in message
    assert url in message
    assert "refused" in message


def test_fetch_refuses_other_names_and_folders_that_cannot_be(tmp_path: Path) -> None:
    assert "did you mean 'cifar100'" in refused(data.fetch, "cifar1000", tmp_path)
    assert "cannot fetch 'digits'" in refused(data.fetch, "digits", tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(data.fetch, "cifar10", tmp_path / "file")


# Image folders


def tree(root: Path, counts: dict[str, int], mode: str = "RGB") -> dict[str, list[np.ndarray]]:
    """Write 5 x 4 PNG images, `counts` of each class, and return their pixels by class."""
    generator, pixels = np.random.default_rng(len(str(root))), {}
    for label, count in counts.items():
        (root / label).mkdir(parents=True)
        pixels[label] = [generator.integers(0, 256, (4, 5, 3), dtype=np.uint8) for _ in range(count)]
        for i, image in enumerate(pixels[label]):
            Image.fromarray(image).convert(mode).save(root / label / f"{i:02d}.png")
    return pixels


def test_an_image_folder_comes_back_whole_and_interleaved(tmp_path: Path) -> None:
    source = tmp_path / "source"
    counts = {"train": {"cat": 4, "ape": 2, "dog": 3}, "test": {"dog": 2, "cat": 1}}
    written = {split: tree(source / split, counts[split]) for split in counts}
    (source / "train" / "cat" / "notes.txt").write_text("not an image")
    (source / "train" / ".hidden").mkdir()
    assert data.add("pets-1", source, tmp_path / "data") == tmp_path / "data" / "pets-1"
    train, test = (data.load("pets-1", split, tmp_path / "data") for split in data.SPLITS)
    assert train.classes == test.classes == ("ape", "cat", "dog")
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, 1, 2, 1]
    assert test.labels.tolist() == [1, 2, 2]
    for dataset in (train, test):
        for label, images in written[dataset.split].items():
            found = dataset.images[dataset.labels == dataset.classes.index(label)].permute(0, 2, 3, 1)
            assert torch.equal(found, torch.from_numpy(np.stack(images)))
    assert dict(data.names(tmp_path / "data"))["pets-1"].endswith("train, test")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["pets-1"]


def test_a_tree_without_splits_is_a_test_split(tmp_path: Path) -> None:
    tree(tmp_path / "source", {"a": 2, "b": 2})
    data.add("flat", tmp_path / "source", tmp_path / "data")
    assert data.load("flat", "test", tmp_path / "data").labels.tolist() == [0, 1, 0, 1]
    assert "no train split" in refused(data.load, "flat", "train", tmp_path / "data")


def test_grey_images_become_rgb(tmp_path: Path) -> None:
    tree(tmp_path / "source", {"a": 1}, mode="L")
    data.add("grey", tmp_path / "source", tmp_path / "data")
    images = data.load("grey", "test", tmp_path / "data").images
    assert images.shape == (1, 3, 4, 5)
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "with space", "ä"])
def test_add_refuses_names_that_are_no_names(tmp_path: Path, name: str) -> None:
    tree(tmp_path / "source", {"a": 1})
    assert "cannot name a data set" in refused(data.add, name, tmp_path / "source", tmp_path / "data")


def test_add_refuses_names_that_are_taken(tmp_path: Path) -> None:
    tree(tmp_path / "source", {"a": 1})
    data.add("mine", tmp_path / "source", tmp_path / "data")
    before = (tmp_path / "data" / "mine" / "test.npz").read_bytes()
    for name in ("mine", "digits", "cifar10"):
        message = refused(data.add, name, tmp_path / "source", tmp_path / "data")
        assert f"there is a data set '{name}' already" in message
    assert (tmp_path / "data" / "mine" / "test.npz").read_bytes() == before


def add_refused(tmp_path: Path) -> str:
    message = refused(data.add, "mine", tmp_path / "source", tmp_path / "data")
    assert not (tmp_path / "data" / "mine").exists()
    assert not list(tmp_path.glob("data/.unfinished-*"))
    return message


def test_add_refuses_trees_that_are_not_as_described(tmp_path: Path) -> None:
    source = tmp_path / "source"
    assert "is not a folder" in add_refused(tmp_path)
    source.mkdir()
    assert "no images" in add_refused(tmp_path)
    tree(source / "train", {"a": 1, "b": 1})
    assert "needs a test split" in add_refused(tmp_path)
    tree(source / "test", {"a": 1, "c": 1})
    message = add_refused(tmp_path)
    assert "'c'" in message
    assert "not in" in message
    (source / "test" / "c").rename(source / "test" / "b")
    (source / "test" / "d").mkdir()
    assert str(source / "test" / "d") in add_refused(tmp_path)


def test_add_names_the_first_image_of_another_size(tmp_path: Path) -> None:
    tree(tmp_path / "source" / "train", {"a": 2})
    tree(tmp_path / "source" / "test", {"a": 3})
    for i in (1, 2):
        Image.new("RGB", (7, 6)).save(tmp_path / "source" / "test" / "a" / f"0{i}.png")
    message = add_refused(tmp_path)
    assert f"{tmp_path / 'source' / 'test' / 'a' / '01.png'} is 7 x 6 pixels" in message
    assert "is 5 x 4" in message


def test_add_names_an_image_it_cannot_use(tmp_path: Path) -> None:
    tree(tmp_path / "source", {"a": 2})
    path = tmp_path / "source" / "a" / "01.png"
    whole = path.read_bytes()
    for damaged in (b"<html>", b"", whole[:-30]):
        path.write_bytes(damaged)
        message = add_refused(tmp_path)
        assert str(path) in message
        assert "not a readable image" in message
    for mode in ("RGBA", "LA", "I;16", "CMYK"):
        unusable = path.with_suffix(".tiff" if mode == "CMYK" else ".png")
        path.unlink(missing_ok=True)
        Image.new(mode, (5, 4)).save(unusable)
        assert f"mode is {mode}" in add_refused(tmp_path)
    palette = Image.new("P", (5, 4))
    palette.info["transparency"] = b"\x00"
    unusable.unlink()
    palette.save(path)
    assert "transparency" in add_refused(tmp_path)


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
