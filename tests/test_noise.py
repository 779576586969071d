"""Noise: the generator's published vectors, and that a number depends on its identity alone."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robench import noise
from robench.noise import Draw

ONES = 0xFFFFFFFF
INT64 = st.integers(-(2**63), 2**63 - 1)
KINDS = {
    "uniform": noise.uniform,
    "normal": noise.normal,
    "integers": lambda draw, stream, shape: noise.integers(draw, stream, 0, 1 << 30, shape),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def draw(seed: int = 0, examples: list[int] | None = None, number: int = 0) -> Draw:
    return Draw(seed, torch.tensor([0] if examples is None else examples, dtype=torch.int64), number)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected) -> None:
    # The known answers for philox4x32-10 that come with Random123.
    for words in every_philox(counter, key):
        assert tuple(words) == expected


def every_philox(counter: Sequence[int], key: Sequence[int]) -> list[list[int]]:
    """Return the words by each implementation."""
    tensors = noise.philox([torch.tensor([word]) for word in counter], [torch.tensor([word]) for word in key])
    arrays = noise.philox_arrays(*([np.array([word], np.uint32) for word in part] for part in (counter, key)))
    return [[int(word.item()) for word in found] for found in (tensors, arrays)]


def philox_reference(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & ONES, (p0 >> 32) ^ c[3] ^ k[1], p0 & ONES]
        k = [(k[0] + 0x9E3779B9) & ONES, (k[1] + 0xBB67AE85) & ONES]
    return c


WORD = st.integers(0, ONES)


@settings(deadline=None)
@given(st.lists(WORD, min_size=4, max_size=4), st.tuples(WORD, WORD))
def test_philox_agrees_with_unbounded_integers(counter: list[int], key: tuple[int, int]) -> None:
    # The products wrap in int64; no word may show it.
    for words in every_philox(counter, key):
        assert words == philox_reference(counter, list(key))


def test_words_of_several_uses_are_those_of_each_alone() -> None:
    one = draw(3, [0, 5, 2**33 + 1], 2)
    counts = {"a": 1, "b": 7, "c": 3 * 1024}
    together = noise.words(one, counts)
    for name, count in counts.items():
        assert torch.equal(together[name], noise.words(one, {name: count})[name])


def test_words_are_the_same_wherever_they_are_made() -> None:
    # The implementation for other devices, run on the CPU.
    examples = torch.tensor([0, 5, 2**33 + 1, -1])
    positions, keys = np.arange(40, dtype=np.uint32), np.array([[1], [2**32 - 1]], np.uint32).repeat(40, axis=1)
    arrays = noise._words_of_arrays(examples.numpy(), 2**32 - 1, positions, keys)
    places = torch.from_numpy(np.stack([positions, *keys]).astype(np.int64))
    assert torch.equal(arrays, noise._words_of_tensors(examples, 2**32 - 1, places))


def test_a_number_that_is_kept_on_the_device_is_the_number_it_is_at_each_use() -> None:
    examples, places, reads = torch.tensor([0, 7, 2**33 + 5]), noise._on_device(3, (("a", 9),), torch.device("cpu")), list[torch.Tensor]()
    kept = noise.OnDevice(torch.tensor(4), reads, 4)
    assert kept == 4
    for number in (4, 2**32 + 1):
        kept.place.fill_(number)
        assert torch.equal(noise._words_of_tensors(examples, kept, places), noise._words_of_tensors(examples, number, places))
    assert all(read is places for read in reads), "what a recording reads lives as long as it does"
    assert len(reads) == 2


@every_kind
@settings(deadline=None, max_examples=40)
@given(data=st.data(), seed=INT64, number=st.integers(0, 2**32 - 1))
def test_noise_depends_neither_on_batch_nor_on_order(kind, data, seed: int, number: int) -> None:
    examples = data.draw(st.lists(INT64, min_size=1, max_size=7))
    shape = data.draw(st.sampled_from([(1,), (5,), (3, 2, 3)]))
    whole = kind(draw(seed, examples, number), "use", shape)
    assert whole.shape == (len(examples), *shape)
    order = data.draw(st.permutations(range(len(examples))))
    shuffled = kind(draw(seed, [examples[i] for i in order], number), "use", shape)
    assert torch.equal(shuffled, whole[order])
    cut = data.draw(st.integers(1, len(examples)))
    shards = [kind(draw(seed, part, number), "use", shape) for part in (examples[:cut], examples[cut:]) if part]
    assert torch.equal(torch.cat(shards), whole)
    for example, alone in zip(examples, whole, strict=True):
        assert torch.equal(kind(draw(seed, [example], number), "use", shape)[0], alone)


IDENTITIES = [
    draw(),
    draw(seed=1),
    draw(seed=-1),
    draw(seed=2**70),
    draw(seed=-(2**70)),
    draw(examples=[1]),
    draw(examples=[-1]),
    draw(examples=[2**32]),
    draw(examples=[2**32 + 1]),
    draw(examples=[2**62]),
    draw(number=1),
    draw(number=2**32 - 1),
]


@every_kind
def test_seeds_examples_draws_and_streams_all_differ(kind) -> None:
    made = [kind(identity, stream, (64,)) for identity in IDENTITIES for stream in ("a", "b", "a/b", "")]
    for i, one in enumerate(made):
        for other in made[:i]:
            # Two of 64 independent values may agree by chance, never many.
            assert int((one == other).sum()) < 5


def test_a_seed_and_a_stream_are_not_run_together() -> None:
    assert not torch.equal(noise.uniform(draw(seed=1), "2/use", (8,)), noise.uniform(draw(seed=12), "use", (8,)))


def test_a_shape_is_a_view_of_the_same_numbers() -> None:
    flat = noise.uniform(draw(3, [5, 6]), "use", (12,))
    assert torch.equal(noise.uniform(draw(3, [5, 6]), "use", (3, 2, 2)), flat.reshape(2, 3, 2, 2))
    # uniform and integers read the words in order, so a longer draw begins with the shorter.
    assert torch.equal(noise.uniform(draw(3, [5, 6]), "use", (5,)), flat[:, :5])


COUNT, EXAMPLES = 4000, 50
TOTAL = COUNT * EXAMPLES


def z_score(mean: float, expected: float, deviation: float) -> float:
    return abs(mean - expected) / (deviation / math.sqrt(TOTAL))


def test_uniform_has_the_moments_of_the_uniform_distribution() -> None:
    values = noise.uniform(draw(7, list(range(EXAMPLES))), "use", (COUNT,))
    assert values.dtype == torch.float32
    assert 0 <= float(values.min()) < 1e-4
    assert 1 - 1e-4 < float(values.max()) < 1
    values = values.double()
    for power in (1, 2, 3, 4):
        expected, variance = 1 / (power + 1), 1 / (2 * power + 1) - 1 / (power + 1) ** 2
        assert z_score(float((values**power).mean()), expected, math.sqrt(variance)) < 4.5
    # Neighbouring positions, examples and draws are uncorrelated.
    centred = values - 0.5
    later = noise.uniform(draw(7, list(range(EXAMPLES)), number=1), "use", (COUNT,)).double() - 0.5
    for other in (centred.roll(1, 1), centred.roll(1, 0), later):
        assert z_score(float((centred * other).mean()), 0, 1 / 12) < 4.5


def test_normal_has_the_moments_of_the_normal_distribution() -> None:
    values = noise.normal(draw(7, list(range(EXAMPLES))), "use", (COUNT,))
    assert values.dtype == torch.float32
    assert bool(torch.isfinite(values).all())
    values = values.double()
    # The moments are 0, 1, 0, 3 and the variance of the k-th power is E z^2k - (E z^k)^2.
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert z_score(float((values**power).mean()), expected, math.sqrt(variance)) < 4.5
    beyond = float((values.abs() > 2).double().mean())
    share = math.erfc(2 / math.sqrt(2))
    assert z_score(beyond, share, math.sqrt(share * (1 - share))) < 4.5
    assert z_score(float((values * values.roll(1, 1)).mean()), 0, 1) < 4.5


def test_normal_stays_finite_at_the_extreme_words() -> None:
    for word in (0, ONES):
        words = torch.full((1, 6), word).to(torch.int32)
        assert bool(torch.isfinite(noise.as_normal(words, (3,))).all())
        uniform = noise.as_uniform(words, (6,))
        assert 0 <= float(uniform.min()) <= float(uniform.max()) < 1


def test_integers_are_uniform_over_their_range() -> None:
    values = noise.integers(draw(7, list(range(EXAMPLES))), "use", -3, 4, (COUNT,))
    assert values.dtype == torch.int64
    counts = torch.bincount((values + 3).flatten(), minlength=7)
    assert len(counts) == 7
    expected = TOTAL / 7
    # Chi squared with 6 degrees of freedom exceeds 30 with probability 4e-5.
    assert float(((counts - expected) ** 2 / expected).sum()) < 30
    assert bool((noise.integers(draw(), "use", 5, 6, (9,)) == 5).all())


@every_kind
def test_an_empty_batch_has_no_noise(kind) -> None:
    assert kind(draw(examples=[]), "use", (2, 3)).shape == (0, 2, 3)


def global_states() -> tuple[object, ...]:
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 (the state that must not change)
    return torch.get_rng_state().tolist(), kind, keys.tolist(), tuple(rest), random.getstate()


@every_kind
def test_global_generators_are_neither_read_nor_moved(kind) -> None:
    before = global_states()
    first = kind(draw(), "use", (50,))
    assert global_states() == before
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        assert torch.equal(kind(draw(), "use", (50,)), first)


def test_isolated_generator_seeds_and_restores() -> None:
    before = global_states()
    with noise.isolated_generator(3):
        first = torch.rand(5)
    assert global_states() == before
    torch.rand(1)
    with noise.isolated_generator(3):
        again = torch.rand(5)
    with noise.isolated_generator(4):
        other = torch.rand(5)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def leave_by_an_error() -> None:
    with noise.isolated_generator(3):
        torch.rand(5)
        raise KeyError


def test_isolated_generator_restores_after_an_error() -> None:
    before = global_states()
    with pytest.raises(KeyError):
        leave_by_an_error()
    assert global_states() == before
