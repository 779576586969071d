import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from robench import record as records
from robench.accuracies import clean_estimate, robust_estimate, worst_case
from robench.errors import UserError
from robench.record import Proportion, Record, file_name, identity, load, load_folder, save

Build = Callable[..., Record]


def test_a_record_is_read_back_as_it_was_saved(make_record: Build, tmp_path: Path) -> None:
    record = make_record([1, 0, 0.3], [1, 0.7, 1], defense={"random": True}, attack={"parameters": {"a": 1, "b": 1.0, "c": True}})
    path = save(record, tmp_path / "new" / "folder")
    again = load(path)
    assert again == record
    assert [type(again.attack.parameters[key]) for key in "abc"] == [int, float, bool]
    assert (identity(again), file_name(again)) == (identity(record), path.name)
    assert load_folder(path.parent) == [record]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_outcomes_survive_the_file_exactly(make_record: Build, robust: list[float]) -> None:
    record = make_record(robust, defense={"random": True})
    assert Record.model_validate_json(records.to_json(record)) == record


def test_a_file_has_its_outcomes_on_one_line_each_and_whole_ones_short(make_record: Build, tmp_path: Path) -> None:
    path = save(make_record([1, 0, 1, 1]), tmp_path)
    lines = path.read_text().splitlines()
    assert '  "clean": [1,1,1,1],' in lines
    assert '  "robust": [1,0,1,1]' in lines
    assert ' "seed": 0,' in lines
    assert json.loads(path.read_text())["robust_accuracy"]["value"] == 0.75


def test_the_identity_is_what_was_measured_not_when_or_from_which_commit(make_record: Build) -> None:
    record = make_record()
    again = make_record(timing={"created": "2026-01-01T00:00:00Z", "seconds": 99.0}, provenance={"commit": "1" * 40, "dirty": True})
    assert identity(record) == identity(again)
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"robust": [1, 1, 0]},
        {"attack": {"parameters": {"steps": 21}}},
        {"defense": {"weights_sha256": "ef" * 32}},
        {"provenance": {"versions": {"torch": "2.12"}}},
        {"precision": "bfloat16"},
    ]
    assert len({identity(make_record(**change)) for change in changes} - {identity(record)}) == len(changes)


def test_what_made_other_parts_is_told_and_another_commit_changes_no_identity(make_record: Build) -> None:
    alone = make_record()
    assert '"other_provenance"' not in records.to_json(alone)
    assert (alone.parts, alone.hardware) == (None, "A processor")
    other, machine = ({**alone.provenance.model_dump(), "commit": "1" * 40, "dirty": True} | more for more in ({}, {"processor": "B"}))
    twice, moved = make_record(other_provenance=[other]), make_record(other_provenance=[other, machine])
    for record in (twice, moved):
        assert Record.model_validate_json(records.to_json(record)) == record
    assert identity(twice) == identity(alone)
    assert identity(moved) != identity(alone)
    assert identity(moved) == identity(make_record(other_provenance=[machine, machine | {"commit": "2" * 40}]))
    assert (twice.hardware, moved.hardware) == ("A processor", "A processor, B")
    assert twice.parts == (
        "commit 000000000000 on cpu (A processor, threads: 1; torch 2.11); "
        "commit 111111111111 with uncommitted changes on cpu (A processor, threads: 1; torch 2.11)"
    )  # fmt: skip


def test_file_names_are_safe_readable_and_different_for_different_measurements(make_record: Build) -> None:
    name = file_name(make_record(seed=3, defense={"training_seed": 7}))
    assert name.startswith("digits_Linf-8-255_robust-average,k=8,eps=0.22_pgd-20_smoke_n3_s3t7_")
    awkward = make_record(defense={"name": "../a b/file.py:make_*?" + "x" * 300})
    assert re.fullmatch(r"[A-Za-z0-9._,=+-]{1,255}", file_name(awkward))
    others = [
        make_record(attack={"parameters": {"restarts": 5}}),
        make_record(defense={"name": "../a-b/file.py:make-*?" + "x" * 300}),
        make_record(dataset={"split": "train"}),
        make_record(threat="L2:8/255"),
    ]
    assert len({file_name(record) for record in [make_record(), awkward, *others]}) == 6
    # A newer measurement of the same thing takes the place of the old one.
    newer = make_record([1, 1, 1], defense={"version": 2, "weights_sha256": "ef" * 32, "origin": "zoo"}, attack={"version": 2})
    assert file_name(newer) == file_name(make_record(defense={"origin": "zoo"}))
    # Two files' models of one name are two models.
    foreign = [make_record(defense={"origin": "a file", "weights_sha256": 32 * weights}) for weights in ("cd", "ef")]
    assert len({file_name(record) for record in [make_record(), *foreign]}) == 3


