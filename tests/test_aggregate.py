"""Aggregators: algebra that holds for all of them, and what holds for each."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robench import aggregate
from robench.aggregate import AGGREGATORS
from robench.errors import UserError

VOTE = "majority_vote"
every_aggregator = pytest.mark.parametrize("name", AGGREGATORS)
WEIGHTS = (0.5, 3.0, 1.0, 0.0)

# A constant added to all logits of one predictor changes nothing (its softmax and its vote are the same); for the means of
# logits it moves all classes alike, so that the prediction stays. The median of logits has neither.
SHIFT_INVARIANT = ("mean_of_probabilities", VOTE, "crossmax_median", "crossmax_2nd", "crossmax_3rd")
# Every predictor twice is the same ensemble. The k-th highest counts predictors, so it is not.
DUPLICATE_INVARIANT = ("mean_of_logits", "mean_of_probabilities", "median_of_logits", VOTE, "crossmax_median")


def logits_of(seed: int, predictors: int, classes: int, batch: int = 4, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(batch, predictors, classes, dtype=torch.float64, generator=generator)


LOGITS = st.builds(logits_of, st.integers(0, 2**32), st.integers(3, 7), st.integers(1, 6))


def of(*rows: list[float]) -> Tensor:
    """Return the logits (1, N, C) of one example, one row for each predictor."""
    return torch.tensor([rows], dtype=torch.float64)


# Known answers

THREE = of([4.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 0.0, 6.0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean_of_logits", [5 / 3, 1, 7 / 3]),
        ("median_of_logits", [1, 1, 1]),
        (VOTE, [1 / 3, 1 / 3, 1 / 3]),
        # Less the row maxima: [0 -3 -4], [-2 0 -1], [-5 -6 0]; every column's maximum is then 0.
        ("crossmax_median", [-2, -3, -1]),
        ("crossmax_2nd", [-2, -3, -1]),
        ("crossmax_3rd", [-5, -6, -4]),
    ],
)
def test_three_predictors_by_hand(name: str, expected: list[float]) -> None:
    assert AGGREGATORS[name](THREE)[0].tolist() == pytest.approx(expected)


def test_the_mean_of_probabilities_by_hand() -> None:
    # Softmax of log p is p.
    probabilities = of([0.7, 0.2, 0.1], [0.1, 0.3, 0.6])
    aggregated = aggregate.mean_of_probabilities(probabilities.log())
    assert aggregated[0].exp().tolist() == pytest.approx([0.4, 0.25, 0.35])


@settings(deadline=None)
@given(LOGITS)
def test_mean_of_probabilities_returns_log_probabilities(logits: Tensor) -> None:
    aggregated = aggregate.mean_of_probabilities(logits)
    assert aggregated.exp().sum(-1).tolist() == pytest.approx([1.0] * len(logits))
    assert torch.allclose(aggregated.softmax(-1), logits.softmax(-1).mean(1))
    assert torch.allclose(aggregated.softmax(-1), aggregated.exp())


def test_mean_of_probabilities_stays_finite_where_probabilities_vanish() -> None:
    aggregated = aggregate.mean_of_probabilities(of([0.0, -5000.0], [0.0, -3000.0]).float())
    assert aggregated[0].tolist() == pytest.approx([0.0, -3000.0 - math.log(2)])


def test_the_weighted_mean_by_hand() -> None:
    assert aggregate.weighted((1, 2, 1))(THREE)[0].tolist() == pytest.approx([1.25, 1.25, 2.0])
    assert torch.allclose(aggregate.weighted((0, 5, 0))(THREE), THREE[:, 1])
    assert torch.allclose(aggregate.weighted((7, 7, 7))(THREE), aggregate.mean_of_logits(THREE))
    assert torch.allclose(aggregate.weighted((0.1, 0.2, 0.1))(THREE), aggregate.weighted((1, 2, 1))(THREE))


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    # torch.median would give the lower.
    assert aggregate.median_of_logits(of([0.0], [1.0], [5.0], [9.0]))[0].tolist() == [3.0]


@settings(deadline=None)
@given(LOGITS)
def test_the_median_is_numpys(logits: Tensor) -> None:
    assert np.allclose(aggregate.median_of_logits(logits).numpy(), np.median(logits.numpy(), axis=1))


@settings(deadline=None)
@given(LOGITS)
def test_the_kth_highest_runs_from_the_maximum_to_the_minimum(logits: Tensor) -> None:
    predictors = logits.shape[1]
    for k in range(1, predictors + 1):
        expected = np.sort(logits.numpy(), axis=1)[:, predictors - k]
        assert np.array_equal(aggregate.kth_highest_of_logits(logits, k).numpy(), expected)


def crossmax_reference(logits: np.ndarray, k: int | None) -> np.ndarray:
    """CrossMax (arXiv 2408.05446, Algorithm 1), value by value."""
    batch, predictors, classes = logits.shape
    result = np.empty((batch, classes))
    for b in range(batch):
        z = [[logits[b][n][c] - max(logits[b][n]) for c in range(classes)] for n in range(predictors)]
        for c in range(classes):
            highest = max(z[n][c] for n in range(predictors))
            column = sorted((z[n][c] - highest for n in range(predictors)), reverse=True)
            middle = (column[(predictors - 1) // 2] + column[predictors // 2]) / 2
            result[b][c] = middle if k is None else column[k - 1]
    return result


@settings(deadline=None)
@given(LOGITS, st.sampled_from([None, 2, 3]))
def test_crossmax_agrees_with_a_slow_reference(logits: Tensor, k: int | None) -> None:
    assert np.allclose(aggregate.crossmax(logits, k).numpy(), crossmax_reference(logits.numpy(), k))


def test_the_order_of_crossmaxs_steps_matters() -> None:
    # The other order, maximum over the predictors first, gives another prediction.
    logits = of([9.0, 6.0, 0.0], [3.0, 2.0, 3.0], [2.0, 4.0, 0.0])
    reverse = logits - logits.amax(1, keepdim=True)
    reverse = aggregate.median_of_logits(reverse - reverse.amax(-1, keepdim=True))
    # By hand: rows less their maxima [0 -3 -9], [0 -1 0], [-2 0 -4]; columns' maxima 0, 0, 0; medians 0, -1, -4.
    assert aggregate.crossmax(logits)[0].tolist() == [0, -1, -4]
    # By hand: columns less their maxima [0 0 -3], [-6 -4 0], [-7 -2 -3]; rows' maxima 0, 0, -2; medians -5, 0, -1.
    assert reverse[0].tolist() == [-5, 0, -1]


@settings(deadline=None)
@given(LOGITS)
def test_crossmax_is_never_positive(logits: Tensor) -> None:
    assert float(aggregate.crossmax(logits).max()) <= 0
    # The highest over the predictors is 0 for every class: why k = 1 is refused.
    normalised = logits - logits.amax(-1, keepdim=True)
    normalised = normalised - normalised.amax(1, keepdim=True)
    assert bool((aggregate.kth_highest_of_logits(normalised, 1) == 0).all())


# Algebra


@every_aggregator
@settings(deadline=None, max_examples=30)
@given(logits=LOGITS, data=st.data())
def test_the_order_of_predictors_does_not_matter(name: str, logits: Tensor, data) -> None:
    order = data.draw(st.permutations(range(logits.shape[1])))
    assert torch.allclose(AGGREGATORS[name](logits[:, order]), AGGREGATORS[name](logits))


@settings(deadline=None, max_examples=30)
@given(logits=st.builds(logits_of, st.integers(0, 2**32), st.just(len(WEIGHTS)), st.integers(1, 6)), data=st.data())
def test_weights_go_with_their_predictors(logits: Tensor, data) -> None:
    order = data.draw(st.permutations(range(len(WEIGHTS))))
    permuted = aggregate.weighted([WEIGHTS[i] for i in order])(logits[:, order])
    assert torch.allclose(permuted, aggregate.weighted(WEIGHTS)(logits))


@every_aggregator
@settings(deadline=None, max_examples=30)
@given(logits=LOGITS, data=st.data())
def test_classes_are_treated_alike(name: str, logits: Tensor, data) -> None:
    order = data.draw(st.permutations(range(logits.shape[2])))
    assert torch.allclose(AGGREGATORS[name](logits[..., order]), AGGREGATORS[name](logits)[..., order])


@every_aggregator
@settings(deadline=None, max_examples=30)
@given(logits=LOGITS, data=st.data())
def test_examples_do_not_mix(name: str, logits: Tensor, data) -> None:
    order = data.draw(st.lists(st.integers(0, len(logits) - 1), min_size=1, max_size=6))
    assert torch.equal(AGGREGATORS[name](logits[order]), AGGREGATORS[name](logits)[order])


def shifted(logits: Tensor, seed: int) -> Tensor:
    """Add another constant to all logits of each example's predictors."""
    return logits + 10 * logits_of(seed, logits.shape[1], 1, len(logits))


