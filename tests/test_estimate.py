import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from robench.errors import UserError
from robench.estimate import Estimate, average, contrast, mcnemar, over_seeds, wilson


def paired(both: int, first: int, second: int, neither: int) -> tuple[Estimate, Estimate]:
    """Two estimates of the given 2x2 table: correct in both, in the first only, in the second only, in neither."""
    a = [1] * both + [1] * first + [0] * second + [0] * neither
    b = [1] * both + [0] * first + [1] * second + [0] * neither
    return Estimate.of(a), Estimate.of(b)


# Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 1998, table I, method 3.
@pytest.mark.parametrize(("k", "n", "low", "high"), [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)])
def test_one_proportion_has_wilsons_interval(k: int, n: int, low: float, high: float) -> None:
    estimate = Estimate.proportion(k, n)
    assert (estimate.value, estimate.n) == (k / n, n)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)


def test_fractional_successes_follow_the_same_formula_as_whole_ones() -> None:
    for k, n in [(0, 5), (3, 7), (7, 7), (521, 1000)]:
        nudge = 1e-9 if k < n else -1e-9
        assert wilson(k + nudge, n) == pytest.approx(wilson(k, n), abs=1e-6)
    # Half correct everywhere has no spread; its interval is that of half the examples correct: conservative.
    assert Estimate.of([0.5] * 10).low == pytest.approx(Estimate.of([0, 1] * 5).low)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_a_share_lies_in_its_interval(values: list[float]) -> None:
    estimate = Estimate.of(values)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.value == pytest.approx(np.mean(values))


@given(st.integers(1, 200), st.data())
def test_the_interval_moves_up_with_every_success(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n - 1))
    fewer, half, more = (Estimate.proportion(successes, n) for successes in (k, k + 0.5, k + 1))
    assert fewer.low <= half.low < more.low
    assert fewer.high < half.high <= more.high


# Fagerland, Lydersen and Laake, "Statistical Analysis of Contingency Tables", 2017, chapter 8: Cavo et al. 2012.
def test_a_paired_difference_has_the_interval_of_bonett_and_price() -> None:
    a, b = paired(59, 6, 16, 80)
    difference = a - b
    assert difference.value == pytest.approx(-10 / 161)
    assert (difference.low, difference.high) == pytest.approx((-0.1195, -0.0032), abs=5e-5)
    assert (difference.kind, difference.n) == ("paired difference", 161)
    assert mcnemar(a, b) == pytest.approx(0.052479, abs=5e-7)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(1, 40))
def test_the_paired_interval_is_the_published_formula(both: int, first: int, second: int, neither: int) -> None:
    a, b = paired(both, first, second, neither)
    n = a.n
    p12, p21 = (first + 1) / (n + 2), (second + 1) / (n + 2)
    half = 1.959963984540054 * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / (n + 2))
    expected = max(-1.0, p12 - p21 - half), min(1.0, p12 - p21 + half)
    assert ((a - b).low, (a - b).high) == pytest.approx(expected, abs=1e-12)


# Newcombe, "Interval estimation for the difference between independent proportions", 1998, method 10.
@pytest.mark.parametrize(
    ("a", "b", "low", "high"),
    [((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090), ((10, 10), (0, 10), 0.6075, 1)],
)
def test_an_unpaired_difference_has_newcombes_interval(a: tuple[int, int], b: tuple[int, int], low: float, high: float) -> None:
    difference = Estimate.proportion(*a) - Estimate.proportion(*b)
    assert difference.value == pytest.approx(a[0] / a[1] - b[0] / b[1])
    assert (difference.low, difference.high) == pytest.approx((low, high), abs=5e-5)
    assert (difference.kind, difference.n, difference.values) == ("difference", min(a[1], b[1]), None)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40), st.booleans())
def test_differences_are_antisymmetric_and_contain_their_value(pairs: list[tuple[float, float]], with_values: bool) -> None:
    a, b = (Estimate.of(column) for column in zip(*pairs, strict=True))
    if not with_values:
        a, b = Estimate.proportion(a.value * a.n, a.n), Estimate.proportion(b.value * b.n, b.n)
    forward, backward = a - b, b - a
    assert (forward.value, forward.low, forward.high) == pytest.approx((-backward.value, -backward.high, -backward.low), abs=1e-12)
    assert -1 <= forward.low <= forward.value <= forward.high <= 1
    assert forward.low < forward.high


