"""Metrics against values computed by hand."""

from __future__ import annotations

from math import exp

import numpy as np
import pytest

from benchmarks.paper.scores import auc, interval, majority, mean, perplexity, rouge, word_f1


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("The cat.", ["a CAT"], 1.0),
        ("the black cat", ["cat"], 2 / 3),
        ("dog", ["cat", "a dog"], 1.0),
        ("a red red car", ["red car red"], 1.0),
        ("red red", ["red"], 2 / 3),
        ("dog", ["cat"], 0.0),
        ("", ["cat"], 0.0),
        ("", ["the"], 1.0),
    ],
)
def test_word_f1_is_that_of_squad(answer: str, references: list[str], expected: float) -> None:
    assert word_f1(answer, references) == pytest.approx(expected)


def test_rouge_counts_words_pairs_and_common_subsequences() -> None:
    # 3 of 4 and 3 of 3 words; pairs (the cat), (cat sat) of 3 and 2; the longest common
    # subsequence has 3 words.
    assert rouge("the cat sat down", "the cat sat") == pytest.approx((6 / 7, 4 / 5, 6 / 7))
    assert rouge("sat cat the", "the cat sat") == pytest.approx((1.0, 0.0, 1 / 3))
    assert rouge("it rained", "they are raining") == pytest.approx(
        (2 / 5, 0.0, 2 / 5)
    )  # by the stem
    assert rouge("", "the cat sat") == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("preferences", "labels", "expected"),
    [
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.75),
        ([-3.0, -2.0, -1.0], [0, 0, 1], 1.0),
        ([1.0, 1.0], [0, 1], 0.5),
        ([1.0, 2.0], [1, 1], None),
    ],
)
def test_the_auc_asks_only_for_the_order(
    preferences: list[float], labels: list[int], expected: float | None
) -> None:
    assert auc(preferences, labels) == expected


def test_the_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    random = np.random.default_rng(0)
    for num in (2, 10, 100):
        preferences = random.integers(8, size=num).tolist()
        labels = random.permutation([0, 1] * (num // 2)).tolist()
        ones, zeros = (
            [p for p, label in zip(preferences, labels, strict=True) if label == k] for k in (1, 0)
        )
        pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in ones for b in zeros]
        assert auc(preferences, labels) == pytest.approx(sum(pairs) / len(pairs))


def test_the_majority_is_the_more_common_label() -> None:
    assert majority([1, 0, 0, 0]) == 0.75
    assert majority([1, 1, 0]) == pytest.approx(2 / 3)


def test_perplexity_weighs_answers_by_their_tokens() -> None:
    assert perplexity([1.0, 2.0], [3, 1]) == pytest.approx(exp(5 / 4))


def test_an_interval_of_equal_values_is_a_point() -> None:
    assert interval(5, lambda chosen: mean([2.0 for _ in chosen])) == (2.0, 2.0)


def test_an_interval_is_that_of_the_binomial_distribution() -> None:
    values = [1.0] * 50 + [0.0] * 50
    low, high = interval(100, lambda chosen: mean([values[i] for i in chosen]), seed=1)
    assert low == pytest.approx(0.402, abs=0.015)
    assert high == pytest.approx(0.598, abs=0.015)
    assert (low, high) == interval(100, lambda chosen: mean([values[i] for i in chosen]), seed=1)


def test_resamples_without_a_value_do_not_count() -> None:
    preferences = [0.0, 1.0, 2.0]  # a resample may lack either label
    labels = [0, 1, 1]
    area = interval(
        3, lambda chosen: auc([preferences[i] for i in chosen], [labels[i] for i in chosen])
    )
    assert area == (1.0, 1.0)