@pytest.mark.parametrize("name", SHIFT_INVARIANT)
@settings(deadline=None, max_examples=30)
@given(logits=LOGITS, seed=st.integers(0, 2**32))
def test_constants_added_to_a_predictors_logits_change_nothing(name: str, logits: Tensor, seed: int) -> None:
    assert torch.allclose(AGGREGATORS[name](shifted(logits, seed)), AGGREGATORS[name](logits))


@settings(deadline=None, max_examples=30)
@given(logits=LOGITS, seed=st.integers(0, 2**32))
def test_constants_move_all_classes_of_a_mean_of_logits_alike(logits: Tensor, seed: int) -> None:
    for mean in (aggregate.mean_of_logits, aggregate.weighted(range(1, logits.shape[1] + 1))):
        before, after = mean(logits), mean(shifted(logits, seed))
        assert torch.allclose(after - after[:, :1], before - before[:, :1])
        assert not torch.allclose(after, before)


def test_a_constant_can_change_what_the_median_of_logits_predicts() -> None:
    # Which is why CrossMax subtracts each predictor's maximum first.
    logits = of([3.0, 0.0], [1.0, 2.0], [0.0, 1.5])
    lifted = logits + torch.tensor([[[0.0], [4.0], [0.0]]])
    assert int(aggregate.median_of_logits(logits).argmax()) == 1
    assert int(aggregate.median_of_logits(lifted).argmax()) == 0
    assert aggregate.crossmax(lifted).tolist() == aggregate.crossmax(logits).tolist()


