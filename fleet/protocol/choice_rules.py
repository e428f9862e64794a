"""The place where logits change before a token is chosen, the same on the device and the worker.

A side has the best tokens of a position, and computes the logit of another token if a rule asks for
it. The candidates of a choice are the tokens whose changed logit reaches the lowest unchanged logit
of the best tokens. A token that no rule raises reaches it only if it is one of the best. If no
token reaches it, the candidates are the best of the whole vocabulary. So both sides have the same
candidates, and rarely change the logits of the whole vocabulary (ADR 0045).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fleet.protocol.messages import ChoiceRules, TopTokens

Float32: TypeAlias = npt.NDArray[np.float32]
Int64: TypeAlias = npt.NDArray[np.int64]
Bool: TypeAlias = npt.NDArray[np.bool_]
Numbers: TypeAlias = npt.NDArray[Any]
LogitsOf: TypeAlias = Callable[[Int64 | None], Float32]
"""Return the logits [n] float32 of the tokens [n] int64; of the whole vocabulary for None."""

MAX_GATHERED: Final = 4096
"""Tokens whose logits are computed alone; for more, the whole vocabulary takes less time."""
MAX_EXPONENT: Final = 700.0


class RankedTokens(NamedTuple):
    """The candidates of a choice, best first: [n] each.

    `scores` are what the draw reads, up to a constant. `logprobs` are those of the model at
    temperature 1, before the rules. `confidence` is the probability of the best after the rules.
    """

    token_ids: Int64
    scores: Float32
    logprobs: Float32
    confidence: float


def top_tokens(token_ids: Int64, logprobs: Float32, count: int) -> TopTokens:
    """Return the first `count` of the best tokens [k], with their log-probabilities [k]."""
    return tuple(zip(token_ids[:count].tolist(), logprobs[:count].tolist(), strict=True))


def rank_tokens(
    token_ids: Int64,
    logprobs: Float32,
    rules: ChoiceRules,
    text: Sequence[int],
    logits_of: LogitsOf,
    allowed: Bool | None = None,
) -> RankedTokens:
    """Return the candidates after the tokens `text`, at most k.

    Args:
        token_ids: [k] int64, the best tokens of the model.
        logprobs: [k] float32, their log-probabilities, best first.
        rules: the rules.
        text: the tokens of the prompt and of the response so far.
        logits_of: the model's logits after `text`.
        allowed: [vocab] bool, the tokens that may follow; None: all. If they are at most k, they
            are the candidates.
    """
    num_best = len(token_ids)
    normalizer = logits_of(token_ids[:1])[0] - logprobs[0]
    ids = token_ids
    logits = logprobs + normalizer
    if raised := raised_ids(rules, text):
        others = np.setdiff1d(np.array(raised, np.int64), token_ids)
        ids = np.concatenate((ids, others))
        logits = np.concatenate((logits, logits_of(others)))
    scores = adjust_logits(ids, logits, rules, text)
    if allowed is not None:
        scores[~allowed[ids]] = -np.inf
    candidates = np.flatnonzero(scores >= logits[num_best - 1])
    outside = max(0.0, 1.0 - float(np.exp(logits - normalizer).sum()))
    is_few = allowed is not None and np.count_nonzero(allowed) <= num_best
    if is_few or not len(candidates):
        ids, logits = _every_logit(logits_of, allowed)
        scores = adjust_logits(ids, logits, rules, text)
        candidates = np.arange(len(ids))
        outside = 0.0
    best = candidates[np.argsort(-scores[candidates], kind="stable")[:num_best]]
    confidence = _confidence(scores - normalizer, outside)
    return RankedTokens(ids[best], scores[best], logits[best] - normalizer, confidence)


def _every_logit(logits_of: LogitsOf, allowed: Bool | None) -> tuple[Int64, Float32]:
    """Return all tokens that may follow [n], and their logits [n]."""
    if allowed is not None and np.count_nonzero(allowed) <= MAX_GATHERED:
        ids = np.flatnonzero(allowed)
        return ids, logits_of(ids)
    logits = logits_of(None)
    ids = np.arange(len(logits)) if allowed is None else np.flatnonzero(allowed)
    return ids, logits[ids]


def _confidence(scores: Float32, outside: float) -> float:
    """Return the largest probability of tokens with these log-scores, next to a mass `outside`."""
    highest = float(scores.max())
    shifted = np.exp(scores.astype(np.float64) - highest)
    return float(1.0 / (shifted.sum() + outside * np.exp(min(-highest, MAX_EXPONENT))))


def raised_ids(rules: ChoiceRules, text: Sequence[int]) -> list[int]:
    """Return the tokens whose logits a rule may raise."""
    raised = [token_id for token_id, bias in rules.logit_bias if bias > 0]
    if rules.repetition_penalty < 1.0:
        raised += text
    if min(rules.presence_penalty, rules.frequency_penalty) < 0.0:
        raised += text[rules.prompt_length :]
    return raised


def adjust_logits(
    token_ids: Int64, logits: Float32, rules: ChoiceRules, text: Sequence[int]
) -> Float32:
    """Return the logits [n] float32 of the tokens [n] after the rules.

    First the repetition penalty (arXiv 1909.05858) over all tokens of `text`, then the penalties
    for the tokens of the response, then the bias.
    """
    adjusted: Numbers = logits
    if rules.repetition_penalty != 1.0:
        penalty = rules.repetition_penalty
        penalized = np.where(logits > 0, logits / penalty, logits * penalty)
        adjusted = np.where(np.isin(token_ids, text), penalized, logits)
    if rules.presence_penalty or rules.frequency_penalty:
        seen, counts = np.unique(
            np.array(text[rules.prompt_length :], np.int64), return_counts=True
        )
        penalties = rules.presence_penalty + rules.frequency_penalty * counts
        adjusted = adjusted - _values_of(token_ids, seen, penalties)
    if rules.logit_bias:
        biases = np.array(sorted(rules.logit_bias))
        adjusted = adjusted + _values_of(token_ids, biases[:, 0], biases[:, 1])
    return adjusted.astype(np.float32)


def _values_of(token_ids: Int64, keys: Numbers, values: Numbers) -> Numbers:
    """Return the values of the tokens [n] by their `keys`, in ascending order; else 0."""
    if not len(keys):
        return np.zeros(len(token_ids))
    places = np.minimum(np.searchsorted(keys, token_ids), len(keys) - 1)
    return np.where(keys[places] == token_ids, values[places], 0.0)
