"""Weights pushed to a hub of this machine and to a folder, and pulled from there: card, records, pinned commit, checks, clear errors."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard

from robench import accuracies, record, weights
from robench.cli import main
from robench.record import Record
from tests.fake_hub import TOKEN, FakeHub

Robench = Callable[..., Result]
REPOSITORY = "someone/tiny-digits"


@pytest.fixture
def robench(tiny: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Robench:
    """Run the command line in this process, in an empty folder, with the cache ``here`` unless another is given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROBENCH_CACHE", "here")
    monkeypatch.delenv("ROBENCH_DATA", raising=False)

    def run(*arguments: str, fails: bool = False) -> Result:
        result = CliRunner().invoke(main, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert (result.exit_code != 0) == fails, result.output
        return result

    return run


@pytest.fixture
def trained(robench: Robench) -> Record:
    """`tiny`, trained and measured once in the cache ``here``, its record in the folder ``records``."""
    robench("train", "tiny", "--device", "cpu")
    robench("evaluate", "tiny", "--attack", "pgd-3", "--n", "40", "--threat", "Linf:16/255", "--device", "cpu", "--records", "records")
    (made,) = record.load_folder(Path("records"))
    return made


def push(robench: Robench, *options: str, to: str = REPOSITORY) -> str:
    """Push and return where to."""
    result = robench("weights", "push", "tiny", "--to", to, "--records", "records", "--device", "cpu", *options)
    return facts(result)["pushed to"]


def facts(result: Result) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition("  ") for line in result.stdout.splitlines())}


