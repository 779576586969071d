"""How data sets get into the data folder: the CIFAR download, from a server on this machine, and image folders."""

import hashlib
import http.server
import io
import pickle
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robench import data, obtain
from tests.refusal import refused

# The download


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
    source = data.torchvision_class(request.param)
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
    assert obtain.fetch(name, tmp_path / "data", told.append) == tmp_path / "data" / name
    check_official(name, tmp_path / "data", images, labels)
    # Neither the archive nor unfinished work is left.
    assert sorted(str(p.relative_to(tmp_path / "data")) for p in (tmp_path / "data").rglob("*")) == [
        name, f"{name}/test.npz", f"{name}/train.npz",
    ]  # fmt: skip
    assert [line.split()[0] for line in told] == ["downloading", name]
    assert (server.downloads, obtain.fetch(name, tmp_path / "data", told.append)) == (2, tmp_path / "data" / name)
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
    message = refused(obtain.fetch, name, tmp_path)
    assert "is not the official archive" in message
    assert path in message
    assert "ROBENCH_DATA" in message
    assert nothing_left(tmp_path)
    assert "robench data fetch" in refused(data.load, name, "test", tmp_path)


def test_a_truncated_download_is_refused(official, server: Server, tmp_path: Path) -> None:
    name, path, _, _ = official
    server.files[path] = server.files[path][:1000]
    assert "is not the official archive" in refused(obtain.fetch, name, tmp_path)
    assert nothing_left(tmp_path)


def test_a_failed_download_is_said(official, server: Server, tmp_path: Path) -> None:
    name, path, _, _ = official
    del server.files[path]
    message = refused(obtain.fetch, name, tmp_path)
    assert "404" in message
    assert path in message
    assert nothing_left(tmp_path)


def test_an_unreachable_server_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server() as closed:
        url = f"http://127.0.0.1:{closed.server_port}/archive"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data.torchvision_class("cifar10"), "url", url)
    message = refused(obtain.fetch, "cifar10", tmp_path)
    assert "cannot download cifar10" in message
    assert url in message
    assert "refused" in message


def test_fetch_refuses_other_names_and_folders_that_cannot_be(tmp_path: Path) -> None:
    assert "did you mean 'cifar100'" in refused(obtain.fetch, "cifar1000", tmp_path)
    assert "cannot fetch 'digits'" in refused(obtain.fetch, "digits", tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(obtain.fetch, "cifar10", tmp_path / "file")


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
    assert obtain.add("pets-1", source, tmp_path / "data") == tmp_path / "data" / "pets-1"
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
    obtain.add("flat", tmp_path / "source", tmp_path / "data")
    assert data.load("flat", "test", tmp_path / "data").labels.tolist() == [0, 1, 0, 1]
    assert "no train split" in refused(data.load, "flat", "train", tmp_path / "data")


def test_grey_images_become_rgb(tmp_path: Path) -> None:
    tree(tmp_path / "source", {"a": 1}, mode="L")
    obtain.add("grey", tmp_path / "source", tmp_path / "data")
    images = data.load("grey", "test", tmp_path / "data").images
    assert images.shape == (1, 3, 4, 5)
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "with space", "ä"])
def test_add_refuses_names_that_are_no_names(tmp_path: Path, name: str) -> None:
    tree(tmp_path / "source", {"a": 1})
    assert "cannot name a data set" in refused(obtain.add, name, tmp_path / "source", tmp_path / "data")


def test_add_refuses_names_that_are_taken(tmp_path: Path) -> None:
    tree(tmp_path / "source", {"a": 1})
    obtain.add("mine", tmp_path / "source", tmp_path / "data")
    before = (tmp_path / "data" / "mine" / "test.npz").read_bytes()
    for name in ("mine", "digits", "cifar10"):
        message = refused(obtain.add, name, tmp_path / "source", tmp_path / "data")
        assert f"there is a data set '{name}' already" in message
    assert (tmp_path / "data" / "mine" / "test.npz").read_bytes() == before


def add_refused(tmp_path: Path) -> str:
    message = refused(obtain.add, "mine", tmp_path / "source", tmp_path / "data")
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
