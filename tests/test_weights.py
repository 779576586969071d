"""Shared weights: what describes them, where they are found, and that they are used only for what they were trained for."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from robench import claim, data, demo, targets, weights, zoo
from robench.cli import main
from robench.errors import OutOfTimeError, UserError
from robench.fingerprint import reference_logits, state_hash
from robench.recipe import Stage
from robench.targets import Target
from robench.weights import CONFIG, STATE, Config, MisfitError
from robench.workbench import Workbench

Tiny = Callable[..., None]
SPLIT = data.load("digits", "train")
SETTING = targets.setting_for(SPLIT, "smoke", 0)


def trained(cache: Path, lines: list[str] | None = None, text: str = "tiny", **options: Any) -> Target:
    lines = [] if lines is None else lines
    return targets.trained(zoo.parse(text), SPLIT, scale="smoke", cache=cache, progress=lines.append, **options)


def share(cache: Path, folder: Path, text: str = "tiny") -> Path:
    """Train a defense in one cache, put its weights into a folder of such, and return where they are."""
    trained(cache, text=text)
    config, content = weights.kept(zoo.parse(text), SETTING, SPLIT, cache=cache, device="cpu")
    place = folder / weights.folder_name(config.defense, "digits", "smoke", 0)
    weights.save(place, config, content)
    return place


@pytest.fixture
def shared(tiny: Tiny, tmp_path: Path) -> Path:
    """The weights of `tiny`, in the cache ``there``, trained in the cache ``here``."""
    return share(tmp_path / "here", tmp_path / "there" / "weights")


def changed(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def test_shared_weights_are_used_instead_of_training(shared: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    here, there = trained(tmp_path / "here"), trained(tmp_path / "there", lines)
    assert lines == ["weights from the zoo"]
    assert state_hash(there.defense) == state_hash(here.defense)
    assert torch.equal(there.defense(data.as_float(SPLIT.images[:9])), here.defense(data.as_float(SPLIT.images[:9])))
    assert here.training is not None
    assert there.training == here.training | {"weights": "from the zoo"}
    assert not (tmp_path / "there" / "training").exists()
    assert not there.defense.training


def test_the_config_says_what_the_weights_are(shared: Path) -> None:
    config = weights.read_config(shared / CONFIG)
    assert (config.defense, config.version, config.paper, config.setting) == ("tiny,k=2", 1, "1234.56789", SETTING)
    assert (config.fingerprint, config.precision) == (SPLIT.fingerprint, ["float32"])
    assert config.training["stage 1"] == (
        "whole/all: 1 epochs, sgd 0.05 one-cycle, batch 128, clean images, clean weight 0.0, float32"
    )  # fmt: skip
    (stage,) = config.stages
    assert Stage(**stage | {"recipe": None, "trainable": ()}).seed == 0
    assert stage["recipe"]["epochs"] == 1
    defense = weights.load(shared, SPLIT).defense
    assert state_hash(defense) == config.weights_sha256
    assert torch.allclose(reference_logits(defense, SPLIT), torch.tensor(config.logits, dtype=torch.float64))


def test_the_record_says_the_precision_that_the_weights_were_trained_in(shared: Path, tmp_path: Path) -> None:
    stage = weights.read_config(shared / CONFIG).training["stage 1"]
    changed(shared, training={"stage 1": str(stage).replace("float32", "bfloat16")}, precision=["bfloat16"], source="a/b@c")
    training = trained(tmp_path / "there").training
    assert training is not None
    assert str(training["stage 1"]).endswith("bfloat16")
    assert training["weights"] == "from a/b@c"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("epochs=1", "epochs=2"), "trained by another recipe than it has here"),
        (("Stage(recipe, setting.seed)", "Stage(recipe, setting.seed + 1)"), "trained by another recipe than it has here"),
        (("version=1", "version=2"), "in version 1, and the version here is 2"),
        (("bias=True", "bias=False"), "with other layers than it has here"),
        (("mean_of_logits)", "lambda logits: 2 * logits.mean(1))"), "with other outputs than it gives here"),
    ],
    ids=["recipe", "seed", "version", "layers", "outputs"],
)
def test_weights_of_other_code_are_passed_over_with_the_reason(
    shared: Path, tiny: Tiny, tmp_path: Path, change: tuple[str, str], reason: str
) -> None:
    tiny(*change)
    lines: list[str] = []
    made = trained(tmp_path / "there", lines)
    assert lines[0] == f"the weights in {shared} are of tiny,k=2 {reason}; they are not used"
    assert "epoch 1" in lines[1]
    assert made.training is not None
    assert "weights" not in made.training
    # Nothing of the weights that were passed over is in what was trained.
    assert state_hash(made.defense) == state_hash(trained(tmp_path / "third").defense)


def test_weights_of_other_images_are_passed_over(shared: Path, tmp_path: Path) -> None:
    changed(shared, fingerprint="0" * 64)
    with pytest.raises(MisfitError, match="trained on other images than digits has here"):
        weights.load(shared, SPLIT)
    assert weights.load(shared, None).config.defense == "tiny,k=2"
    lines: list[str] = []
    trained(tmp_path / "there", lines)
    assert "they are not used" in lines[0]


def test_weights_under_another_defense_s_name_are_passed_over(shared: Path, tmp_path: Path) -> None:
    shared.rename(shared.with_name(weights.folder_name("tiny,k=3", "digits", "smoke", 0)))
    lines: list[str] = []
    trained(tmp_path / "there", lines, "tiny,k=3")
    assert "are of tiny,k=2 in another setting; they are not used" in lines[0]


def test_other_parameters_seeds_and_scales_are_other_weights(shared: Path, tmp_path: Path) -> None:
    settings = [("a,k=2", "d", "cpu", 0), ("a,k=3", "d", "cpu", 0), ("a,k=2", "e", "cpu", 0), ("a,k=2", "d", "gpu", 0)]
    names = {weights.folder_name(*setting) for setting in [*settings, ("a,k=2", "d", "cpu", 1), ("../a", "d", "cpu", 0)]}
    assert len(names) == 6
    assert not any("/" in name for name in names)
    lines: list[str] = []
    trained(tmp_path / "there", lines, seed=1)
    assert "epoch 1" in lines[0]


def test_a_changed_file_is_an_error_and_not_used(shared: Path, tmp_path: Path) -> None:
    content = bytearray((shared / STATE).read_bytes())
    content[-1] ^= 1
    (shared / STATE).write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors is corrupt: its SHA-256 is .*; get it anew$"):
        trained(tmp_path / "there")


def test_weights_of_another_hash_are_an_error(shared: Path, tmp_path: Path) -> None:
    changed(shared, weights_sha256="0" * 64)
    with pytest.raises(UserError, match=r"does not have the weights that config.json names \(SHA-256 0000"):
        trained(tmp_path / "there")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"schema_version": 2}, "schema_version: "), ({"weights_sha256": "x"}, "weights_sha256: "), ({"extra": 1}, "extra: ")],
)
def test_a_config_that_is_none_is_one_line(shared: Path, changes: dict[str, Any], reason: str) -> None:
    changed(shared, **changes)
    with pytest.raises(UserError, match=f"config.json does not describe weights: {reason}"):
        weights.load(shared, SPLIT)


def test_a_folder_without_weights_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^there are no weights in {tmp_path}: cannot read config.json"):
        weights.load(tmp_path, SPLIT)


def test_weights_beside_the_plugin_file_are_found_and_the_caches_own_come_first(tiny: Tiny, tmp_path: Path) -> None:
    beside = share(tmp_path / "here", tmp_path / "plugin" / "weights")
    lines: list[str] = []
    trained(tmp_path / "there", lines)
    assert lines == ["weights from the zoo"]
    pulled = tmp_path / "there" / "weights" / beside.name
    weights.save(pulled, weights.read_config(beside / CONFIG).model_copy(update={"source": "a/b@c"}), (beside / STATE).read_bytes())
    trained(tmp_path / "there", lines)
    assert lines[1] == "weights from a/b@c"
    trained(tmp_path / "there", lines, ready_made=False)
    assert "epoch 1" in lines[2]


def test_nothing_is_trained_to_be_shared(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^tiny,k=2 is not trained yet for cpu; run: robench train tiny,k=2 --dataset digits --scale smoke "
    ):
        weights.kept(zoo.parse("tiny"), SETTING, SPLIT, cache=tmp_path, device="cpu")
    assert not (tmp_path / "training").exists()
    tiny(", (Stage(recipe, setting.seed),)", "")
    with pytest.raises(UserError, match="is not trained, so there are no weights to share"):
        weights.kept(zoo.parse("tiny"), SETTING, SPLIT, cache=tmp_path, device="cpu")


def test_train_takes_what_is_there_unless_asked_to_train(shared: Path, tmp_path: Path) -> None:
    def train(*options: str) -> Result:
        arguments = ["train", "tiny", "--device", "cpu", "--cache-dir", str(tmp_path / "there"), *options]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        return result

    # The second time, what the first left in the cache is not taken either.
    taken, anew, again = train(), train("--fresh"), train("--fresh")
    assert "epoch" not in taken.stderr
    assert "from the zoo" in taken.stdout
    assert "kept in" not in taken.stdout
    for result in (anew, again):
        assert "epoch 1/1" in result.stderr
        assert "kept in" in result.stdout
    # The same training gives the same weights, which is what --fresh is for.
    hashes = {line for result in (taken, anew, again) for line in result.stdout.splitlines() if "SHA-256" in line}
    assert len({line.split()[-1] for line in hashes}) == 1


def test_what_was_trained_anew_is_used_until_the_next_pull(shared: Path, tmp_path: Path) -> None:
    """It would be evaluated and pushed under the hash of other weights, as a machine of another kind makes of the same training."""
    cache, lines = tmp_path / "there", list[str]()
    config, content = weights.read_config(shared / CONFIG).model_copy(update={"source": "a/b@c"}), (shared / STATE).read_bytes()
    weights.save(shared, config, content)
    trained(cache, anew=True)
    made = trained(cache, lines)
    assert lines == ["stage 1/1 already trained"]
    assert made.training is not None
    assert "weights" not in made.training
    assert weights.kept(zoo.parse("tiny"), SETTING, SPLIT, cache=cache, device="cpu")[0].training == made.training
    weights.save(shared, config, content)
    trained(cache, lines)
    assert lines[1:] == ["weights from a/b@c"]


def test_weights_that_were_half_written_over_others_are_none(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, real = weights.read_config(shared / CONFIG), weights.write_atomic

    def killed(path: Path, content: str | bytes) -> None:
        if path.name == CONFIG:
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(weights, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        weights.save(shared, config, b"other weights")
    lines: list[str] = []
    trained(tmp_path / "there", lines)
    assert not any("corrupt" in line for line in lines)
    assert any("epoch 1/1" in line for line in lines)


@pytest.mark.parametrize("stopped", [True, False])
def test_a_fresh_training_that_was_stopped_changes_nothing(shared: Path, tmp_path: Path, stopped: bool) -> None:
    lines: list[str] = []
    with contextlib.suppress(OutOfTimeError):
        trained(tmp_path / "there", anew=True, stop=lambda: stopped)
    trained(tmp_path / "there", lines)
    assert lines == (["weights from the zoo"] if stopped else ["stage 1/1 already trained"])


# --- what comes with the zoo

zoo.entries()  # makes robench_zoo importable by its entry point's name
from robench_zoo import fixtures  # noqa: E402

FOLDERS = sorted(path.parent for path in fixtures.WEIGHTS.glob(f"*/{CONFIG}"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_fixture_is_what_its_config_says(folder: Path) -> None:
    try:
        found = weights.load(folder, SPLIT)
    except UserError as error:
        pytest.fail(f"{error}; run make fixtures", pytrace=False)
    config = found.config
    assert folder.name == weights.folder_name(config.defense, config.dataset, config.scale, config.seed)
    assert config.precision == ["float32"] * len(found.stages)
    test = data.load("digits", "test")
    with torch.no_grad():
        correct = found.defense(data.as_float(test.images)).argmax(1) == test.labels
    assert float(correct.float().mean()) > 0.8


def test_the_fixtures_are_those_named_and_under_a_megabyte() -> None:
    configs = [weights.read_config(folder / CONFIG) for folder in FOLDERS]
    assert sorted(c.defense for c in configs) == sorted(zoo.parse(name).text for name in fixtures.NAMES), "run make fixtures"
    assert {(c.dataset, c.scale, c.seed) for c in configs} == {("digits", "smoke", 0)}
    assert sum(path.stat().st_size for path in fixtures.WEIGHTS.rglob("*") if path.is_file()) < 1_000_000
    claimed = {zoo.parse(a.defense).text for c in claim.discover() for t in c.trials if t.dataset == "digits" for _, a in t.quantity.terms}
    assert {c.defense for c in configs} <= claimed


def test_a_fixture_is_taken_by_default_and_never_by_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    taken = Workbench("digits", "smoke", cache=tmp_path, progress=lines.append).target("single_adv")
    assert lines == ["training single_adv: weights from the zoo"]
    assert state_hash(taken.defense) in {weights.read_config(folder / CONFIG).weights_sha256 for folder in FOLDERS}
    made: list[bool] = []
    monkeypatch.setattr(Workbench, "find", lambda bench, *_: made.append(bench.ready_made))
    monkeypatch.setattr(demo, "curve_records", lambda bench, _: made.append(bench.ready_made))
    demo._prepare_one("single_adv", [claim.Accuracy("single_adv")], tmp_path, type("Lines", (), {"put": print})())
    assert made == [False, False]


def test_the_script_makes_what_is_found(tiny: Tiny, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        for name in ("one", "two"):
            fixtures.make(tmp_path / name, ("tiny", "tiny,k=3"))
    finally:
        torch.set_num_threads(threads)
    one, two = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in ("one", "two")
    )
    assert one == two
    assert len(one) == 4
    assert isinstance(weights.load(next((tmp_path / "one").glob("digits-tiny,k=3*")), SPLIT).config, Config)
