"""Drawing a token."""

import math

import numpy as np
import numpy.typing as npt
import pytest

from fleet.protocol.messages import Sampling
from fleet.protocol.sampling import draw, gumbel

Float32 = npt.NDArray[np.float32]


def logprobs(*probabilities: float) -> Float32:
    return np.log(np.array(probabilities, dtype=np.float32))


def ids(candidates: Float32) -> npt.NDArray[np.int64]:
    return np.arange(100, 100 + len(candidates))


def drawn(
    candidates: Float32, sampling: Sampling, num_positions: int = 2000
) -> npt.NDArray[np.int64]:
    """Return the number of draws of each candidate over many positions."""
    chosen = [
        draw(candidates, ids(candidates), position, sampling) for position in range(num_positions)
    ]
    return np.bincount(chosen, minlength=len(candidates))


def test_temperature_zero_takes_the_best_whatever_the_seed() -> None:
    assert drawn(logprobs(0.5, 0.5), Sampling(seed=3), 50).tolist() == [50, 0]


@pytest.mark.parametrize(
    ("min_p", "kept"), [(0.0, [0, 1, 2]), (0.24, [0, 1, 2]), (0.3, [0, 1]), (1.0, [0])]
)
def test_min_p_keeps_the_tokens_with_a_share_of_the_best_probability(
    min_p: float, kept: list[int]
) -> None:
    candidates = logprobs(0.5, 0.375, 0.125)
    sampling = Sampling(temperature=1.0, seed=5)
    chosen = {draw(candidates, ids(candidates), i, sampling, min_p) for i in range(300)}
    assert sorted(chosen) == kept


def test_min_p_reads_the_probabilities_after_the_temperature() -> None:
    candidates = logprobs(0.8, 0.2)
    for temperature, num_kept in ((1.0, 1), (2.0, 2)):  # the share of the second is 0.25, then 0.5
        sampling = Sampling(temperature=temperature)
        chosen = {draw(candidates, ids(candidates), i, sampling, 0.4) for i in range(300)}
        assert len(chosen) == num_kept


def test_the_same_seed_and_position_give_the_same_draw() -> None:
    candidates = logprobs(*[0.05] * 20)
    sampling = Sampling(temperature=1.0, seed=7)
    first = [draw(candidates, ids(candidates), position, sampling) for position in range(50)]
    assert [
        draw(candidates, ids(candidates), position, sampling) for position in range(50)
    ] == first


def test_another_seed_gives_other_draws() -> None:
    candidates = logprobs(*[0.05] * 20)
    one, other = (
        [
            draw(candidates, ids(candidates), p, Sampling(temperature=1.0, seed=seed))
            for p in range(50)
        ]
        for seed in (1, 2)
    )
    assert one != other


def test_another_position_gives_other_draws() -> None:
    assert np.count_nonzero(drawn(logprobs(*[0.05] * 20), Sampling(temperature=1.0), 500)) == 20


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_candidates_come_as_often_as_their_tempered_probabilities_say(temperature: float) -> None:
    candidates = logprobs(0.5, 0.25, 0.15, 0.1)
    weights = np.array([0.5, 0.25, 0.15, 0.1]) ** (1 / temperature)
    expected = 2000 * weights / weights.sum()
    chi_square = (
        ((drawn(candidates, Sampling(temperature=temperature, seed=11)) - expected) ** 2) / expected
    ).sum()
    assert chi_square < 16.27  # 99.9% point for 3 degrees of freedom


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(temperature=1.0, top_k=1), 1),
        (Sampling(temperature=1.0, top_k=2), 2),
        (Sampling(temperature=1.0, top_k=1000), 4),
        (Sampling(temperature=1.0, top_p=0.3), 1),
        (Sampling(temperature=1.0, top_p=0.6), 2),
        (Sampling(temperature=1.0, top_p=0.8), 3),
        (Sampling(temperature=1.0, top_p=1.0), 4),
        (Sampling(temperature=1.0, top_p=0.99, top_k=3), 3),
    ],
)
def test_top_k_and_top_p_leave_only_the_best(sampling: Sampling, possible: int) -> None:
    assert np.count_nonzero(drawn(logprobs(0.5, 0.25, 0.15, 0.1), sampling)) == possible


def test_top_p_cuts_what_top_k_left_over() -> None:
    """The first of 0.5 and 0.25 makes up two thirds, which is already more than 0.6."""
    counts = drawn(logprobs(0.5, 0.25, 0.15, 0.1), Sampling(temperature=1.0, top_k=2, top_p=0.6))
    assert np.count_nonzero(counts) == 1


def test_one_candidate_is_always_drawn() -> None:
    assert draw(logprobs(1.0), np.array([7]), 0, Sampling(temperature=1.0)) == 0


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-7])
def test_a_temperature_next_to_zero_is_as_good_as_greedy(temperature: float) -> None:
    assert draw(logprobs(0.5, 0.3, 0.2), np.arange(3), 5, Sampling(temperature=temperature)) == 0


def test_the_largest_seed_and_position_can_be_drawn() -> None:
    assert draw(
        logprobs(0.5, 0.5),
        np.arange(2),
        (1 << 20) - 1,
        Sampling(temperature=1.0, seed=(1 << 63) - 1),
    ) in (
        0,
        1,
    )


def test_noise_has_the_moments_of_gumbels_distribution() -> None:
    noise = np.concatenate(
        [gumbel(seed, position, np.arange(64)) for seed in range(20) for position in range(20)]
    )
    assert noise.mean() == pytest.approx(0.5772, abs=0.03)
    assert noise.var() == pytest.approx(np.pi**2 / 6, rel=0.03)


