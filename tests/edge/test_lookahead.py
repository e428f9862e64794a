"""Steps behind a guess while the cloud is asked: what they spare, and that they change nothing."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from edge_agent.acceptance import Acceptance
from edge_agent.decoder import Choice, Decoder
from edge_agent.drafting import worth_guessing
from edge_agent.lookahead import Lookahead
from edge_agent.measurements import Measurements
from edge_agent.partition import Float32, Partition
from edge_agent.turns import Turns
from edge_agent.uplink import Uplink
from fleet.manifest import Bundle
from fleet.messages import Sampling

PROMPT = [5, 9, 300, 17, 42]
EOS = (2,)
ALWAYS_SURE, NEVER_SURE = (0.0, 0.0), (1.0, 1.0)


@pytest.fixture(scope="module")
def partition(tiny_bundle: Bundle) -> Partition:
    return Partition(tiny_bundle, num_threads=1)


class Offers:
    """In an uplink's place: what it was offered."""

    def __init__(self) -> None:
        self.rows: list[Float32] = []

    def offer(self, hidden_states: Float32) -> None:
        self.rows += [row.copy() for row in hidden_states]


def decoder_of(
    partition: Partition, thresholds: tuple[float, ...] = NEVER_SURE, *, capacity: int = 64, turns: Turns | None = None
) -> tuple[Decoder, Offers]:
    offers = Offers()
    decoder = Decoder(partition, capacity, thresholds, Sampling(), cast(Uplink, offers), turns)
    decoder.text += PROMPT
    return decoder, offers


def lookahead_of(decoder: Decoder, eos: tuple[int, ...] = ()) -> Lookahead:
    return Lookahead(decoder, Acceptance(), Measurements(), eos)


def walk(decoder: Decoder, token_ids: list[int]) -> list[Choice]:
    """The choice after the prompt, and after each of these tokens."""
    choices = [decoder.choose()]
    for token_id in token_ids:
        decoder.text.append(token_id)
        choices.append(decoder.choose())
    return choices


CASES = {
    "right": ([7], [7]), "wrong": ([7], [8]), "two right": ([7, 11], [7, 11]), "one of two": ([7, 11], [7, 12]),
    "first wrong": ([7, 11], [8, 11]), "fewer than the text": ([7], [7, 11, 12]), "more": ([7, 11, 12], [7, 11]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_guesses_change_neither_the_choices_nor_what_goes_up(partition: Partition, name: str) -> None:
    guesses, text = CASES[name]
    expected, expected_offers = decoder_of(partition)
    wanted = walk(expected, text)
    decoder, offers = decoder_of(partition)
    choices = [decoder.choose()]
    for token_id in guesses:
        decoder.guess(token_id)
    assert len(offers.rows) == len(PROMPT), "of a guess nothing goes up"
    for token_id in text:
        decoder.text.append(token_id)
        choices.append(decoder.choose())
    assert choices == wanted
    np.testing.assert_array_equal(offers.rows, expected_offers.rows)


def test_a_right_guess_has_run_when_its_turn_comes(partition: Partition) -> None:
    decoder, _ = decoder_of(partition)
    decoder.choose()
    decoder.guess(7)
    before = list(partition.work.positions)
    decoder.text.append(7)
    decoder.choose()
    assert partition.work.positions == before


def test_several_tokens_at_once_leave_no_guess_behind(partition: Partition) -> None:
    expected, _ = decoder_of(partition)
    walk(expected, [7, 11])
    expected.text.append(12)
    decoder, _ = decoder_of(partition)
    decoder.choose()
    decoder.guess(7)
    decoder.guess(11)
    decoder.text += [7, 11]
    decoder.upload(len(decoder.text))
    decoder.truncate(len(PROMPT) + 1)
    decoder.text += [11, 12]
    assert decoder.choose().token_id == expected.choose().token_id


@pytest.mark.parametrize(("thresholds", "num_steps"), [(ALWAYS_SURE, 9), (NEVER_SURE, 1)])
def test_it_goes_on_to_the_next_token_that_needs_a_question(
    partition: Partition, thresholds: tuple[float, ...], num_steps: int
) -> None:
    decoder, _ = decoder_of(partition, thresholds)
    choice = decoder.choose()
    unanswered = Lookahead(decoder, always_right(), Measurements(), ()).steps(choice, 10)
    assert sum(1 for _ in unanswered) == num_steps


def always_right() -> Acceptance:
    acceptance = Acceptance()
    for _ in range(2000):
        for confidence in np.linspace(0.0, 1.0, 11):
            acceptance.update(float(confidence), accepted=True)
    return acceptance


def test_it_ends_at_the_end_of_the_text(partition: Partition) -> None:
    decoder, _ = decoder_of(partition, ALWAYS_SURE)
    choice = decoder.choose()
    end = Choice(EOS[0], 0.0, choice.exit_layer, 1.0, is_sure=False)
    assert list(lookahead_of(decoder, EOS).steps(end, 10)) == []
    assert list(lookahead_of(decoder).steps(choice, 1)) == []


def test_an_unlikely_guess_is_not_followed(partition: Partition) -> None:
    decoder, _ = decoder_of(partition, ALWAYS_SURE)
    choice = decoder.choose()
    unlikely = Choice(choice.token_id, choice.logprob, choice.exit_layer, 0.05, is_sure=False)
    assert list(lookahead_of(decoder).steps(unlikely, 10)) == []


def test_no_guess_where_another_sequence_runs_or_no_room_is(partition: Partition) -> None:
    turns = Turns()
    decoder, _ = decoder_of(partition, ALWAYS_SURE, turns=turns)
    with turns:
        while_busy = decoder.can_guess
    assert (while_busy, decoder.can_guess) == (False, True)
    full, _ = decoder_of(partition, capacity=len(PROMPT))
    full.choose()
    assert not full.can_guess


@pytest.mark.parametrize(
    ("chance", "step_ms", "wait_ms", "expected"),
    [
        (0.1, 20, 30, True),  # the wait would be spent anyway
        (0.5, 20, 10, True),
        (0.4, 20, 10, False),  # too often it keeps the device from the right token
        (0.9, 20, 0, False),
        (0.0, 0, 0, True),  # nothing is measured yet
    ],
)
def test_a_step_is_worth_it_when_it_saves_more_than_it_costs(
    chance: float, step_ms: float, wait_ms: float, expected: bool
) -> None:
    assert worth_guessing(chance, step_ms, wait_ms) is expected


def test_the_clouds_tokens_teach_how_often_a_guess_is_right(partition: Partition) -> None:
    decoder, _ = decoder_of(partition)
    acceptance, measurements = Acceptance(), Measurements()
    lookahead = Lookahead(decoder, acceptance, measurements, EOS)
    choice = Choice(7, -0.5, 2, 0.55, is_sure=False)
    for token_id in (7, 7, 8, 7):
        lookahead.judge(choice, token_id)
    assert measurements.snapshot().right == 0.75
    assert acceptance.probability(0.55) > Acceptance().probability(0.55)
