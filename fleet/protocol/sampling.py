"""The draw of a token from the best log-probabilities, the same on the device and on the worker."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from fleet.protocol.messages import Sampling

MIN_TEMPERATURE: Final = (
    1e-6  # below it the division could overflow; the draw is greedy before that
)


def draw(
    logprobs: npt.NDArray[np.float32],
    token_ids: npt.NDArray[np.int64],
    position: int,
    sampling: Sampling,
    min_p: float = 0.0,
) -> int:
    """Return the index of the chosen candidate.

    Args:
        logprobs: [k] float32, log-probabilities of the candidates up to a constant, best first.
        token_ids: [k] int64, the candidates.
        position: position that the token will follow. Seed, position and token determine the noise,
            so that a second draw gives the same token, and a draw from a similar distribution
            mostly the same one (Gumbel-max; its use as a coupling: arXiv 2408.07978).
        sampling: temperature 0 is greedy. Otherwise top-k and nucleus (arXiv 1904.09751) cut, both
            after the temperature, among the k candidates.
        min_p: smallest probability to keep, as a share of the best one's, after these cuts.
    """
    if sampling.temperature == 0.0:
        return 0
    kept_logprobs = logprobs[: sampling.top_k or None].astype(np.float64)
    scaled = (kept_logprobs - kept_logprobs.max()) / max(sampling.temperature, MIN_TEMPERATURE)
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    kept = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
    kept = min(kept, int((probabilities >= min_p * probabilities[0]).sum()))
    scaled = scaled[:kept]
    noise = gumbel(sampling.seed, position, token_ids[: len(scaled)])
    return int(np.argmax(scaled + noise))


def gumbel(seed: int, position: int, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return standard Gumbel noise [k] float64, the same for a seed, position and token on every
    machine.
    """
    with np.errstate(over="ignore"):
        state = _mix(_mix(np.uint64(seed)) ^ np.uint64(position))
        bits = _mix(state ^ token_ids.astype(np.uint64))
    # 52 bits and a half: exact, never 0 or 2**52.
    uniform = (bits >> np.uint64(12)).astype(np.float64) + 0.5
    return np.asarray(-np.log(-np.log(uniform * 2.0**-52)))


def _mix(value: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64] | np.uint64:
    """Apply the finaliser of splitmix64 (Steele, Lea and Flood, doi:10.1145/2660193.2660195)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