@pytest.mark.parametrize(("n", "first", "second"), [(30, 0.3, 0.1), (200, 0.1, 0.05), (200, 0.01, 0.01), (500, 0.02, 0.0)])
def test_the_paired_interval_covers_95_percent(n: int, first: float, second: float) -> None:
    generator = np.random.default_rng(2012)
    trials, covered = 1000, 0
    for _ in range(trials):
        only_first, only_second, same = generator.multinomial(n, [first, second, 1 - first - second])
        a, b = paired(same, only_first, only_second, 0)
        difference = a - b
        covered += difference.low <= first - second <= difference.high
    # 95 % less three standard errors of the simulation; the method leans to the safe side when few examples differ.
    assert covered / trials >= 0.929
    assert covered / trials <= 0.985 or min(first, second) < 0.02


def test_pairing_narrows_a_difference_that_the_examples_share() -> None:
    a, b = paired(500, 60, 10, 430)
    unpaired = Estimate.proportion(560, 1000) - Estimate.proportion(510, 1000)
    assert (a - b).value == pytest.approx(unpaired.value)
    assert (a - b).high - (a - b).low < 0.5 * (unpaired.high - unpaired.low)


def test_pairing_matches_examples_by_identity_not_by_position() -> None:
    a = Estimate.of([1, 0, 1, 1], examples=[7, 3, 5, 1])
    b = Estimate.of([0, 1, 0], examples=[3, 5, 9])
    difference = a - b  # on 3: 0 - 0, on 5: 1 - 1
    assert (difference.value, difference.n, difference.kind) == (0, 2, "paired difference")
    assert difference.examples is not None
    assert difference.examples.tolist() == [3, 5]


@pytest.mark.parametrize(
    "other",
    [
        Estimate.of([1, 0, 1], examples=[10, 11, 12]),  # no example in common
        Estimate.of([1, 0, 1]),  # identities unknown
        Estimate.of([1, 0, 1], examples=[0, 1, 2], dataset="another"),
        Estimate.proportion(2, 3),
    ],
)
def test_what_cannot_be_paired_is_not(other: Estimate) -> None:
    assert (Estimate.of([1, 1, 0], examples=[0, 1, 2]) - other).kind == "difference"
    assert (Estimate.of([1, 0]) - Estimate.of([1, 0, 1])).kind == "difference"


def test_a_contrast_combines_every_example() -> None:
    generator = np.random.default_rng(0)
    columns = generator.integers(0, 2, (4, 50))
    a, b, c, d = (Estimate.of(column, examples=range(50)) for column in columns)
    gap = contrast([(1, a), (-1, b), (-1, c), (1, d)])
    combined = columns[0] - columns[1] - columns[2] + columns[3]
    padded = np.append(combined, [-2, 2])
    half = 1.959963984540054 * math.sqrt(padded.var() / 52)
    assert (gap.value, gap.low, gap.high) == pytest.approx((combined.mean(), padded.mean() - half, padded.mean() + half))
    assert contrast([(1, a), (-1, b)]) == a - b
    doubled = contrast([(2, a), (-2, b)])
    assert (doubled.low, doubled.high) == pytest.approx((2 * (a - b).low, 2 * (a - b).high))


def test_an_unpaired_contrast_adds_the_distances_to_the_limits_in_squares() -> None:
    a, b, c = Estimate.proportion(60, 100), Estimate.proportion(50, 100), Estimate.proportion(20, 100)
    gap = contrast([(1, a), (-0.5, b), (-0.5, c)])
    below = math.sqrt((a.value - a.low) ** 2 + 0.25 * (b.high - b.value) ** 2 + 0.25 * (c.high - c.value) ** 2)
    above = math.sqrt((a.high - a.value) ** 2 + 0.25 * (b.value - b.low) ** 2 + 0.25 * (c.value - c.low) ** 2)
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.25, 0.25 - below, 0.25 + above))