@pytest.mark.parametrize("name", DUPLICATE_INVARIANT)
@settings(deadline=None, max_examples=30)
@given(logits=LOGITS, times=st.integers(2, 4))
def test_every_predictor_repeated_changes_nothing(name: str, logits: Tensor, times: int) -> None:
    repeated = AGGREGATORS[name](logits.repeat_interleave(times, dim=1))
    assert torch.allclose(repeated, AGGREGATORS[name](logits), atol=1e-6)


@pytest.mark.parametrize(("name", "k"), [("crossmax_2nd", 2), ("crossmax_3rd", 3)])
def test_repeating_predictors_k_times_makes_the_kth_highest_zero(name: str, k: int) -> None:
    # The k-th highest counts predictors: the one at 0 fills the first k places.
    logits = logits_of(0, 3, 5)
    assert bool((AGGREGATORS[name](logits.repeat_interleave(k, dim=1)) == 0).all())
    assert not bool((AGGREGATORS[name](logits) == 0).all())


@pytest.mark.parametrize("name", [name for name in AGGREGATORS if name not in ("crossmax_2nd", "crossmax_3rd")])
def test_one_predictor_decides_alone(name: str) -> None:
    logits = logits_of(3, 1, 5)
    if name.startswith("crossmax"):
        # The maximum over one predictor is that predictor: CrossMax of one knows nothing.
        with pytest.raises(UserError, match="CrossMax of one predictor is identically zero"):
            AGGREGATORS[name](logits)
        return
    aggregated = AGGREGATORS[name](logits)
    assert torch.equal(aggregated.argmax(-1), logits[:, 0].argmax(-1))
    if name in ("mean_of_logits", "median_of_logits"):
        assert torch.equal(aggregated, logits[:, 0])
    if name == "mean_of_probabilities":
        assert torch.allclose(aggregated, logits[:, 0].log_softmax(-1))


@every_aggregator
def test_predictors_that_agree_are_right_together(name: str) -> None:
    logits = logits_of(4, 1, 5).repeat(1, 7, 1)
    if name.startswith("crossmax"):
        # Every class's maximum over equal predictors is every predictor's: exact copies tie in all classes.
        assert bool((AGGREGATORS[name](logits) == 0).all())
    else:
        assert torch.equal(AGGREGATORS[name](logits).argmax(-1), logits[:, 0].argmax(-1))


