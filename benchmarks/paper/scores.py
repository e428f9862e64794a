"""Metrics of one answer, of many, and their confidence intervals. Pure functions."""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from math import exp, fsum
from typing import Any, Final, NamedTuple

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

NUM_RESAMPLES: Final = 2000
LEVEL: Final = 0.95

Statistic = Callable[[Sequence[int]], float | None]
"""A statistic of the samples with these numbers; one may occur more than once."""


class Rouge(NamedTuple):
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), with Porter's stemmer as usual for XSum."""

    rouge1: float
    rouge2: float
    rouge_l: float


def word_f1(answer: str, references: Sequence[str]) -> float:
    """Return the F1 of the words that answer and reference share, best of the references.

    As in SQuAD (arXiv 1606.05250) and QuAC (arXiv 1808.07036).
    """
    return max(_f1(_words(answer), _words(reference)) for reference in references)


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    shared = (Counter(answer) & Counter(reference)).total()
    return 2 * shared / (len(answer) + len(reference))


def _words(text: str) -> list[str]:
    """Return the words in lower case, without punctuation and articles, as SQuAD's own program."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def rouge(answer: str, reference: str) -> Rouge:
    """Return the overlap of a summary and its reference."""
    scores = _rouge_scorer().score(reference, answer)
    return Rouge(*(scores[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")))


@cache
def _rouge_scorer() -> Any:
    logging.getLogger("absl").setLevel(logging.WARNING)  # it logs its tokenizer
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def mean(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return fsum(values) / len(values)


def majority(labels: Sequence[int]) -> float:
    """Return the accuracy of always giving the label, 0 or 1, that is more common."""
    share = mean(labels)
    return max(share, 1 - share)


def auc(preferences: Sequence[float], labels: Sequence[int]) -> float | None:
    """Return the probability that a sample of label 1 has a higher preference than one of label 0.

    None without both labels. Unlike accuracy it does not depend on the threshold between yes and
    no. A tie counts half, as in Mann and Whitney's U. (scikit-learn has it, too; where that is
    installed, every process that imports transformers loads it and starts 1.5 s later.)
    """
    values = np.asarray(preferences)
    is_first = np.asarray(labels) == 1
    first = values[is_first][:, None]
    second = values[~is_first]
    if not first.size or not second.size:
        return None
    return float((first > second).mean() + (first == second).mean() / 2)


def perplexity(nlls: Sequence[float], num_tokens: Sequence[int]) -> float:
    """Return the perplexity of all answers' tokens together.

    `nlls` are mean negative log-likelihoods of the answers of `num_tokens`.
    """
    return exp(fsum(nll * n for nll, n in zip(nlls, num_tokens, strict=True)) / sum(num_tokens))


def interval(num: int, statistic: Statistic, seed: int = 0) -> tuple[float, float]:
    """Return the bootstrap interval of `LEVEL` by percentiles.

    It is that of a statistic of `num` samples, given indices into them. Resamples with the
    statistic None do not count.
    """
    draws = np.random.default_rng(seed).integers(num, size=(NUM_RESAMPLES, num))
    values = [value for draw in draws.tolist() if (value := statistic(draw)) is not None]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
