"""The command line: what it prints and writes, its exit codes, and one clear line for every bad input."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from robench import accuracies, attacks, console, demo, record, zoo
from robench.cli import main
from robench.record import Record

MODELS = """
import torch
from torch import nn

def build(classes=10, scale=1.0):
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, classes))
    weights = torch.arange(768 * classes).reshape(classes, 768)
    with torch.no_grad():
        network[1].weight.copy_(scale * torch.sin(weights * 0.7))
        network[1].bias.zero_()
    return network

def seven_classes():
    return build(7)

def not_a_number():
    return build(scale=float("nan"))

class Fails(nn.Module):
    def forward(self, x):
        raise KeyError("a key")

class TwoOutputs(nn.Module):
    def forward(self, x):
        return x, x
"""

PLUGIN = """
from torch import nn
from robench.aggregate import mean_of_logits
from robench.defense import Ensemble
from robench.zoo import Paper, Specimen, register

@register(paper=Paper("A plugin's paper", "1234.56789", "", "plugin"), version=3)
def {name}(setting, *, members: int = 2):
    \"\"\"Untrained linear networks.\"\"\"
    channels, height, width = setting.image_shape
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, setting.classes)) for _ in range(members)]
    return Specimen(Ensemble(networks, mean_of_logits))
"""

Robench = Callable[..., Result]


@pytest.fixture
def robench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Robench:
    """Run the command line in this process, in an empty folder with an empty cache."""
    monkeypatch.setenv("ROBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ROBENCH_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODELS)

    def run(*arguments: str) -> Result:
        result = CliRunner().invoke(main, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def evaluate(robench: Robench) -> Robench:
    """Evaluate a linear network of a file on 20 digits; further options follow."""

    def run(*options: str, target: str = "models.py:build") -> Result:
        return robench("evaluate", target, "--attack", "pgd-5", "--n", "20", "--device", "cpu", *options)

    return run


def error_line(result: Result) -> str:
    """Return the one line on stderr of a command that ended with exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    start = "robench: error: "
    assert line.startswith(start)
    return line.removeprefix(start)


