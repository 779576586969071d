"""Campaigns on the digits: what is measured in which order, the budget, failures, and that a killed one ends with the same records."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from robench import claim, plan, record, zoo
from robench.campaign import Campaign, goals
from robench.claim import Claim, Trial
from robench.workbench import Workbench

PLAN = """
dataset = "digits"
scale = "smoke"
n = 40

[[measure]]
defenses = ["natural"]
threats = ["Linf:16/255"]
attacks = ["fgsm", "pgd-3"]
"""


PAPER = zoo.entries()["natural"].paper


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def campaign(tmp_path: Path, cache: Path, text: str = PLAN, **settings: Any) -> tuple[Campaign, list[str]]:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    made = plan.load(str(path))
    folder, lines = tmp_path / "records", list[str]()
    known = record.load_folder(folder) if folder.is_dir() else []
    folder.mkdir(exist_ok=True)
    bench = Workbench(made.dataset, made.scale, records=known, cache=cache, examples=made.n)
    return Campaign(made, bench, folder, echo=lines.append, **settings), lines


def test_a_plan_is_measured_and_a_second_run_has_nothing_to_do(tmp_path: Path, cache: Path) -> None:
    first, lines = campaign(tmp_path, cache)
    assert first.run() == 0
    found = record.load_folder(tmp_path / "records")
    assert sorted(r.attack.name for r in found) == ["fgsm", "pgd-3"]
    assert {r.dataset.n for r in found} == {40}
    assert "2 of 2 measurements recorded" in lines[-1]
    again, lines = campaign(tmp_path, cache)
    assert again.run() == 0
    assert lines == ["nothing to do: all 2 measurements of the plan are recorded"]


def test_a_spent_budget_leaves_the_rest_for_the_next_run(tmp_path: Path, cache: Path) -> None:
    ticks = iter(range(0, 10_000, 10))
    first, lines = campaign(tmp_path, cache, budget=5.0, clock=lambda: float(next(ticks)))
    assert first.run() == 0
    assert any(line.startswith("the budget is spent: 2 of 2 measurements are left") for line in lines)
    assert not list((tmp_path / "records").iterdir())
    second, _ = campaign(tmp_path, cache)
    assert second.run() == 0
    assert len(record.load_folder(tmp_path / "records")) == 2


def test_a_measurement_that_fails_does_not_take_the_rest_down(tmp_path: Path, cache: Path) -> None:
    text = PLAN.replace('"fgsm"', '"universal,member=5"')
    made, lines = campaign(tmp_path, cache, text)
    assert made.run() == 1
    assert [r.attack.name for r in record.load_folder(tmp_path / "records")] == ["pgd-3"]
    assert [line for line in lines if line.startswith("failed: natural under universal,member=5")]


def test_a_claim_needs_the_papers_attack_and_the_strongest_on_every_term(tmp_path: Path, cache: Path) -> None:
    made, _ = campaign(tmp_path, cache, PLAN + "\n", budget=None)
    with_claims = made.plan.model_copy(update={"claims": True})
    by_name = {goal.claim.name: {str(m) for m in goal.needs} for goal in goals(with_claims, made.bench)}
    assert by_name["clean-ensemble-falls"] == {
        "ensemble2 under pgd-adam-50 within Linf:48/255, n=40", "ensemble2 under apgd-t,steps=20,targets=2 within Linf:48/255, n=40",
    }  # fmt: skip


def test_records_of_several_weights_are_made_again_for_a_claim(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these the claim could not be settled, though every measurement was recorded."""
    monkeypatch.setitem(claim.STRONGEST, "smoke", (("fgsm",), ("fgsm",)))
    trial = Trial("digits", claim.robust("natural", "Linf:16/255", "pgd-3"), scales=("smoke",))
    one = Claim("one", PAPER, "It falls.", "Table 1", "0", claim.below(0.9), 0.5, (trial,))
    monkeypatch.setattr(claim, "discover", lambda: [one])
    text = 'dataset = "digits"\nscale = "smoke"\nn = 40\nclaims = true\n'
    first, lines = campaign(tmp_path, cache, text)
    assert first.run() == 0
    made = record.load_folder(tmp_path / "records")
    foreign = made[0].model_copy(update={"defense": made[0].defense.model_copy(update={"weights_sha256": "0" * 64})})
    record.save(foreign, tmp_path / "records")
    second, lines = campaign(tmp_path, cache, text)
    assert second.run() == 0
    assert lines[0] == "0 of 2 measurements recorded, 0 of 1 claims settled"
    assert record.load_folder(tmp_path / "records") == made


def comparable(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a folder without their times."""
    made = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    for r in made:
        r.pop("timing")
    return made


def run_until(command: list[str], cache: Path, last: int | None) -> int:
    """Run a command, killing it after so many lines of output, and return its exit code."""
    environment = os.environ | {"ROBENCH_CACHE": str(cache), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for number, _ in enumerate(process.stdout):
            if number == last:
                process.kill()
        return process.wait()


@pytest.mark.slow
def test_a_campaign_that_is_killed_again_and_again_ends_with_the_same_records(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN.replace("n = 40", "n = 250"))

    def run(name: str, last: int | None = None) -> int:
        command = [sys.executable, "-m", "robench", "campaign", str(tmp_path / "plan.toml"), "--records", str(tmp_path / name)]
        return run_until(command, tmp_path / f"{name}-cache", last)

    assert run("whole") == 0
    # A line for the start, one for the measurement, six epochs, then one for each hundred examples.
    chance = random.Random(7)
    assert run("killed", chance.randrange(2, 7)) == -signal.SIGKILL
    assert run("killed", chance.randrange(8, 10)) == -signal.SIGKILL
    assert run("killed") == 0
    assert len(comparable(tmp_path / "whole")) == 2
    assert comparable(tmp_path / "killed") == comparable(tmp_path / "whole")