# Ties


@every_aggregator
def test_a_tie_goes_to_the_lower_class(name: str) -> None:
    for classes in (2, 5, 10):
        logits = torch.zeros(3, 4, classes, dtype=torch.float64)
        assert AGGREGATORS[name](logits).argmax(-1).tolist() == [0, 0, 0]
        # Classes 1 on tie above class 0.
        logits[..., 0] = -1
        logits[:, 0, 0] = -2
        aggregated = AGGREGATORS[name](logits)
        if not name.startswith("crossmax"):
            assert aggregated.argmax(-1).tolist() == [1, 1, 1]


def test_a_split_vote_goes_to_the_lower_class() -> None:
    assert aggregate.majority_vote(of([0, 0, 1], [0, 1, 0])).argmax(-1).tolist() == [1]
    assert aggregate.majority_vote(of([5, 5, 0], [0, 5, 5])).tolist() == [[0.5, 0.5, 0.0]]


# Outliers

OUTLIERS = st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4)


@pytest.mark.parametrize("name", ["median_of_logits", VOTE])
@settings(deadline=None, max_examples=50)
@given(agreed=st.lists(st.floats(-50, 50), min_size=4, max_size=4, unique=True), outlier=OUTLIERS, count=st.integers(2, 6))
def test_one_outlier_does_not_move_the_median_or_the_vote(name, agreed, outlier, count) -> None:
    together, disturbed = of(*[agreed] * (count + 1)), of(*[agreed] * count, outlier)
    assert torch.equal(AGGREGATORS[name](disturbed).argmax(-1), AGGREGATORS[name](together).argmax(-1))
    if name == "median_of_logits":
        # Of three or more, the middle is an agreed value, whatever the outlier is.
        assert torch.equal(AGGREGATORS[name](disturbed), AGGREGATORS[name](together))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), outlier=OUTLIERS, predictors=st.integers(3, 7))
def test_one_outlier_moves_the_median_no_further_than_its_neighbours(seed, outlier, predictors) -> None:
    rest = logits_of(seed, predictors - 1, 4, batch=1)
    median = aggregate.median_of_logits(torch.cat([rest, of(outlier)], 1))
    assert bool((median >= rest.amin(1)).all())
    assert bool((median <= rest.amax(1)).all())


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), outlier=OUTLIERS, predictors=st.integers(3, 7))
def test_one_outlier_moves_crossmax_within_bounds(seed, outlier, predictors) -> None:
    rest = logits_of(seed, predictors - 1, 4, batch=1)
    aggregated = aggregate.crossmax(torch.cat([rest, of(outlier)], 1))
    # Less its own maximum an outlier has nothing above 0, and each class's maximum lies between the rest's and 0: no class
    # falls below the rest's lowest normalised logit, and none rises above 0.
    lowest = (rest - rest.amax(-1, keepdim=True)).amin(1)
    assert bool((aggregated <= 0).all())
    assert bool((aggregated >= lowest - 1e-9).all())


def test_a_more_confident_predictor_can_tie_crossmax() -> None:
    # Equal predictors r and one o leave min(0, r - o): every class in which o has less than r ties with the class all agree on.
    logits = of([-5.0, 0.0], [-5.0, 0.0], [-9.0, 0.0])
    assert logits.argmax(-1).tolist() == [[1, 1, 1]]
    assert aggregate.crossmax(logits).tolist() == [[0, 0]]


def test_one_outlier_moves_the_means() -> None:
    agreed = [[2.0, 0.0, 0.0]] * 6
    assert int(aggregate.mean_of_logits(of(*agreed, [0.0, 0.0, 1e6])).argmax()) == 2
    # A probability is at most 1, so for the mean of probabilities it takes predictors that are not sure.
    unsure = [[0.1, 0.0, 0.0]] * 2
    assert int(aggregate.mean_of_probabilities(of(*unsure, [0.0, 0.0, 1e6])).argmax()) == 2
    assert int(aggregate.mean_of_probabilities(of(*[[9.0, 0.0, 0.0]] * 2, [0.0, 0.0, 1e6])).argmax()) == 0


