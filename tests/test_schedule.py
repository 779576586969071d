"""The order of a campaign on small plans whose best order is known, and what a measurement is expected to take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robench import schedule
from robench.schedule import Measurement, Work


def m(defense: str, attack: str = "pgd-20", n: int = 100, seed: int = 0) -> Measurement:
    return Measurement(defense, "Linf:8/255", attack, n, seed)


A, B, C, D = (m(name) for name in "abcd")


def test_the_goal_that_settles_most_per_minute_comes_first() -> None:
    work = {A: Work(10, {}), B: Work(1, {}), C: Work(4, {})}
    assert schedule.order(work, {"slow": {A}, "quick": {B}, "middling": {C}}) == [B, C, A]


def test_a_dear_set_that_settles_many_goals_beats_a_cheap_one_that_settles_one() -> None:
    work = {A: Work(3, {}), B: Work(3, {}), C: Work(4, {})}
    goals = {"one": {A, B}, "two": {A, B}, "three": {A}, "alone": {C}}
    # Three goals in six minutes, against one in three and one in four.
    assert schedule.order(work, goals) == [A, B, C]


def test_a_shared_stage_of_training_is_paid_once() -> None:
    stage = {"stage": 10.0}
    work = {A: Work(1, stage), B: Work(1, stage), C: Work(5, {})}
    assert schedule.minutes([A, B], work) == 12
    assert schedule.minutes([A, B], work, trained={"stage"}) == 2
    # After A, B takes a minute.
    assert schedule.order(work, {"a": {A, C}, "b": {B}}) == [B, A, C]


def test_what_no_goal_needs_comes_last_and_the_cheapest_first() -> None:
    work = {A: Work(2, {}), B: Work(1, {}), C: Work(9, {})}
    assert schedule.order(work, {"goal": {C}}) == [C, B, A]


def test_a_measurement_on_more_examples_serves_a_goal() -> None:
    for n, first in ((200, m("a", n=200)), (100, m("a")), (50, B)):
        work = {B: Work(1, {}), m("a", n=n): Work(2, {})}
        assert schedule.order(work, {"goal": {A}})[0] == first


def test_a_goal_whose_measurement_cannot_be_made_is_left_out() -> None:
    assert schedule.order({A: Work(1, {}), B: Work(2, {})}, {"whole": {B}, "lost": {A, D}}) == [B, A]


def test_the_same_thing_is_measured_once_on_the_most_examples() -> None:
    assert schedule.merged([m("a", n=100), m("b"), m("a", n=300), m("a", n=200), m("a", seed=1)]) == [m("a", n=300), m("b"), m("a", seed=1)]


@given(
    st.dictionaries(st.sampled_from([m(a, b) for a in "abc" for b in ("fgsm", "pgd-5")]), st.floats(0, 50), min_size=1),
    st.dictionaries(st.text("xyz", min_size=1, max_size=2), st.sets(st.sampled_from([m(a, b) for a in "abc" for b in ("fgsm", "pgd-5")]))),
)
def test_every_measurement_is_ordered_once_whatever_the_goals(costs: dict[Measurement, float], goals: dict[str, set[Measurement]]) -> None:
    work = {one: Work(minutes, {one.defense: 3.0}) for one, minutes in costs.items()}
    ordered = schedule.order(work, goals)
    assert sorted(map(str, ordered)) == sorted(map(str, work))
    assert ordered == schedule.order(work, goals)


def test_a_measurement_reads_as_one_line() -> None:
    assert str(m("natural", seed=2)) == "natural (seed 2) under pgd-20 within Linf:8/255, n=100"
    assert pytest.approx(schedule.minutes([], {})) == 0