def test_a_threat_is_kept_in_its_one_form(make_record: Build) -> None:
    assert make_record(threat="Linf:0.2").threat == make_record(threat="Linf:1/5").threat


def edited(record: Record, **changes: Any) -> str:
    return json.dumps(record.model_dump(mode="json") | changes)


SHARE = {"value": 1.0, "low": 0.4, "high": 1.0, "n": 3}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema_version": 2}, "schema_version: Input should be 1"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"threat": "Linf:many"}, "threat: threat model 'Linf:many'"),
        ({"threat": "L7:1"}, "threat: "),
        ({"scale": "huge"}, "scale: "),
        ({"seed": "3"}, "seed: Input should be a valid integer"),
        ({"seed": True}, "seed: "),
        ({"robust_accuracy": SHARE}, "robust accuracy .* is not that of the outcomes"),
        ({"robust_accuracy": {"value": 2 / 3, "low": 0.6, "high": 0.7, "n": 3}}, "is not that of the outcomes"),
        ({"clean_accuracy": SHARE | {"value": 0.9}}, "clean accuracy .* is not that of the outcomes"),
        ({"clean_accuracy": SHARE | {"value": 0.3}}, "clean_accuracy: the value 0.3 is not in its interval"),
        ({"outcomes": {"clean": [1, 1], "robust": [1, 0, 1]}}, "2 clean outcomes for 3 examples"),
        ({"outcomes": {"clean": [1, 1, 1], "robust": [1, 1, 0, 1]}}, "4 robust outcomes for 3 examples"),
        ({"outcomes": {"clean": [1, 1, 1], "robust": [1, 2, 1]}}, "outcomes.robust.1: "),
        ({"controls": {"a": None}}, "controls.a: "),
        ({"cost": {"forwards": -1, "backwards": 0}}, "cost.forwards: "),
        ({"timing": {"created": "2025-01-31T12:00:00+01:00", "seconds": 1}}, "timing.created: .* UTC"),
        ({"timing": {"created": "yesterday", "seconds": 1}}, "timing.created: "),
        (
            {"random_score": {"draws": 10, "mean": SHARE, "majority": SHARE, "worst": SHARE}},
            "a random defense, and no other",
        ),
        ({"defense": {}}, r"defense.name: Field required \(and 8 more\)"),
    ],
)
def test_an_edited_record_is_refused_in_one_line(make_record: Build, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(edited(make_record(), **changes))
    with pytest.raises(UserError, match=reason) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"controls": NaN}'])
