"""Weights on the Hugging Face hub, or in a folder: pushed with their card and records, pulled at a pinned commit and checked.

The hub is `$HF_ENDPOINT`, the token `$HF_TOKEN`: huggingface_hub's own variables. What it keeps lies in the cache, under ``hub/``.
"""

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from robench import data, record, weights, zoo
from robench.card import model_card
from robench.errors import UserError
from robench.files import write_atomic
from robench.record import Record
from robench.weights import CARD, CONFIG, FOLDER, RECORDS, STATE, Config

Progress = Callable[[str], None]

_NAME = r"[A-Za-z0-9][\w.-]*"


@dataclass(frozen=True)
class Pulled:
    """What a pull brought: what the weights are, where they came from and lie now, their records, and what could not be checked."""

    config: Config
    folder: Path
    records: list[Record]
    unchecked: str | None = None


def is_folder(place: str) -> bool:
    """Return whether a place is written as a folder: ``./NAME``, ``../NAME``, ``/NAME``, ``~/NAME``.

    Raises:
        UserError: if it is neither that nor ``OWNER/REPO[@REVISION]``.
    """
    if place.startswith((".", "/", "~")):
        return True
    if not re.fullmatch(rf"{_NAME}/{_NAME}(@.+)?", place):
        raise UserError(f"{place!r} is neither OWNER/REPO on a hub nor a folder, which is written ./{place.strip('/') or 'FOLDER'}")
    return False


def push(config: Config, content: bytes, records: Sequence[Record], place: str, *, cache: Path, private: bool = False) -> str:
    """Put weights with their card and their records into a repository, made if it is not there, or into a folder.

    What the place holds of other records is removed.

    Args:
        config: what the weights are.
        content: the safetensors file.
        records: those of other weights are left out.
        place: ``OWNER/REPO`` or a folder.
        cache: the cache folder.
        private: makes a new repository a private one.

    Returns:
        ``OWNER/REPO@COMMIT``, or the folder.

    Raises:
        UserError: if the place cannot be written, or holds something else.
    """
    local = is_folder(place)
    if not local and "@" in place:
        raise UserError(f"a push goes to a repository's main branch; write {place.partition('@')[0]}")
    own = belonging(records, config)
    entry = zoo.parse(config.defense).entry
    files = {f"{RECORDS}/{record.file_name(r)}": record.to_json(r).encode() for r in own}
    files |= {CARD: model_card(config, entry, own, None if local else place).encode(), STATE: content}
    # What describes the weights comes last.
    files |= {CONFIG: weights.to_json(config).encode()}
    if local:
        return str(_export(files, Path(place).expanduser()))
    api = _api(cache)
    with _hub_errors(api, place):
        api.create_repo(place, private=private, exist_ok=True)
        there = api.list_repo_files(place)
        if set(there) - {".gitattributes"} and not (CONFIG in there and _describes_weights(Path(api.hf_hub_download(place, CONFIG)))):
            raise UserError(f"{place} holds something else than weights of robench; name an empty repository or one that is not there")
        stale = [name for name in there if name.startswith(f"{RECORDS}/") and name not in files]
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete]
        operations = [*(CommitOperationAdd(name, text) for name, text in files.items()), *map(CommitOperationDelete, stale)]
        commit = api.create_commit(place, operations, commit_message=f"{config.defense} on {config.dataset}, {config.scale}")
    return f"{place}@{commit.oid}"


def belonging(records: Sequence[Record], config: Config) -> list[Record]:
    """Return the records of exactly these weights, as the defense is now and on the data set that it was trained for."""
    wanted = (config.defense, config.version, config.weights_sha256, config.seed, config.dataset, config.scale)
    return [
        r for r in records
        if (r.defense.name, r.defense.version, r.defense.weights_sha256, r.defense.training_seed, r.dataset.name, r.scale) == wanted
    ]  # fmt: skip