def process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m robench`` in its own process."""
    environment = os.environ | {"ROBENCH_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "robench", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=550)


# --- lists


def test_help_names_every_command(robench: Robench) -> None:
    result = robench("--help")
    assert result.exit_code == 0
    for command in ("demo", "zoo", "train", "evaluate", "doctor", "weights", "leaderboard", "claims", "data"):
        assert f"  {command} " in result.stdout


def test_zoo_list_as_json_has_every_defense(robench: Robench) -> None:
    listed = json.loads(robench("zoo", "list", "--json").stdout)
    entries = zoo.entries()
    assert {d["name"] for d in listed["defenses"]} == {name for name, entry in entries.items() if entry.alias_of is None}
    natural = next(d for d in listed["defenses"] if d["name"] == "natural")
    assert natural["aliases"] == ["baseline"]
    assert natural["version"] == entries["natural"].version
    assert natural["paper"]["arxiv"] == "1811.09300"
    assert "strength_in_numbers" in natural["origin"]
    average = next(d for d in listed["defenses"] if d["name"] == "robust_average")
    assert average["parameters"] == entries["robust_average"].defaults()
    assert listed["failures"] == []


def test_zoo_list_as_a_table_names_every_defense(robench: Robench) -> None:
    words = robench("zoo", "list").stdout.replace(",", " ").split()
    assert set(zoo.entries()) <= set(words)


def test_data_list_says_how_to_get_what_is_absent(robench: Robench) -> None:
    lines = robench("data", "list").stdout.splitlines()
    assert lines[0].startswith("digits")
    assert [line.split("  ")[-1].strip() for line in lines[1:3]] == [
        f"absent; get it with: robench data fetch {name}" for name in ("cifar10", "cifar100")
    ]


def test_data_add_and_evaluate_on_it(robench: Robench, evaluate: Robench, tmp_path: Path) -> None:
    from PIL import Image

    for label in ("one", "two"):
        (tmp_path / "mine" / label).mkdir(parents=True)
        for shade in (40, 200):
            Image.new("RGB", (16, 16), (shade, shade, 0)).save(tmp_path / "mine" / label / f"{shade}.png")
    assert robench("data", "add", "mine", "--from", "mine").exit_code == 0
    assert "mine" in robench("data", "list").stdout
    # The network has ten outputs.
    assert "needs logits of shape (batch, 2)" in error_line(robench("evaluate", "models.py:build", "--dataset", "mine"))


# --- evaluate


def test_evaluate_prints_what_the_record_says(evaluate: Robench, tmp_path: Path) -> None:
    result = evaluate("--records", "records", "--json", "out/record.json", "--seed", "3", "--threat", "L2:0.5")
    assert result.exit_code == 0
    (path,) = (tmp_path / "records").iterdir()
    made = record.load(path)
    assert record.load(tmp_path / "out" / "record.json") == made
    assert (made.seed, made.threat, made.dataset.n, made.scale) == (3, "L2:0.5", 20, "smoke")
    assert (made.defense.name, made.defense.origin) == ("models.py:build", "file")
    facts = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    assert facts["clean accuracy"].strip() == str(accuracies.clean_estimate(made))
    assert facts["robust accuracy"].strip() == f"≤ {accuracies.robust_estimate(made)}"
    assert facts["cost per image"].strip().startswith(f"{made.cost.forwards:.1f} forwards, {made.cost.backwards:.1f} backwards")
    assert "20/20 examples" in result.stderr


def test_evaluate_saves_nothing_but_its_progress_unless_asked(evaluate: Robench, tmp_path: Path) -> None:
    assert evaluate().exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "models.py"}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"evaluations"}


def test_json_on_stdout_is_the_record_alone(evaluate: Robench) -> None:
    result = evaluate("--json", "-")
    assert {"value", "low", "high", "n"} == json.loads(result.stdout)["robust_accuracy"].keys()
    assert "robust accuracy" in result.stderr
    Record.model_validate_json(result.stdout)


@pytest.mark.parametrize("budget", [("--max-passes", "1"), ("--time", "0.000001")])
def test_an_evaluation_within_a_budget_says_that_it_is_partial(evaluate: Robench, budget: tuple[str, str]) -> None:
    result = evaluate("--batch-size", "8", "--json", "-", *budget)
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["robust_accuracy"]["n"] == made["dataset"]["n"] == 8
    assert made["partial"].startswith("stopped after 8 of 20 examples")
    assert f"partial          {made['partial']}" in result.stderr


def test_a_universal_perturbation_is_drawn(robench: Robench, tmp_path: Path) -> None:
    options = ("--attack", "universal,steps=3,images=20", "--n", "10", "--device", "cpu", "--figure", "figures/delta.png")
    result = robench("evaluate", "models.py:build", *options)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "figures" / "delta.png").read_bytes().startswith(b"\x89PNG")


def test_the_stages_of_an_attack_are_shown(robench: Robench) -> None:
    result = robench("evaluate", "models.py:build", "--attack", "autoattack,steps=3,queries=3", "--n", "10", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "\n  first fooled by apgd-ce" in result.stdout


def test_the_same_command_gives_the_same_record(evaluate: Robench, tmp_path: Path) -> None:
    runs = [evaluate("--json", "-", "--cache-dir", cache) for cache in ("one", "two", "two")]
    first, again, resumed = (record.identity(Record.model_validate_json(run.stdout)) for run in runs)
    assert first == again == resumed
    assert (tmp_path / "two" / "evaluations").is_dir()
    other = evaluate("--json", "-", "--seed", "1")
    assert record.identity(Record.model_validate_json(other.stdout)) != first


def test_a_random_defense_is_shown_with_its_three_readings(make_record: Callable[..., Record]) -> None:
    made = make_record([1, 0.5, 0], defense={"random": True}, controls={"tiny budget": 0.75})
    facts = dict(console.outcome(made))
    assert {"  mean of 10 draws", "  majority vote of 10 draws", "  worst of 10 draws"} < facts.keys()
    assert facts["  mean of 10 draws"].startswith("50.0 % [")
    assert facts["  control, tiny budget"] == "75.0 %"
    assert facts["controls"] == "passed"
    assert "partial" not in facts
    assert dict(console.outcome(make_record([1, 0], partial="2 of 100")))["partial"] == "2 of 100"


def test_the_precision_can_be_chosen(robench: Robench, tmp_path: Path) -> None:
    for precision in ("float32", "bfloat16"):
        result = robench("evaluate", "natural", "--attack", "fgsm", "--n", "5", "--precision", precision, "--json", f"{precision}.json")
        assert result.exit_code == 0
        assert record.load(tmp_path / f"{precision}.json").precision == precision


def test_train_makes_several_copies_of_so_many_epochs(robench: Robench) -> None:
    result = robench("train", "natural,epochs=1", "--seeds", "2", "--seed", "3")
    assert result.exit_code == 0
    seeds = [line for line in result.stdout.splitlines() if line.startswith("defense")]
    assert [("natural,epochs=1" in line, f"seed {seed})" in line) for line, seed in zip(seeds, (3, 4), strict=True)] == [(True, True)] * 2
    hashes = [line for line in result.stdout.splitlines() if "SHA-256" in line]
    assert len(set(hashes)) == 2


def test_a_training_budget_says_which_name_the_weights_have(robench: Robench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robench.training_budget._seconds_per_epoch", lambda *_: 20.0)
    result = robench("train", "natural", "--budget", "45s")
    assert result.exit_code == 0
    assert "natural,epochs=2 (" in result.stdout
    for arguments, message in (
        (["natural,epochs=3", "--budget", "45s"], "natural,epochs=3 has its epochs and --budget would choose them; leave one out"),
        (["natural", "--budget", "soon"], "'soon' is no duration above 0"),
        (["natural", "--budget", "5s"], "a budget of 5 s does not fit one epoch"),
    ):
        failed = robench("train", *arguments)
        assert failed.exit_code == 2
        assert message in failed.stderr


def test_train_then_evaluate_takes_the_trained_weights(robench: Robench) -> None:
    trained = robench("train", "natural", "--device", "cpu", "--seed", "1")
    assert trained.exit_code == 0
    assert "epoch" in trained.stderr
    made = robench("evaluate", "natural", "--training-seed", "1", "--attack", "fgsm", "--n", "5", "--device", "cpu", "--json", "-")
    assert "already trained" in made.stderr
    weights = Record.model_validate_json(made.stdout).defense.weights_sha256
    assert f"SHA-256 {weights}" in trained.stdout


# --- leaderboard and claims


@pytest.fixture
def saved(robench: Robench, make_record: Callable[..., Record], tmp_path: Path) -> Record:
    """A record of an attack that is newer now, in the default folder."""
    version = attacks.registered()["pgd"].version - 1
    made = make_record([1, 0, 1, 0], defense={"name": "natural", "version": 1}, attack={"version": version})
    record.save(made, tmp_path / "leaderboard" / "records")
    return made


def test_leaderboard_in_every_format(robench: Robench, saved: Record, tmp_path: Path) -> None:
    stale = f"pgd-20 was version {saved.attack.version}, now {saved.attack.version + 1}"
    row = json.loads(robench("leaderboard", "--format", "json").stdout)["rows"][0]
    assert (row["defense"]["name"], row["robust_accuracy"]["value"], row["stale"]) == ("natural", 0.5, [stale])
    (line,) = csv.DictReader(io.StringIO(robench("leaderboard", "--format", "csv").stdout))
    assert float(line["robust_accuracy"]) == 0.5
    assert "| natural (seed 0)" in robench("leaderboard", "--format", "md").stdout
    for text in (robench("leaderboard").stdout, robench("leaderboard", "--format", "table").stdout):
        assert "natural" in text
        assert "50.0 %" in text
    result = robench("leaderboard", "--format", "md", "--out", "board/rows.md")
    assert (result.exit_code, result.stdout) == (0, "")
    assert (tmp_path / "board" / "rows.md").read_text() == robench("leaderboard", "--format", "md").stdout


def test_leaderboard_filters(robench: Robench, saved: Record) -> None:
    def rows(*options: str) -> list[Any]:
        return list(json.loads(robench("leaderboard", "--format", "json", *options).stdout)["rows"])

    assert len(rows("--dataset", "digits", "--threat", "Linf:8/255")) == 1
    assert rows("--dataset", "cifar10") == []
    assert rows("--threat", "L2:0.5") == []


def test_claims_are_listed_with_their_protocol_and_not_yet_measured(robench: Robench) -> None:
    from robench import claim

    listed = json.loads(robench("claims", "--json").stdout)
    assert [c["name"] for c in listed] == [c.name for c in claim.discover()]
    assert all(c["protocol"] and c["published"] and c["paper"]["arxiv"] and c["verdicts"] == [] for c in listed)
    result = robench("claims")
    assert result.exit_code == 0
    assert "not measured" in result.stdout


# --- the demo's exit code


@pytest.mark.parametrize("code", [0, 1])
def test_demo_passes_its_exit_code_on(robench: Robench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int) -> None:
    def run(*, out: Path, cache: Path | None, echo: Callable[[str], None]) -> int:
        echo("a line of progress")
        assert (out, cache) == (Path("here"), tmp_path / "cache")
        return code

    monkeypatch.setattr(demo, "run", run)
    result = robench("demo", "--out", "here")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", "a line of progress\n")


def test_an_interrupt_is_one_line(robench: Robench, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    result = robench("demo")
    assert result.exit_code == 130
    assert result.stderr.strip() == "robench: interrupted; what was finished is kept in the cache"


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evaluat"], "Did you mean 'evaluate'?"),
        (["evaluate"], "Missing argument 'TARGET'"),
        (["evaluate", "natural", "--threta", "x"], "'--threat'"),
        (["evaluate", "natural", "--scale", "huge"], "'huge' is not one of 'smoke', 'cpu', 'gpu', 'paper'"),
        (["evaluate", "natural", "--seed", "-1"], "-1 is not in the range"),
        (["evaluate", "natural", "--batch-size", "0"], "0 is not in the range"),
        (["evaluate", "naturall"], "unknown defense 'naturall' (did you mean 'natural'"),
        (["evaluate", "robust_average,kk=2"], "has no parameter 'kk'"),
        (["evaluate", "models.py:build", "--attack", "pdg-20"], "did you mean 'pgd-N'"),
        (["evaluate", "models.py:build", "--dataset", "digts"], "did you mean 'digits'"),
        (["evaluate", "models.py:build", "--dataset", "cifar10"], "get it with: robench data fetch cifar10"),
        (["evaluate", "models.py:build", "--device", "cpuu"], "no device 'cpuu' here; it has cpu"),
        (["evaluate", "models.py:build", "--device", "cuda:99"], "no device 'cuda:99' here"),
        (["evaluate", "models.py:build", "--threat", "8/255"], "is not NORM:BUDGET"),
        (["evaluate", "models.py:build", "--threat", "Linf:eight"], "is no number"),
        (["evaluate", "models.py:build", "--threat", "Linf:-8/255"], "must be at least 0"),
        (["evaluate", "models.py:build", "--n", "100000"], "n = 100000 is not between 1 and"),
        (["evaluate", "models.py:build", "--n", "0"], "n = 0 is not between 1 and"),
        (["evaluate", "models.py:seven_classes"], "returns outputs of shape (16, 7)"),
        (["evaluate", "models.py:not_a_number"], "not finite"),
        (["evaluate", "models.py:Fails"], "fails on images of shape (16, 3, 16, 16) of digits: KeyError: 'a key'"),
        (["evaluate", "models.py:TwoOutputs"], "TwoOutputs does not fit digits: its forward returns an object of type tuple"),
        (["evaluate", "missing.py:build"], "there is no file missing.py"),
        (["evaluate", "models.py:biuld"], "did you mean 'build'"),
        (["evaluate", "models.py:build", "--plugin", "missing.py"], "plugin file missing.py does not exist"),
        (["evaluate", "models.py:build", "--cache-dir", "models.py"], "cannot write in the folder models.py"),
        (["evaluate", "models.py:build", "--records", "models.py"], "cannot write in the folder models.py"),
        (["evaluate", "models.py:build", "--json", "models.py/record.json"], "cannot write in the folder models.py"),
        (["train", "naturall"], "did you mean 'natural'"),
        (["train", "natural", "--cache-dir", "models.py"], "cannot write in the folder models.py"),
        (["train", "natural", "--dataset", "cifar10"], "get it with: robench data fetch cifar10"),
        (["leaderboard", "--format", "xml"], "'xml' is not one of"),
        (["leaderboard"], "the folder of records leaderboard/records does not exist"),
        (["claims", "--records", "nowhere"], "the folder of records nowhere does not exist"),
        (["data", "fetch", "cifar11"], "did you mean 'cifar10'"),
        (["data", "add", "mine", "--from", "nowhere"], "nowhere is not a folder"),
        (["evaluate", "natural", "--figure", "a.png"], "--figure draws what a universal attack learns"),
        (["evaluate", "natural", "--attack", "universal", "--figure", "a.txt"], "to a .png or .svg file"),
        (["evaluate", "natural", "--time", "0"], "--time"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(robench: Robench, arguments: list[str], expected: str) -> None:
    assert expected in error_line(robench(*arguments))


@pytest.mark.parametrize("command", ["leaderboard", "claims"])
def test_a_corrupt_record_is_named(robench: Robench, saved: Record, tmp_path: Path, command: str) -> None:
    (tmp_path / "leaderboard" / "records" / "zzz.json").write_text('{"schema_version": 1}')
    assert "leaderboard/records/zzz.json is not a valid record" in error_line(robench(command))


def test_cuda_where_there_is_none_is_an_error(evaluate: Robench) -> None:
    assert "no device 'cuda' here; it has cpu" in error_line(evaluate("--device", "cuda"))


# --- in a process of its own


def test_a_process_ends_with_exit_code_2_and_no_traceback(tmp_path: Path) -> None:
    done = process(tmp_path, "evaluate", "nothing", "--threat", "Linf:-1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "robench: error: threat model 'Linf:-1': the budget must be at least 0\n"


def test_version_and_the_console_script(tmp_path: Path) -> None:
    done = process(tmp_path, "--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "robench")
    script = Path(sys.executable).with_name("robench")
    assert subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout == done.stdout


def test_a_plugin_is_evaluated_while_another_fails(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN.format(name="mine"))
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found\n")
    plugins = ["--plugin", "mine.py", "--plugin", "broken.py"]
    done = process(tmp_path, "evaluate", "mine,members=3", "--attack", "fgsm", "--n", "5", "--json", "-", *plugins)
    assert done.returncode == 0, done.stderr
    made = Record.model_validate_json(done.stdout)
    assert (made.defense.name, made.defense.version, made.defense.members) == ("mine,members=3", 3, 3)
    assert (made.defense.origin, made.defense.paper) == ("zoo", "1234.56789")
    warning = next(line for line in done.stderr.splitlines() if "warning" in line)
    assert "broken.py failed to load: ModuleNotFoundError: No module named 'nowhere_to_be_found'" in warning
    listed = process(tmp_path, "zoo", "list", "--json", *plugins)
    assert {"mine", "natural"} <= {d["name"] for d in json.loads(listed.stdout)["defenses"]}
    (failure,) = json.loads(listed.stdout)["failures"]
    assert failure["origin"].endswith("broken.py")


def test_a_name_taken_twice_names_both_origins(tmp_path: Path) -> None:
    (tmp_path / "taken.py").write_text(PLUGIN.format(name="natural"))
    done = process(tmp_path, "zoo", "list", "--plugin", "taken.py")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "'natural' is taken twice" in line
    assert "strength_in_numbers.py" in line
    assert "taken.py" in line