@pytest.mark.parametrize(
    ("one", "other"), [((1, 5), (1, 6)), ((1, 5), (2, 5)), ((1, 5), (5, 1)), ((0, 0), (0, 1))]
)
def test_noise_of_another_seed_or_position_has_nothing_to_do_with_it(
    one: tuple[int, int], other: tuple[int, int]
) -> None:
    tokens = np.arange(10_000)
    correlation = np.corrcoef(gumbel(*one, tokens), gumbel(*other, tokens))[0, 1]
    assert abs(correlation) < 0.04  # four standard deviations


def test_noise_belongs_to_the_token_wherever_it_stands_among_the_candidates() -> None:
    tokens = np.array([5, 9, 49_151])
    np.testing.assert_array_equal(gumbel(3, 4, tokens)[::-1], gumbel(3, 4, tokens[::-1]))


def test_noise_is_the_same_on_every_machine() -> None:
    """Computed once and written down: a device and a worker of other makes have to agree."""
    expected = [2.256828494283607, 1.1092902635532502, -0.9115597107309736]
    np.testing.assert_allclose(gumbel(1, 2, np.array([0, 1, 49_151])), expected, rtol=1e-12)


def test_noise_is_finite_for_every_hash() -> None:
    """The token whose hash is all ones or all zeros, by undoing the hash."""
    state = splitmix64(splitmix64(3) ^ 4)
    tokens = np.array([unmix(bits) ^ state for bits in (0, (1 << 64) - 1)], np.uint64).view(
        np.int64
    )
    noise = gumbel(3, 4, tokens)
    assert np.isfinite(noise).all()
    assert noise[0] < -3.6
    assert noise[1] > 36


def splitmix64(value: int) -> int:
    """The first output of the public reference (https://prng.di.unimi.it/splitmix64.c) for a state
    of `value`.
    """
    value = (value + 0x9E3779B97F4A7C15) % (1 << 64)
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    value = (value ^ value >> 27) * 0x94D049BB133111EB % (1 << 64)
    return value ^ value >> 31


def unmix(bits: int) -> int:
    """The state whose first output is `bits`."""
    value = bits ^ bits >> 31 ^ bits >> 62
    value = value * pow(0x94D049BB133111EB, -1, 1 << 64) % (1 << 64)
    value ^= value >> 27 ^ value >> 54
    value = value * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) % (1 << 64)
    value ^= value >> 30 ^ value >> 60
    return (value - 0x9E3779B97F4A7C15) % (1 << 64)


def test_the_hash_is_splitmix64() -> None:
    """Published outputs for the seeds 0 and 1234567."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(1234567) == 6457827717110365317
    assert unmix(splitmix64(987654321)) == 987654321
    uniform = ((splitmix64(splitmix64(splitmix64(3) ^ 4) ^ 5) >> 12) + 0.5) / 2**52
    assert gumbel(3, 4, np.array([5]))[0] == pytest.approx(-math.log(-math.log(uniform)), rel=1e-12)


def neighbours_table(pairs: list[tuple[tuple[int, int], tuple[int, int]]]) -> float:
    """Chi-square of drawing twice from 0.4, 0.3, 0.2, 0.1, against independent draws; 15 degrees of
    freedom.
    """
    probabilities = np.array([0.4, 0.3, 0.2, 0.1])
    candidates = np.log(probabilities).astype(np.float32)
    counts = np.zeros((4, 4))
    for pair in pairs:
        one, other = (
            draw(candidates, ids(candidates), position, Sampling(temperature=1.0, seed=seed))
            for seed, position in pair
        )
        counts[one, other] += 1
    expected = len(pairs) * np.outer(probabilities, probabilities)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    ("seed_step", "position_step"),
    [(0, 1), (1, 0), (1, 1)],
    ids=["next position", "next seed", "both"],
)
def test_neighbouring_draws_are_independent(seed_step: int, position_step: int) -> None:
    pairs = [((2 * i, 100), (2 * i + seed_step, 100 + position_step)) for i in range(4000)]
    assert neighbours_table(pairs) < 37.70  # 99.9% point


def test_many_seeds_at_one_position_give_the_distribution() -> None:
    probabilities = np.array([0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.04, 0.01])
    candidates = np.log(probabilities).astype(np.float32)
    chosen = [
        draw(candidates, ids(candidates), 17, Sampling(temperature=1.0, seed=seed))
        for seed in range(8000)
    ]
    expected = 8000 * probabilities
    assert (
        ((np.bincount(chosen, minlength=8) - expected) ** 2) / expected
    ).sum() < 24.32  # 99.9% point, 7 degrees


def test_two_that_draw_from_similar_distributions_mostly_draw_the_same() -> None:
    """At least (1 - d) / (1 + d) of the time at a total variation distance of d (arXiv
    2408.07978).
    """
    random = np.random.default_rng(5)
    hot = Sampling(temperature=1.0, seed=3)
    for _ in range(10):
        p = random.dirichlet(np.ones(20))
        q = 0.7 * p + 0.3 * random.dirichlet(np.ones(20))
        same = 0
        for position in range(2000):
            chosen = []
            for distribution in (p, q):
                order = np.argsort(-distribution)
                logs = np.log(distribution[order]).astype(np.float32)
                chosen.append(order[draw(logs, order, position, hot)])
            same += chosen[0] == chosen[1]
        distance = np.abs(p - q).sum() / 2
        assert same / 2000 > (1 - distance) / (1 + distance) - 0.03
        assert same / 2000 < 1 - distance + 0.03
