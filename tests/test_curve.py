from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robench.curve import auc
from robench.errors import UserError
from robench.estimate import Estimate

BUDGETS = [0, 0.22, 0.35, 0.5]

# "Revisiting Ensembles", arXiv 2002.11572, table 1: accuracy on 10000 images at 0, 0.22, 0.35 and 0.5, and the AUC
# column; last, the area under the trapezoids, worked out by hand.
TABLE_1 = {
    "natural": ([94.64, 13.5, 2.57, 0.44], 0.067, 0.263),
    "robust 0.22": ([92.86, 81.24, 71.71, 59.47], 0.722, 0.779),
    "robust 0.5": ([88.30, 81.31, 78.11, 68.73], 0.767, 0.801),
    "8 x robust 0.22": ([93.95, 83.95, 78.92, 68.79], 0.781, 0.825),
    "composite": ([91.36, 83.22, 76.62, 67.95], 0.769, 0.809),
    "2 composites": ([91.61, 84.15, 78.01, 69.99], 0.783, 0.819),
}


def published(percentages: list[float]) -> list[Estimate]:
    return [Estimate.proportion(100 * percentage, 10000) for percentage in percentages]


@pytest.mark.parametrize("row", TABLE_1)
def test_the_right_rule_gives_the_papers_column_and_the_trapezoids_do_not(row: str) -> None:
    percentages, column, area = TABLE_1[row]
    right, trapezoid = auc(BUDGETS, published(percentages)), auc(BUDGETS, published(percentages), "trapezoid")
    assert right.value == pytest.approx(column, abs=5.01e-4)
    assert trapezoid.value == pytest.approx(area, abs=5.01e-4)
    assert abs(trapezoid.value - column) > 0.03
    assert right.n == 10000
    assert right.low < right.value < right.high
    assert auc(BUDGETS[1:], published(percentages)[1:]) == right


def test_the_two_rules_rank_the_papers_best_two_defenses_differently() -> None:
    ensemble, composites = published(TABLE_1["8 x robust 0.22"][0]), published(TABLE_1["2 composites"][0])
    assert auc(BUDGETS, composites).value > auc(BUDGETS, ensemble).value
    assert auc(BUDGETS, composites, "trapezoid").value < auc(BUDGETS, ensemble, "trapezoid").value


@given(st.lists(st.fractions(min_value=Fraction(1, 100), max_value=2), min_size=1, max_size=6), st.floats(0, 1))
def test_a_constant_curve_has_that_mean_under_both_rules(steps: list[Fraction], height: float) -> None:
    budgets = [sum(steps[:i], Fraction(0)) for i in range(len(steps) + 1)]
    flat = [Estimate.of([height, height])] * len(budgets)
    assert auc(budgets, flat).value == pytest.approx(height)
    assert auc(budgets, flat, "trapezoid").value == pytest.approx(height)


def test_a_straight_line_has_its_exact_area() -> None:
    line = [Estimate.proportion(k, 10) for k in (10, 8, 2, 0)]
    budgets = [0, 0.2, 0.8, 1]
    assert auc(budgets, line, "trapezoid").value == pytest.approx(0.5)
    assert auc(budgets, line).value == pytest.approx(0.2 * 0.8 + 0.6 * 0.2)


def test_areas_over_the_same_examples_are_paired() -> None:
    budget_reached = np.array([0, 1, 2, 3, 3])  # how many of the budgets each example withstands
    curve = [Estimate.of(budget_reached >= k, examples=range(5)) for k in range(4)]
    stronger = [Estimate.of([1] * 5, examples=range(5))] * 4
    area = auc([0, 1, 2, 4], curve)
    assert area.values == pytest.approx([0, 0.25, 0.5, 1, 1])
    difference = auc([0, 1, 2, 4], stronger) - area
    assert difference.kind == "paired difference"
    assert difference.value == pytest.approx(0.45)


A = Estimate.proportion(1, 2)


@pytest.mark.parametrize(
    ("budgets", "accuracies", "rule", "message"),
    [
        ([0, 1], [A], "right", "as many"),
        ([], [], "right", "increase"),
        ([0], [A], "right", "increase"),
        ([-1, 1], [A, A], "right", "increase"),
        ([0, 2, 1], [A, A, A], "right", "increase"),
        ([1, 1], [A, A], "right", "increase"),
        ([0, float("nan")], [A, A], "right", "increase"),
        ([0, float("inf")], [A, A], "right", "increase"),
        ([1, 2], [A, A], "trapezoid", "natural accuracy"),
        ([0, 1], [A, A], "simpson", "right, trapezoid"),
    ],
)
def test_bad_curves_are_refused(budgets: list[float], accuracies: list[Estimate], rule: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        auc(budgets, accuracies, rule)  # type: ignore[arg-type]