# Types and gradients


@every_aggregator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_stays_and_the_value_is_close(name: str, dtype: torch.dtype) -> None:
    logits = logits_of(7, 5, 6).to(dtype)
    aggregated = AGGREGATORS[name](logits)
    assert aggregated.dtype == dtype
    exact = AGGREGATORS[name](logits.double())
    # A few roundings of numbers up to 20.
    assert float((aggregated.double() - exact).abs().max()) <= 20 * 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("aggregator", "expected"),
    [
        (aggregate.mean_of_probabilities, [math.log(0.4), math.log(0.25), math.log(0.35)]),
        (aggregate.weighted((1, 2)), [math.log(0.7 * 0.01) / 3, math.log(0.2 * 0.09) / 3, math.log(0.1 * 0.36) / 3]),
    ],
)
def test_float64_logits_are_aggregated_in_float64(aggregator, expected: list[float]) -> None:
    logits = of([0.7, 0.2, 0.1], [0.1, 0.3, 0.6]).log()
    assert aggregator(logits)[0].tolist() == pytest.approx(expected, rel=1e-13)


DIFFERENTIABLE = [name for name in AGGREGATORS if name != VOTE]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@settings(deadline=None, max_examples=20)
@given(logits=LOGITS)
def test_gradients_are_those_of_finite_differences(name: str, logits: Tensor) -> None:
    # Random logits have no ties, where the order statistics are not differentiable.
    small = logits[:1, :, :4].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(AGGREGATORS[name], (small,), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_gradients_are_finite(name: str, scale: float) -> None:
    logits = (scale * logits_of(8, 4, 5)).float().requires_grad_(True)
    aggregated = AGGREGATORS[name](logits)
    aggregated[:, 2].sum().backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


def test_a_vote_has_no_gradient() -> None:
    logits = logits_of(9, 3, 4).requires_grad_(True)
    votes = aggregate.majority_vote(logits)
    assert not votes.requires_grad
    assert votes.sum(-1).tolist() == pytest.approx([1.0] * 4)


@every_aggregator
def test_the_logits_given_are_left_as_they_were(name: str) -> None:
    logits = logits_of(10, 4, 5)
    before = logits.clone()
    AGGREGATORS[name](logits)
    assert torch.equal(logits, before)


@every_aggregator
def test_an_empty_batch_aggregates_to_an_empty_batch(name: str) -> None:
    assert AGGREGATORS[name](torch.empty(0, 4, 5)).shape == (0, 5)


# Errors


def refused(aggregator, logits: Tensor) -> str:
    with pytest.raises(UserError) as caught:
        aggregator(logits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("aggregator", [*AGGREGATORS.values(), aggregate.weighted((1, 1, 1))], ids=[*AGGREGATORS, "weighted"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(aggregator, value: float) -> None:
    logits = logits_of(11, 3, 5)
    logits[2, 1, 3] = value
    assert "not finite" in refused(aggregator, logits)


@every_aggregator
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4, 5), (4, 0, 5), (4, 3, 0)])
def test_other_shapes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    message = refused(AGGREGATORS[name], torch.zeros(shape))
    assert str(shape) in message or "k = " in message


def test_crossmax_with_the_highest_is_refused_with_its_reason() -> None:
    message = refused(aggregate.crossmax_kth(1), THREE)
    assert "identically zero" in message
    assert "k >= 2" in message


@pytest.mark.parametrize("k", [-1, 0, 4])
def test_a_k_beyond_the_predictors_is_refused(k: int) -> None:
    for aggregator in (aggregate.crossmax_kth(k), lambda logits: aggregate.kth_highest_of_logits(logits, k)):
        message = refused(aggregator, THREE)
        assert f"k = {k} must be between 1 and the number of predictors, 3" in message


@pytest.mark.parametrize(
    "weights",
    [
        (),
        (1, 1),
        (1, 1, 1, 1),
        (1, -1, 1),
        (0, 0, 0),
        (1, math.nan, 1),
        (1, math.inf, 1),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: tuple[float, ...]) -> None:
    message = refused(aggregate.weighted(weights), THREE)
    assert "3 numbers, one per predictor" in message