def test_seeds_are_kept_apart_from_the_interval_over_examples() -> None:
    models = [Estimate.of(values, examples=[4, 2, 9]) for values in ([1, 1, 0], [1, 0, 0], [1, 0, 0])]
    mean = over_seeds(models)
    assert mean.seeds == pytest.approx((2 / 3, 1 / 3, 1 / 3))
    assert (mean.value, mean.n) == pytest.approx((4 / 9, 3))
    assert (mean.low, mean.high) == pytest.approx(wilson(4 / 3, 3))
    assert mean.values is not None
    assert mean.values == pytest.approx([1 / 3, 1, 0])  # in the order of the identities: 2, 4, 9
    difference = mean - over_seeds(models[::-1])
    assert difference.value == pytest.approx(0)
    assert difference.seeds == pytest.approx((1 / 3, 0, -1 / 3))
    assert (mean - models[0]).seeds == ()


def test_an_average_without_values_has_the_conservative_interval() -> None:
    mean = average([(0.25, Estimate.proportion(80, 100)), (0.75, Estimate.proportion(40, 50))])
    assert (mean.value, mean.n) == pytest.approx((0.8, 50))
    assert (mean.low, mean.high) == pytest.approx(wilson(40, 50))


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs() -> None:
    assert mcnemar(*paired(5, 0, 0, 5)) == 1
    assert mcnemar(*paired(3, 6, 0, 1)) == pytest.approx(2 / 2**6)
    assert mcnemar(*paired(0, 9, 3, 0)) == pytest.approx(binomtest(9, 12).pvalue)


def test_estimates_print_as_the_field_writes_them() -> None:
    assert str(Estimate.proportion(521, 1000)) == "52.1 % [49.0, 55.2] (n=1000)"
    a, b = paired(500, 60, 10, 430)
    assert str(a - b) == "+5.0 points [3.4, 6.6] (n=1000, paired)"
    assert str(b - a) == "-5.0 points [-6.6, -3.4] (n=1000, paired)"
    assert str(Estimate.proportion(56, 70) - Estimate.proportion(48, 80)) == "+20.0 points [5.2, 33.4] (n=70, unpaired)"
    models = [Estimate.of([1] * k + [0] * (1000 - k)) for k in (513, 521, 529)]
    assert str(over_seeds(models)) == "52.1 % [49.0, 55.2] (n=1000; 3 seeds, sd 0.8)"
    assert str(over_seeds(models[1:2])) == "52.1 % [49.0, 55.2] (n=1000; 1 seed)"
    zero = Estimate.of([0.1, 0.2]) - Estimate.of([0.2, 0.1])
    assert str(zero).startswith("+0.0 points")


def test_per_example_values_cannot_be_changed_afterwards() -> None:
    given_values = np.array([1.0, 0.0])
    estimate = Estimate.of(given_values, examples=[0, 1])
    given_values[1] = 1
    assert estimate.values is not None
    assert estimate.values.tolist() == [1, 0]
    with pytest.raises(ValueError, match="read-only"):
        estimate.values[0] = 0
    assert estimate == Estimate.proportion(1, 2)
    assert "values" not in repr(estimate)


A, D = Estimate.of([1, 0]), Estimate.of([1, 0]) - Estimate.of([0, 1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Estimate.of([]), "at least one example"),
        (lambda: Estimate.of([[1.0]]), "shape"),
        (lambda: Estimate.of([0.5, math.nan]), "finite"),
        (lambda: Estimate.of([0.5, 1.5]), r"\[0.5, 1.5\]"),
        (lambda: Estimate.of([1, 0], examples=[3]), "2 different example identities"),
        (lambda: Estimate.of([1, 0], examples=[3, 3]), "2 different example identities"),
        (lambda: Estimate.proportion(3, 2), "no proportion"),
        (lambda: Estimate.proportion(0, 0), "no proportion"),
        (lambda: contrast([]), "at least one"),
        (lambda: D - A, "one contrast"),
        (lambda: average([(0.5, A)]), "sum to 1"),
        (lambda: average([(-1, A), (2, A)]), "at least 0"),
        (lambda: average([(1, D)]), "shares"),
        (lambda: over_seeds([]), "same examples"),
        (lambda: over_seeds([A, Estimate.of([1, 0, 1])]), "same examples"),
        (lambda: over_seeds([Estimate.of([1, 0], [0, 1]), Estimate.of([1, 0], [1, 2])]), "same examples"),
        (lambda: mcnemar(A, Estimate.proportion(1, 2)), "shared examples"),
        (lambda: mcnemar(A, Estimate.of([0.5, 1])), "0 or 1"),
    ],
)
def test_bad_input_is_one_clear_line(wrong, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)
