"""Drawing a token."""

import numpy as np
import numpy.typing as npt
import pytest

from fleet.messages import Sampling
from fleet.sampling import draw

Float32 = npt.NDArray[np.float32]


def logprobs(*probabilities: float) -> Float32:
    return np.log(np.array(probabilities, dtype=np.float32))


def drawn(candidates: Float32, sampling: Sampling, num_positions: int = 2000) -> npt.NDArray[np.int64]:
    """How often each candidate was drawn over many positions."""
    chosen = [draw(candidates, position, sampling) for position in range(num_positions)]
    return np.bincount(chosen, minlength=len(candidates))


def test_temperature_zero_takes_the_best_whatever_the_seed() -> None:
    assert drawn(logprobs(0.5, 0.5), Sampling(seed=3), 50).tolist() == [50, 0]


def test_the_same_seed_and_position_give_the_same_draw() -> None:
    candidates = logprobs(*[0.05] * 20)
    sampling = Sampling(temperature=1.0, seed=7)
    first = [draw(candidates, position, sampling) for position in range(50)]
    assert [draw(candidates, position, sampling) for position in range(50)] == first


def test_another_seed_gives_other_draws() -> None:
    candidates = logprobs(*[0.05] * 20)
    one, other = ([draw(candidates, p, Sampling(temperature=1.0, seed=seed)) for p in range(50)] for seed in (1, 2))
    assert one != other


def test_another_position_gives_other_draws() -> None:
    assert np.count_nonzero(drawn(logprobs(*[0.05] * 20), Sampling(temperature=1.0), 500)) == 20


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_candidates_come_as_often_as_their_tempered_probabilities_say(temperature: float) -> None:
    candidates = logprobs(0.5, 0.25, 0.15, 0.1)
    weights = np.array([0.5, 0.25, 0.15, 0.1]) ** (1 / temperature)
    expected = 2000 * weights / weights.sum()
    chi_square = (((drawn(candidates, Sampling(temperature=temperature, seed=11)) - expected) ** 2) / expected).sum()
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
    """Of 0.5 and 0.25 the first makes up two thirds, which is already more than 0.6."""
    counts = drawn(logprobs(0.5, 0.25, 0.15, 0.1), Sampling(temperature=1.0, top_k=2, top_p=0.6))
    assert np.count_nonzero(counts) == 1


def test_one_candidate_is_always_drawn() -> None:
    assert draw(logprobs(1.0), 0, Sampling(temperature=1.0)) == 0


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-7])
def test_a_temperature_next_to_zero_is_as_good_as_greedy(temperature: float) -> None:
    assert draw(logprobs(0.5, 0.3, 0.2), 5, Sampling(temperature=temperature)) == 0


def test_the_largest_seed_and_position_can_be_drawn() -> None:
    assert draw(logprobs(0.5, 0.5), (1 << 20) - 1, Sampling(temperature=1.0, seed=(1 << 63) - 1)) in (0, 1)