def pull(place: str, *, cache: Path, progress: Progress = lambda _line: None) -> Pulled:
    """Take weights from a repository, at the commit that the revision is now, or from a folder, check them and put them into the cache.

    `weights.find` has them then. Weights of the same defense, data set, scale and seed that were pulled before are replaced.

    Args:
        place: ``OWNER/REPO``, ``OWNER/REPO@REVISION`` (a branch, a tag or a commit), or a folder.
        cache: the cache folder.
        progress: is told what is done.

    Raises:
        UserError: if there is no such place, it holds no weights, or these do not pass the checks of `weights.load`.
    """
    if is_folder(place):
        folder, source = Path(place).expanduser(), f"the folder {Path(place).expanduser().resolve().name}"
    else:
        folder, source = _download(place, cache, progress)
    dataset = weights.read_config(folder / CONFIG).dataset
    try:
        split, unchecked = data.load(dataset, "train"), None
    except UserError as error:
        split, unchecked = None, f"outputs and training images, until the data are here ({error})"
    config = weights.load(folder, split).config.model_copy(update={"source": source})
    records = record.load_folder(folder / RECORDS) if (folder / RECORDS).is_dir() else []
    if len(belonging(records, config)) != len(records):
        raise UserError(f"{source} has records of other weights than its own; nothing was taken from it")
    kept = cache / FOLDER / weights.folder_name(config.defense, config.dataset, config.scale, config.seed)
    weights.save(kept, config, (folder / STATE).read_bytes())
    return Pulled(config, kept, records, unchecked)


def _describes_weights(path: Path) -> bool:
    try:
        return bool(weights.read_config(path))
    except UserError:
        return False


def _export(files: dict[str, bytes], folder: Path) -> Path:
    if folder.is_dir() and any(folder.iterdir()) and not _describes_weights(folder / CONFIG):
        raise UserError(f"the folder {folder} holds something else than weights; name an empty one or one that is not there")
    for path in folder.glob(f"{RECORDS}/*.json"):
        path.unlink()
    for name, content in files.items():
        write_atomic(folder / name, content)
    return folder


def _download(place: str, cache: Path, progress: Progress) -> tuple[Path, str]:
    """Return the folder of a repository's files at a commit, and ``OWNER/REPO@COMMIT``."""
    repository, _, revision = place.partition("@")
    api = _api(cache)
    with _hub_errors(api, repository, revision):
        info = api.model_info(repository, revision=revision or None)
        names = api.list_repo_files(repository, revision=info.sha)
        wanted = [n for n in names if n in (STATE, CONFIG) or re.fullmatch(rf"{RECORDS}/[^/]+\.json", n)]
        if missing := [n for n in (CONFIG, STATE) if n not in wanted]:
            raise _AbsentError(f"{repository} holds no weights of robench: there is no {' and no '.join(missing)}")
        for name in wanted:
            progress(f"{repository}@{info.sha}: {name}")
            path = Path(api.hf_hub_download(repository, name, revision=info.sha, cache_dir=cache / "hub"))
            if name == CONFIG:
                folder = path.parent
    return folder, f"{repository}@{info.sha}"


class _AbsentError(UserError):
    """A repository without weights."""


def _api(cache: Path) -> HfApi:
    # The part of the library that is not in Python takes its folder from the environment alone.
    os.environ.setdefault("HF_XET_CACHE", str(cache / "hub" / "xet"))
    # Asked for at each call; the library reads it once, when it is imported.
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="robench")


@contextlib.contextmanager
def _hub_errors(api: HfApi, repository: str, revision: str = "") -> Iterator[None]:
    """Make one clear line of whatever the hub, the network or the library says, and keep the library's progress bars away."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # huggingface_hub 1 uploads in a way that httpx has since deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    except _AbsentError:
        raise
    except RevisionNotFoundError as error:
        raise UserError(f"{repository} on {api.endpoint} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{api.endpoint} has no repository {repository}, or $HF_TOKEN does not let you see it") from error
    except (httpx.HTTPError, EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        reason = f"{type(cause).__name__}: {cause}".strip().splitlines()[0]
        raise UserError(f"the hub {api.endpoint} did not do what was asked of {repository} ({reason})") from error
    finally:
        if shown:
            enable_progress_bars()
