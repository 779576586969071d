"""The workbench measures what is missing, keeps it, and does not measure twice."""

from pathlib import Path

import pytest

from robench import record, workbench
from robench.claim import Accuracy
from robench.workbench import Workbench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    folder = tmp_path_factory.mktemp("bench")
    return Workbench("digits", "smoke", cache=folder / "cache", keep=folder / "records", examples=40)


def test_a_robust_accuracy_comes_with_the_strongest_attacks(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workbench.STRONGEST, "smoke", (("apgd-ce,steps=3",), ("apgd-ce,steps=2",)))
    found = bench.find(Accuracy("natural", "Linf:16/255", "pgd-2"), 0)
    assert [r.attack.name for r in found] == ["pgd-2", "apgd-ce"]
    assert {r.dataset.n for r in found} == {40}
    assert bench.keep is not None
    assert len(record.load_folder(bench.keep)) == 2


def test_nothing_is_measured_twice(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = Accuracy("natural", "Linf:16/255", "pgd-2")
    assert bench.settled_by_records(accuracy, 0)
    assert not bench.settled_by_records(accuracy, 1)
    monkeypatch.setattr(workbench, "measure", lambda *_a, **_k: pytest.fail("measured again"))
    assert len(bench.find(accuracy, 0)) == 2


def test_a_claim_may_be_held_against_further_attacks(bench: Workbench) -> None:
    accuracy = Accuracy("natural", "Linf:16/255", "pgd-2", against=("mean-transfer-3",))
    assert not bench.settled_by_records(accuracy, 0)
    assert "mean-transfer-3" in [f"{r.attack.name}" for r in bench.find(accuracy, 0)]
    assert bench.settled_by_records(accuracy, 0)


def test_a_clean_accuracy_needs_any_record(bench: Workbench) -> None:
    assert bench.settled_by_records(Accuracy("natural"), 0)


def test_fewer_examples_than_recorded_are_served_and_more_are_not(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workbench, "measure", lambda *_a, **_k: pytest.fail("measured"))
    assert bench.measured("natural", "Linf:16/255", "pgd-2", n=10).dataset.n == 40


def test_a_second_workbench_takes_its_records_from_the_folder(bench: Workbench) -> None:
    assert bench.keep is not None
    known: list[record.Record] = record.load_folder(Path(bench.keep))
    other = Workbench("digits", "smoke", records=known)
    assert other.settled_by_records(Accuracy("natural", "Linf:16/255", "pgd-2"), 0)
