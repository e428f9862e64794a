"""Drawing a token from the best log-probabilities, the same way on the device and on the worker."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from fleet.messages import Sampling

MIN_TEMPERATURE: Final = 1e-6  # below it the division could overflow; the draw is greedy long before


def draw(logprobs: npt.NDArray[np.float32], position: int, sampling: Sampling) -> int:
    """Index of the chosen candidate.

    Args:
        logprobs: [k] float32, log-probabilities of the candidates, best first.
        position: where the token will follow; together with the seed it fixes the draw, so that asking twice
            gives the same token.
        sampling: temperature 0 is greedy. Otherwise top-k and nucleus (arXiv 1904.09751) cut, both after the
            temperature, among the k candidates given.
    """
    if sampling.temperature == 0.0:
        return 0
    kept_logprobs = logprobs[: sampling.top_k or None].astype(np.float64)
    below_best = kept_logprobs - kept_logprobs.max()
    probabilities = np.exp(below_best / max(sampling.temperature, MIN_TEMPERATURE))
    probabilities /= probabilities.sum()
    kept = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
    probabilities = probabilities[:kept] / probabilities[:kept].sum()
    return int(np.random.default_rng([sampling.seed, position]).choice(len(probabilities), p=probabilities))
