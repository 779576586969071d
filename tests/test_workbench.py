"""The workbench measures what is missing, keeps it, and does not measure twice."""

from collections.abc import Callable
from pathlib import Path

import pytest

from robench import attacks, claim, data, record, settlement, workbench
from robench.claim import Accuracy
from robench.errors import OutOfTimeError
from robench.record import Record
from robench.workbench import Workbench


@pytest.fixture(autouse=True)
def strongest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(claim.STRONGEST, "smoke", (("apgd-ce,steps=3",), ("apgd-ce,steps=2",)))


@pytest.fixture
def held_against_fgsm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(claim.STRONGEST, "smoke", (("fgsm",), ("fgsm",)))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    folder = tmp_path_factory.mktemp("bench")
    return Workbench("digits", "smoke", cache=folder / "cache", keep=folder / "records", examples=40)


def test_a_robust_accuracy_comes_with_the_strongest_attacks(bench: Workbench) -> None:
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


def test_what_is_recorded_of_other_weights_than_are_here_is_measured_again(bench: Workbench) -> None:
    """Else a claim would stay open for ever: records of two trainings do not count together."""
    accuracy = Accuracy("natural", "Linf:16/255", "pgd-2")
    own, strong = bench.find(accuracy, 0)
    foreign = own.model_copy(update={"defense": own.defense.model_copy(update={"weights_sha256": "0" * 64})})
    for known in ([foreign], [foreign, strong]):
        other = Workbench("digits", "smoke", records=list(known), cache=bench.cache, examples=40)
        assert [r.defense.weights_sha256 for r in other.find(accuracy, 0)] == [own.defense.weights_sha256] * 2
        assert other.settled_by_records(accuracy, 0)


def test_a_claim_may_be_held_against_further_attacks(bench: Workbench) -> None:
    accuracy = Accuracy("natural", "Linf:16/255", "pgd-2", against=("mean-transfer-3",))
    assert not bench.settled_by_records(accuracy, 0)
    assert "mean-transfer-3" in [f"{r.attack.name}" for r in bench.find(accuracy, 0)]
    assert bench.settled_by_records(accuracy, 0)


def test_a_claim_may_be_held_against_named_attacks_alone(bench: Workbench) -> None:
    bench.measured("natural", "Linf:16/255", "mean-transfer-2")
    for against in ((), ("mean-transfer-2",)):
        accuracy = Accuracy("natural", "Linf:16/255", "pgd-2", against, only=True)
        assert [r.attack.name for r in bench.find(accuracy, 0)] == ["pgd-2", *against]
        assert bench.settled_by_records(accuracy, 0)


def test_a_clean_accuracy_needs_any_record(bench: Workbench) -> None:
    assert bench.settled_by_records(Accuracy("natural"), 0)


def test_fewer_examples_than_recorded_are_served_and_more_are_not(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workbench, "measure", lambda *_a, **_k: pytest.fail("measured"))
    assert bench.measured("natural", "Linf:16/255", "pgd-2", n=10).dataset.n == 40


def test_a_second_workbench_takes_its_records_from_the_folder(bench: Workbench) -> None:
    assert bench.keep is not None
    known: list[record.Record] = record.load_folder(Path(bench.keep))
    other = Workbench("digits", "smoke", records=known, examples=40)
    assert other.settled_by_records(Accuracy("natural", "Linf:16/255", "pgd-2"), 0)
    assert not Workbench("digits", "smoke", records=known).settled_by_records(Accuracy("natural", "Linf:16/255", "pgd-2"), 0)


# --- how many examples a record must have


def known_to(make_record: Callable[..., Record], dataset: str, *counts: tuple[str, int], examples: int | None = None) -> Workbench:
    """Return a workbench that knows records of `natural` under attacks, each on so many examples."""
    images = {"name": dataset} | ({"fingerprint": data.load(dataset, "test").fingerprint} if dataset == "digits" else {})
    records = [
        make_record(
            [1] * n, defense={"name": "natural", "origin": "zoo"}, dataset=images, threat="Linf:16/255",
            attack={"name": attack, "version": attacks.parse(attack).version, "parameters": dict(attacks.parse(attack).parameters)},
        )
        for attack, n in counts
    ]  # fmt: skip
    return Workbench(dataset, "smoke", records=[r.model_copy(update={"attack": replaced(r)}) for r in records], examples=examples)


def replaced(r: Record) -> record.AttackInfo:
    """Return the record's attack with its own parameters alone, since the fixture merges them into others."""
    return r.attack.model_copy(update={"parameters": dict(attacks.parse(r.attack.name).parameters)})


