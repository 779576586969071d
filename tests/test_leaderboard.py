import csv
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from robench import leaderboard, leaderboard_table
from robench.errors import UserError
from robench.leaderboard import EMPTY, NOTE, Finding, Findings, rows
from robench.leaderboard_formats import as_csv, as_json, as_markdown
from robench.record import Record

Build = Callable[..., Record]


def rendered(made: list[leaderboard.Row]) -> str:
    console = Console(width=400, file=io.StringIO(), color_system=None)
    console.print(leaderboard_table.as_table(made))
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_a_row_is_the_worst_case_over_the_attacks_on_one_defense(make_record: Build) -> None:
    weak = make_record([1, 1, 1, 0], [1, 1, 1, 0], attack={"name": "fgsm"})
    strong = make_record([0, 0, 1, 1], [1, 1, 1, 1], attack={"name": "autoattack"}, cost={"forwards": 12345.6, "backwards": 2.25})
    prefix = make_record([1, 0], attack={"name": "fgsm"}, seed=1)
    (row,) = rows([weak, prefix, strong])
    assert (row.robust.value, row.robust.n, row.clean.n) == (0.25, 4, 4)
    assert row.strongest is strong
    assert row.attacks[0] == "autoattack"
    assert sorted(row.attacks) == ["autoattack", "fgsm"]
    assert (row.notes, row.stale, row.verdicts) == ((), (), ())
    text = as_markdown([row])
    assert "≤ 25.0 % [4.6, 69.9] (n=4)" in text
    assert "12,346 / 2.2" in text
    assert rows([strong, prefix, weak]) == rows([weak, prefix, strong])


def test_the_strongest_attack_comes_first_even_if_a_shorter_run_has_a_lower_share(make_record: Build) -> None:
    strong = make_record([0, 0, 1, 1, 1], attack={"name": "autoattack"})
    short = make_record([1, 0], attack={"name": "fgsm"})
    (row,) = rows([short, strong])
    assert row.attacks == ("autoattack", "fgsm")
    assert row.strongest is strong
    (row,) = rows([strong, make_record([0], attack={"name": "fgsm"}, cost={"forwards": 1e6})])
    assert row.strongest.dataset.n == 1
    assert (row.clean.n, row.robust.n) == (5, 5)


def test_no_part_of_a_name_is_cut_off_in_a_narrow_terminal(make_record: Build) -> None:
    name = "a_defense_of_a_long_name,with=1,many=2,parameters=3"
    console = Console(width=120, file=io.StringIO(), color_system=None)
    console.print(leaderboard_table.as_table(rows([make_record(defense={"name": name})])))
    output = console.file
    assert isinstance(output, io.StringIO)
    cells = [line.split("│")[1].strip() for line in output.getvalue().splitlines() if line.startswith("│")]
    assert "".join(cells).startswith(name)


def test_rows_are_apart_by_all_that_makes_another_subject(make_record: Build) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"defense": {"name": "natural"}},
        {"defense": {"version": 2}},
        {"defense": {"training_seed": 1}},
        {"defense": {"weights_sha256": "ef" * 32}},
        {"dataset": {"name": "cifar10"}},
        {"dataset": {"fingerprint": "ef" * 32}},
        {"threat": "Linf:4/255"},
        {"scale": "gpu"},
    ]
    assert len(rows([make_record(**change) for change in changes])) == len(changes)
    assert len(rows([make_record(seed=seed) for seed in range(3)])) == 1


def test_rows_of_one_name_and_other_weights_are_told_apart(make_record: Build) -> None:
    weights = [{"weights_sha256": half * 32} for half in ("ab", "cd")]
    alone, *twins = rows([make_record(defense={"name": "alone"}), *(make_record(defense={"name": "twin"} | each) for each in weights)])
    assert (alone.copy, {row.copy for row in twins}) == (("seed 0",), {("seed 0", f"weights {half * 4}") for half in ("ab", "cd")})
    for text in (as_markdown([alone, *twins]), rendered([alone, *twins])):
        assert text.count("weights abababab") == text.count("weights cdcdcdcd") == 1
        assert text.count("weights ") == 2


def test_rows_are_sorted_by_place_and_then_by_robust_accuracy(make_record: Build) -> None:
    def record(robust: list[int], name: str, dataset: str = "digits", threat: str = "Linf:8/255", scale: str = "cpu") -> Record:
        return make_record(robust, defense={"name": name}, dataset={"name": dataset}, threat=threat, scale=scale)

    wanted = [
        record([1, 1, 0], "a", dataset="cifar10"),
        record([1, 0, 0], "b", dataset="cifar10"),
        record([1, 1, 1], "c", threat="L2:1"),
        record([0, 0, 0], "d", scale="paper"),
        record([1, 1, 0], "e"),
        record([1, 0, 0], "f"),
        record([1, 1, 1], "g", threat="Linf:16/255"),
    ]
    made = rows(sorted(wanted, key=lambda r: r.defense.name, reverse=True))
    assert [row.strongest.defense.name for row in made] == list("abcdefg")


def test_filters_keep_a_data_set_and_a_threat_in_any_of_its_forms(make_record: Build) -> None:
    kept = make_record(threat="Linf:0.5")
    all_records = [kept, make_record(threat="Linf:8/255"), make_record(threat="Linf:0.5", dataset={"name": "cifar10"})]
    (row,) = rows(all_records, dataset="digits", threat="Linf:1/2")
    assert row.strongest is kept
    assert rows(all_records, dataset="nothing") == []
    with pytest.raises(UserError, match="threat model"):
        rows(all_records, threat="8/255")