def test_a_file_that_is_no_record_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a valid record") as caught:
        load_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_every_cut_short_file_is_refused(make_record: Build, tmp_path: Path) -> None:
    path = save(make_record(), tmp_path)
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a valid record"):
            load(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the record .*absent.json: No such file"):
        load(tmp_path / "absent.json")
    with pytest.raises(UserError, match="absent does not exist"):
        load_folder(tmp_path / "absent")
    assert load_folder(tmp_path) == []


def test_a_folder_is_read_in_the_order_of_names(make_record: Build, tmp_path: Path) -> None:
    for seed in (2, 0, 1):
        save(make_record(seed=seed), tmp_path)
    (tmp_path / "notes.txt").write_text("not a record")
    assert [record.seed for record in load_folder(tmp_path)] == [0, 1, 2]


def test_a_random_defense_needs_all_three_scores_and_a_deterministic_one_whole_outcomes(make_record: Build) -> None:
    with pytest.raises(ValidationError, match="a random defense, and no other"):
        make_record(defense={"random": True}, random_score=None)
    with pytest.raises(ValidationError, match=r"random_score\.mean differs"):
        make_record([0.5, 1, 1], defense={"random": True}, random_score={"mean": SHARE})
    with pytest.raises(ValidationError, match="neither 0 nor 1"):
        make_record([0.5, 1, 1])


def test_records_cannot_be_changed(make_record: Build) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_record().seed = 1


def test_estimates_carry_the_outcomes_so_that_they_pair_within_one_data_set(make_record: Build) -> None:
    record = make_record([1, 0, 1, 0])
    robust, clean = robust_estimate(record), clean_estimate(record)
    assert Proportion.of(robust) == record.robust_accuracy
    assert robust.examples is not None
    assert robust.examples.tolist() == [0, 1, 2, 3]
    assert ((clean - robust).value, (clean - robust).kind) == (0.5, "paired difference")
    other = make_record([1, 1, 1, 1], dataset={"fingerprint": "ef" * 32})
    assert (robust_estimate(other) - robust).kind == "difference"


def test_the_worst_case_is_the_least_outcome_of_each_example(make_record: Build) -> None:
    first = make_record([1, 1, 0, 1, 1])
    second = make_record([1, 0, 1, 1, 1], seed=1)
    prefix = make_record([0, 1], seed=2)
    estimate, strongest = worst_case([first, second, prefix])
    assert estimate.values is not None
    assert estimate.values.tolist() == [0, 0, 0, 1, 1]
    assert (estimate.value, estimate.n) == (0.4, 5)
    assert strongest in (second, prefix)  # both hold one of the two examples that all share; first holds both
    assert worst_case([first]) == (robust_estimate(first), first)


def test_a_weak_attack_on_more_examples_does_not_hide_a_strong_one(make_record: Build) -> None:
    strong, weak = make_record([0.0] * 100), make_record([0.0] * 400 + [1.0] * 600, seed=1)
    estimate, strongest = worst_case([strong, weak])
    assert (estimate.value, estimate.n, strongest) == (0.0, 100, strong)
    assert worst_case([strong, weak], 1000)[0].value == 0.6
    # A stroke of luck on a few examples is none.
    halved, lucky = make_record([0.0, 1.0] * 500), make_record([1.0] * 84 + [0.0] * 16)
    assert worst_case([lucky, halved])[0].n == 1000


def test_the_strongest_attack_is_lowest_on_shared_examples_then_dearest(make_record: Build) -> None:
    cheap, dear = (make_record([0, 1, 1, 1], cost={"forwards": cost, "backwards": 0.0}) for cost in (1.0, 9.0))
    # Lower on its two examples than its share over all four would suggest the others are.
    prefix = make_record([1, 0], cost={"forwards": 5.0, "backwards": 0.0})
    assert worst_case([cheap, dear])[1] is dear
    assert worst_case([dear, cheap])[1] is dear
    assert worst_case([cheap, prefix])[1] is prefix
    assert worst_case([prefix, dear])[1] is dear
    weak_prefix = make_record([1, 1])
    assert worst_case([weak_prefix, cheap])[1] is cheap


def test_random_outcomes_are_compared_as_shares_of_draws(make_record: Build) -> None:
    pair = [make_record(values, defense={"random": True}) for values in ([0.5, 1, 0], [0.7, 0.2, 0.1])]
    estimate, strongest = worst_case(pair)
    assert estimate.values == pytest.approx([0.5, 0.2, 0])
    assert strongest is pair[1]


@pytest.mark.parametrize(
    "change",
    [
        {"defense": {"name": "natural"}},
        {"defense": {"version": 2}},
        {"defense": {"weights_sha256": "ef" * 32}},
        {"dataset": {"fingerprint": "ef" * 32}},
        {"threat": "Linf:4/255"},
        {"scale": "gpu"},
    ],
)
def test_a_worst_case_is_of_one_subject(make_record: Build, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="not of 2"):
        worst_case([make_record(), make_record(**change)])
    with pytest.raises(UserError, match="not of 0"):
        worst_case([])