def error_line(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("robench: error: ")
    assert "Traceback" not in result.stderr
    return line.removeprefix("robench: error: ")


def test_what_is_pushed_is_pulled_and_evaluated_alike(robench: Robench, trained: Record, hub: FakeHub) -> None:
    pushed = push(robench)
    commit, files = hub.files(REPOSITORY) or ("", {})
    assert pushed == f"{REPOSITORY}@{commit}"
    assert set(files) == {".gitattributes", "README.md", "config.json", "model.safetensors", f"records/{record.file_name(trained)}"}
    config = json.loads(files["config.json"])
    assert config["file_sha256"] == hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert config["weights_sha256"] == trained.defense.weights_sha256
    # As a large file, which the hub keeps by its hash.
    assert list(hub.large.values()) == [files["model.safetensors"]]
    pulled = robench("weights", "pull", REPOSITORY, "--cache-dir", "there", "--records", "got")
    assert facts(pulled)["pulled from"] == pushed
    assert facts(pulled)["weights"] == f"SHA-256 {trained.defense.weights_sha256}"
    assert record.load_folder(Path("got")) == [trained]
    again = robench(
        "evaluate", "tiny", "--attack", "pgd-3", "--n", "40", "--threat", "Linf:16/255", "--device", "cpu", "--json", "-",
        "--cache-dir", "there",
    )  # fmt: skip
    made = Record.model_validate_json(again.stdout)
    assert f"weights from {pushed}" in again.stderr
    assert "epoch" not in again.stderr
    assert made.outcomes == trained.outcomes
    assert made.defense == trained.defense
    assert made.training is not None
    assert trained.training is not None
    assert made.training == trained.training | {"weights": f"from {pushed}"}
    assert facts(robench("train", "tiny", "--device", "cpu", "--cache-dir", "there"))["weights"].startswith("SHA-256 ")
    assert not Path("there/training").exists()


def test_a_folder_serves_as_a_hub(robench: Robench, trained: Record) -> None:
    assert push(robench, to="./shared") == "shared"
    assert sorted(str(path.relative_to("shared")) for path in Path("shared").rglob("*") if path.is_file()) == [
        "README.md", "config.json", "model.safetensors", f"records/{record.file_name(trained)}",
    ]  # fmt: skip
    pulled = robench("weights", "pull", "./shared", "--cache-dir", "there")
    assert facts(pulled)["pulled from"] == "the folder shared"
    result = robench("evaluate", "tiny", "--attack", "fgsm", "--n", "5", "--device", "cpu", "--cache-dir", "there")
    assert "weights from the folder shared" in result.stderr
    (Path("other") / "x").mkdir(parents=True)
    refused = robench("weights", "push", "tiny", "--to", "./other", "--device", "cpu", fails=True)
    assert "the folder other holds something else than weights" in error_line(refused)
    (Path("other") / "config.json").write_text("{}")
    refused = robench("weights", "push", "tiny", "--to", "./other", "--device", "cpu", fails=True)
    assert "the folder other holds something else than weights" in error_line(refused)
    assert (Path("other") / "config.json").read_text() == "{}"


def test_another_models_repository_is_left_as_it_is(robench: Robench, trained: Record, hub: FakeHub) -> None:
    own = {"config.json": b'{"architectures": ["ResNet"]}', "model.safetensors": b"x", "README.md": b"Another."}
    hub.commit("me/resnet", own)
    refused = robench("weights", "push", "tiny", "--to", "me/resnet", "--device", "cpu", fails=True)
    assert "me/resnet holds something else than weights of robench" in error_line(refused)
    found = hub.files("me/resnet")
    assert found is not None
    assert found[1] == own


def test_a_revision_is_pinned(robench: Robench, tiny: Callable[..., None], trained: Record, hub: FakeHub) -> None:
    first = push(robench)
    tiny("epochs=1", "epochs=2")
    robench("train", "tiny", "--device", "cpu")
    second = push(robench)
    assert first != second
    _, files = hub.files(REPOSITORY) or ("", {})
    # The record of the first weights is not one of the second.
    assert not [name for name in files if name.startswith("records/")]
    assert b"nothing is claimed of their robustness" in files["README.md"]
    assert facts(robench("weights", "pull", REPOSITORY, "--cache-dir", "there"))["pulled from"] == second
    refused = robench("weights", "pull", first, "--cache-dir", "there", fails=True)
    assert "are of tiny,k=2 trained by another recipe than it has here" in error_line(refused)
    tiny()
    assert facts(robench("weights", "pull", first, "--cache-dir", "there"))["pulled from"] == first


def test_a_large_file_is_uploaded_once_and_a_new_repository_may_be_private(robench: Robench, trained: Record, hub: FakeHub) -> None:
    assert push(robench, "--private").startswith(f"{REPOSITORY}@")
    assert hub.private == {REPOSITORY: True}
    large = [request for request in hub.requests if request.startswith("PUT")]
    push(robench)
    assert [request for request in hub.requests if request.startswith("PUT")] == large


def test_the_card_has_the_records_numbers_and_says_upper_bound(robench: Robench, trained: Record, hub: FakeHub) -> None:
    strong = trained.model_copy(
        update={
            "attack": trained.attack.model_copy(update={"name": "apgd-ce"}),
            "outcomes": trained.outcomes.model_copy(update={"robust": [0] * 40}),
            "robust_accuracy": record.Proportion.of(record.Estimate.of([0.0] * 40)),
        }
    )
    other = trained.model_copy(update={"defense": trained.defense.model_copy(update={"weights_sha256": "0" * 64}), "seed": 7})
    elsewhere = trained.model_copy(update={"dataset": trained.dataset.model_copy(update={"name": "digits-of-another-kind"})})
    earlier = trained.model_copy(update={"defense": trained.defense.model_copy(update={"version": 99}), "seed": 8})
    for made in (strong, other, elsewhere, earlier):
        record.save(made, Path("records"))
    push(robench)
    _, files = hub.files(REPOSITORY) or ("", {})
    assert len([name for name in files if name.startswith("records/")]) == 2
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("robench", "image-classification")
    assert "arxiv:1234.56789" in card.data.tags
    assert card.data.eval_results is not None
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["robust accuracy, upper bound: apgd-ce within Linf:16/255"] == 0.0
    assert values["robust accuracy, upper bound: pgd-3 within Linf:16/255"] == trained.robust_accuracy.value
    assert values["clean accuracy"] == trained.clean_accuracy.value
    robust, clean = accuracies.robust_estimate(trained), accuracies.clean_estimate(trained)
    rows = [" ".join(line.split()) for line in card.text.splitlines() if "Linf" in line]
    assert f"| Linf:16/255 | `pgd-3` | 40 | {clean} | ≤ {robust} |" in rows
    assert f"| Linf:16/255 | the worst of these on each example | 40 | | ≤ {accuracies.robust_estimate(strong)} |" in rows
    assert "Robust accuracy is an upper bound" in card.text
    assert "```bibtex\n@misc{tiny, title = {A tiny paper}}\n```" in card.text
    assert trained.defense.weights_sha256 in card.text
    assert "its numbers are not the paper's" in card.text
    assert f"robench weights pull {REPOSITORY}\n" in card.text


def tampered(hub: FakeHub, **changes: bytes) -> None:
    _, files = hub.files(REPOSITORY) or ("", {})
    hub.commit(REPOSITORY, files | {name.replace("_", "."): content for name, content in changes.items()})


def test_weights_that_do_not_pass_are_not_placed(robench: Robench, trained: Record, hub: FakeHub) -> None:
    push(robench)
    _, files = hub.files(REPOSITORY) or ("", {})
    content = bytearray(files["model.safetensors"])
    content[-1] ^= 1
    tampered(hub, model_safetensors=bytes(content))
    assert "model.safetensors is corrupt: its SHA-256 is" in error_line(robench("weights", "pull", REPOSITORY, fails=True))
    config = json.loads(files["config.json"]) | {"file_sha256": hashlib.sha256(content).hexdigest()}
    tampered(hub, config_json=json.dumps(config).encode())
    assert "does not have the weights that config.json names" in error_line(robench("weights", "pull", REPOSITORY, fails=True))
    tampered(hub, config_json=json.dumps(config | {"defense": "tinny"}).encode())
    assert "unknown defense 'tinny' (did you mean 'tiny'" in error_line(robench("weights", "pull", REPOSITORY, fails=True))
    tampered(hub, config_json=b"{}")
    assert "config.json does not describe weights" in error_line(robench("weights", "pull", REPOSITORY, fails=True))
    other = trained.model_copy(update={"defense": trained.defense.model_copy(update={"weights_sha256": "0" * 64})})
    hub.commit(REPOSITORY, files | {"records/other.json": record.to_json(other).encode()})
    assert "has records of other weights than its own; nothing was taken from it" in error_line(
        robench("weights", "pull", REPOSITORY, fails=True)
    )
    hub.commit(REPOSITORY, {"README.md": b"nothing"})
    assert "holds no weights of robench: there is no config.json and no model.safetensors" in error_line(
        robench("weights", "pull", REPOSITORY, fails=True)
    )
    assert not Path("here/weights").exists()


def test_files_beside_the_weights_are_left_on_the_hub(robench: Robench, trained: Record, hub: FakeHub) -> None:
    push(robench)
    _, files = hub.files(REPOSITORY) or ("", {})
    hub.commit(REPOSITORY, files | {"setup.py": b"1 / 0", "records/deep/x.json": b"{}", "pytorch_model.bin": b"a pickle"})
    robench("weights", "pull", REPOSITORY, "--cache-dir", "there")
    assert not [request for request in hub.requests if any(name in request for name in ("setup.py", "deep", "pytorch_model"))]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pull", "nobody/nothing"], "has no repository nobody/nothing, or $HF_TOKEN does not let you see it"),
        (["pull", "nothing"], "'nothing' is neither OWNER/REPO on a hub nor a folder, which is written ./nothing"),
        (["pull", "./nothing"], "there are no weights in nothing: cannot read config.json"),
        (["push", "tiny", "--to", "a/b/c"], "'a/b/c' is neither OWNER/REPO on a hub nor a folder"),
        (["push", "tiny", "--to", "a/b@main"], "a push goes to a repository's main branch; write a/b"),
        (["push", "tiny", "--seed", "3", "--to", "a/b"], "is not trained yet for cpu; run: robench train tiny,k=2 --dataset digits"),
        (["push", "tinny", "--to", "a/b"], "unknown defense 'tinny'"),
        (["push", "tiny", "--to", "a/b", "--records", "nowhere"], "the folder of records nowhere does not exist"),
        (["push", "tiny"], "Missing option '--to'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(robench: Robench, trained: Record, hub: FakeHub, arguments: list[str], expected: str) -> None:
    device = ["--device", "cpu"] if arguments[0] == "push" else []
    assert expected in error_line(robench("weights", *arguments, *device, fails=True))
    assert hub.repositories == {}


def test_what_a_hub_refuses_is_one_line(robench: Robench, trained: Record, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    push(robench)
    assert f"has no revision '{'0' * 40}'" in error_line(robench("weights", "pull", f"{REPOSITORY}@{'0' * 40}", fails=True))
    monkeypatch.setenv("HF_TOKEN", "hf_of_another_hub")
    refused = robench("weights", "push", "tiny", "--to", "someone/else", "--device", "cpu", fails=True)
    assert f"the hub {hub.address} did not do what was asked of someone/else" in error_line(refused)
    assert "401" in refused.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        assert "ConnectError" in error_line(robench("weights", "pull", REPOSITORY, fails=True))


def test_weights_of_absent_data_are_pulled_with_a_word_on_what_was_not_checked(robench: Robench, trained: Record, hub: FakeHub) -> None:
    push(robench)
    _, files = hub.files(REPOSITORY) or ("", {})
    hub.commit(REPOSITORY, {name: content for name, content in files.items() if not name.startswith("records/")})
    tampered(hub, config_json=json.dumps(json.loads(files["config.json"]) | {"dataset": "cifar10"}).encode())
    pulled = facts(robench("weights", "pull", REPOSITORY, "--cache-dir", "there"))
    assert pulled["not checked"].startswith("outputs and training images, until the data are here (")
    assert weights.read_config(Path(pulled["kept in"]) / "config.json").dataset == "cifar10"


def test_nothing_is_written_outside_the_cache(trained: Record, hub: FakeHub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment: dict[str, Any] = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": str(home), "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}

    def process(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", "robench", "weights", *arguments, "--plugin", "plugin/tiny.py"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120)

    for arguments in (("push", "tiny", "--to", REPOSITORY, "--device", "cpu", "--cache-dir", "here"),
                      ("pull", REPOSITORY, "--cache-dir", "there")):  # fmt: skip
        done = process(*arguments)
        assert done.returncode == 0, done.stderr
        assert f"{REPOSITORY}@" in done.stdout
    assert not [path for path in home.rglob("*") if path.is_file()]
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"hub", "weights"}