@pytest.mark.parametrize(
    ("attacks", "defenses", "stale"),
    [
        ({"pgd": 1, "fgsm": 2}, {"robust_average": 1}, ()),
        ({}, {}, ()),
        ({"pgd-20": 2}, {}, ("pgd-20 was version 1, now 2",)),
        ({"pgd-20": 1}, {"robust_average": 4}, ("the defense was version 1, now 4",)),
    ],
)
def test_a_row_is_stale_if_its_attack_or_defense_has_another_version(
    make_record: Build, attacks: dict[str, int], defenses: dict[str, int], stale: tuple[str, ...]
) -> None:
    made = rows([make_record(), make_record(seed=1)], attack_version=lambda name, _random: attacks.get(name), defense_versions=defenses)
    assert [row.stale for row in made] == [stale]
    assert as_markdown(made).count("stale: ") == len(stale)


def test_a_weaker_attack_that_is_stale_marks_its_row(make_record: Build) -> None:
    weak = make_record([1, 1, 1], attack={"name": "fgsm"})
    (row,) = rows([make_record([0, 0, 0]), weak], attack_version=lambda name, _random: {"fgsm": 2, "pgd-20": 1}[name])
    assert row.stale == ("fgsm was version 1, now 2",)


def test_a_random_defense_says_how_it_was_scored(make_record: Build) -> None:
    worst = {"value": 0.5, "low": 0.2, "high": 0.8, "n": 4}
    record = make_record([0.5, 1, 1, 0.5], defense={"random": True}, random_score={"draws": 20, "worst": worst})
    made = rows([record])
    assert made[0].notes == ("random, 20 draws of pgd-20: mean 75.0 %, worst draw 50.0 %",)
    (line,) = csv.DictReader(io.StringIO(as_csv(made)))
    assert (line["random_draws"], line["random_mean"], line["random_worst_draw"]) == ("20", "0.75", "0.5")
    assert json.loads(as_json(made))["rows"][0]["random_score"]["worst"] == worst


def test_a_row_says_that_a_record_was_made_in_parts_and_names_every_processor(make_record: Build) -> None:
    other = make_record().provenance.model_dump() | {"commit": "1" * 40, "processor": "Another"}
    made = rows([make_record(other_provenance=[other]), make_record([1, 1, 1], attack={"name": "fgsm"})])
    (note,) = made[0].notes
    assert note.startswith("made in parts (pgd-20): commit 000000000000 on cpu (A processor, threads: 1; torch 2.11); commit 1111")
    assert "A processor, Another" in as_markdown(made)
    (cells,) = csv.DictReader(io.StringIO(as_csv(made)))
    assert cells["hardware"] == json.loads(as_json(made))["rows"][0]["hardware"]["processor"] == "A processor, Another"


def test_every_rendering_has_the_same_numbers(make_record: Build) -> None:
    record = make_record([1, 0, 1], defense={"name": "odd|name[red],k=1"}, partial="stopped after\n2 of 3 stages")
    verdicts: Findings = {
        (record.defense.name, "digits", record.scale, record.threat): [Finding("R1", "reproduced", "holds")],
        (record.defense.name, "digits", record.scale, None): [Finding("R4", "reproduced", "broken")],
        (record.defense.name, "cifar10", record.scale, record.threat): [Finding("R2", "reproduced", "holds")],
        ("other", "digits", record.scale, record.threat): [Finding("R3", "reproduced", "holds")],
    }
    made = rows([record], verdicts=verdicts)
    text, terminal = as_markdown(made), rendered(made)
    assert "odd\\|name[red],k=1 (seed 0)" in text
    assert "odd|name[red],k=1 " in terminal
    assert "R1: reproduced, holds; R4: reproduced, broken" in text
    assert "R2" not in text
    assert "R3" not in text
    assert "1 hold, 1 broken" in terminal
    assert "1. partial (pgd-20): stopped after 2 of 3 stages" in " ".join(terminal.split())
    for rendering in (text, terminal):
        assert "66.7 % [20.8, 93.9] (n=3)" in rendering
        assert NOTE in " ".join(rendering.split())
    header, rule, line, blank, _note = text.split("\n")
    # The bar inside the name is escaped and does not add a cell.
    assert header.count("|") == rule.count("|") == line.replace("\\|", "").count("|")
    assert blank == ""
    (parsed,) = json.loads(as_json(made))["rows"]
    (cells,) = csv.DictReader(io.StringIO(as_csv(made)))
    assert parsed["defense"]["name"] == cells["defense"] == "odd|name[red],k=1"
    assert parsed["robust_accuracy"]["value"] == float(cells["robust_accuracy"]) == pytest.approx(2 / 3)
    assert parsed["clean_accuracy"]["n"] == int(cells["clean_n"]) == 3
    assert parsed["verdicts"] == cells["verdicts"].split("; ")
    assert parsed["attacks"][0]["parameters"] == {"steps": 20, "restarts": 1, "loss": "ce"}


def test_no_records_make_one_clear_line() -> None:
    assert rows([]) == []
    assert as_markdown([]) == EMPTY
    assert rendered([]).strip() == EMPTY
    assert "\n" not in EMPTY
    assert json.loads(as_json([])) == {"note": NOTE, "rows": []}
    assert len(as_csv([]).splitlines()) == 1


def test_the_note_says_that_robust_accuracy_is_an_upper_bound() -> None:
    assert "upper bound" in NOTE