@pytest.mark.parametrize(
    ("counts", "settled"),
    [
        ([("pgd-2", 50), ("fgsm", 50)], True),
        ([("pgd-2", 60), ("fgsm", 60)], True),
        # The verdict would rest on 60 examples, and the status on 50.
        ([("pgd-2", 60), ("fgsm", 50)], False),
        ([("pgd-2", 49), ("fgsm", 50)], False),
        ([("pgd-2", 50), ("fgsm", 49)], False),
        ([("pgd-2", 50), ("fgsm", 50), ("square", 10)], True),
        ([("pgd-2", 50)], False),
        ([("fgsm", 50), ("square", 50)], False),
    ],
)
def test_an_accuracy_is_settled_by_records_of_enough_examples(
    make_record: Callable[..., Record], counts: list[tuple[str, int]], settled: bool, held_against_fgsm: None
) -> None:
    bench = known_to(make_record, "digits", *counts, examples=50)
    accuracy = Accuracy("natural", "Linf:16/255", "pgd-2")
    assert bench.recorded(accuracy, 0) == (("pgd-2", 50) in counts or ("pgd-2", 60) in counts)
    assert bench.settled_by_records(accuracy, 0) == settled
    # What has fewer examples counts in the worst case all the same.
    own = any(attack == "pgd-2" for attack, _ in counts)
    assert len(settlement.matching(bench.records, accuracy, "digits", "smoke", 0)) == (len(counts) if own else 0)


def test_further_attacks_need_enough_examples_too(make_record: Callable[..., Record], held_against_fgsm: None) -> None:
    accuracy = Accuracy("natural", "Linf:16/255", "pgd-2", against=("square",))
    for n, settled in ((49, False), (50, True)):
        bench = known_to(make_record, "digits", ("pgd-2", 50), ("fgsm", 50), ("square", n), examples=50)
        assert bench.settled_by_records(accuracy, 0) == settled


@pytest.mark.usefixtures("held_against_fgsm")
def test_records_of_other_images_under_the_same_name_settle_nothing(make_record: Callable[..., Record]) -> None:
    bench, accuracy = known_to(make_record, "digits", ("pgd-2", 50), ("fgsm", 50), examples=50), Accuracy("natural", "Linf:16/255", "pgd-2")
    assert bench.settled_by_records(accuracy, 0)
    assert bench.has("natural", "Linf:16/255", "pgd-2")
    bench.records[:] = [r.model_copy(update={"dataset": r.dataset.model_copy(update={"fingerprint": "cd" * 32})}) for r in bench.records]
    assert not bench.settled_by_records(accuracy, 0)
    assert not bench.recorded(accuracy, 0)
    assert not bench.has("natural", "Linf:16/255", "pgd-2")


@pytest.mark.usefixtures("held_against_fgsm")
def test_all_examples_of_a_smaller_data_set_are_enough(make_record: Callable[..., Record], monkeypatch: pytest.MonkeyPatch) -> None:
    smaller = data.load("digits", "test").first(20)
    bench = known_to(make_record, "digits", ("pgd-2", 20), examples=50)
    assert not bench.has("natural", "Linf:16/255", "pgd-2")
    monkeypatch.setattr(data, "load", lambda *_: smaller)
    assert known_to(make_record, "digits", ("pgd-2", 20), examples=50).has("natural", "Linf:16/255", "pgd-2")
    assert not known_to(make_record, "digits", ("pgd-2", 19), examples=50).has("natural", "Linf:16/255", "pgd-2")


@pytest.mark.usefixtures("held_against_fgsm")
def test_records_settle_without_the_data_where_they_have_what_is_wanted(
    make_record: Callable[..., Record], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ROBENCH_DATA", str(tmp_path))
    monkeypatch.setenv("ROBENCH_CACHE", str(tmp_path))
    accuracy = Accuracy("natural", "Linf:16/255", "pgd-2")
    assert known_to(make_record, "cifar10", ("pgd-2", 50), ("fgsm", 50), examples=50).settled_by_records(accuracy, 0)
    assert not known_to(make_record, "cifar10", ("pgd-2", 40), ("fgsm", 50), examples=50).settled_by_records(accuracy, 0)


def test_what_an_accuracy_needs() -> None:
    bench = Workbench("digits", "smoke")
    deterministic, random = claim.STRONGEST["smoke"]
    accuracy = Accuracy("natural", "Linf:16/255", "pgd-2", against=("square", deterministic[0]))
    assert bench.needed(accuracy) == [("natural", "Linf:16/255", attack) for attack in ("pgd-2", *deterministic, "square")]
    noisy = Accuracy("multires", "Linf:16/255", random[0])
    assert bench.needed(noisy) == [("multires", "Linf:16/255", attack) for attack in random]
    assert bench.needed(Accuracy("natural")) == [("natural", "Linf:0", "fgsm")]


def test_the_time_ends_training_and_evaluation(tmp_path: Path) -> None:
    asked: list[None] = []

    def third_time() -> bool:
        asked.append(None)
        return len(asked) >= 3

    bench = Workbench("digits", "smoke", cache=tmp_path, examples=120, ready_made=False, stop=third_time)
    with pytest.raises(OutOfTimeError, match="training stopped after 2 of 6 epochs"):
        bench.target("natural")
    bench.stop = lambda: False
    lines: list[str] = []
    bench.progress = lines.append
    bench.target("natural")
    assert [line.split(":")[1] for line in lines] == [f" stage 1/1 epoch {epoch}/6" for epoch in (3, 4, 5, 6)]
    asked.clear()
    bench.stop = lambda: third_time() or len(asked) >= 2
    with pytest.raises(OutOfTimeError, match="stopped after 100 of 120 examples"):
        bench.measured("natural", "Linf:8/255", "fgsm")
    assert bench.records == []
