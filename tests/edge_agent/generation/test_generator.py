"""Exit decisions of a device that is alone."""

from __future__ import annotations

import gc
import weakref

import pytest

from edge_agent.generation.decoder import Decoder, GeneratedToken
from edge_agent.generation.generator import Generator
from edge_agent.generation.mode_controller import ModeController
from edge_agent.generation.mode_policy import Targets
from edge_agent.measurements import Measurements
from fleet.bundles.manifest import Bundle
from fleet.errors import DeadlineError
from fleet.graphs.cascade import MAX_CHUNK
from fleet.graphs.partition import Partition
from fleet.protocol.messages import Sampling
from fleet.protocol.modes import Mode

PROMPT = [5, 9, 300, 17, 42]
EOS = (2,)


@pytest.fixture(scope="module")
def partition(tiny_bundle: Bundle) -> Partition:
    return Partition(tiny_bundle, num_threads=1)


def generate(
    partition: Partition,
    thresholds: tuple[float, ...],
    sampling: Sampling | None = None,
    *,
    ask_cloud: bool = False,
) -> tuple[list[GeneratedToken], Decoder]:
    mode = Mode.COLLABORATIVE if ask_cloud else Mode.STANDALONE
    decoder = Decoder(partition, 64, thresholds, sampling or Sampling())
    generator = Generator(decoder, ModeController(mode, Targets(), Measurements(), 100), EOS)
    return list(generator.generate(PROMPT, 12)), decoder


def test_an_answers_caches_are_freed_without_the_garbage_collector(partition: Partition) -> None:
    gc.disable()
    try:
        _, decoder = generate(partition, (1.0, 0.0))
        cascade = weakref.ref(decoder.cascade)
        del decoder
        assert cascade() is None
    finally:
        gc.enable()


def test_threshold_zero_emits_at_the_first_exit_and_runs_nothing_deeper(
    partition: Partition,
) -> None:
    tokens, decoder = generate(partition, (0.0, 0.0))
    assert {token.source for token in tokens} == {"exit:1"}
    assert decoder.cascade.num_filled(1) == 0


def test_threshold_one_switches_an_exit_off(partition: Partition) -> None:
    tokens, _ = generate(partition, (1.0, 0.0))
    assert {token.source for token in tokens} == {"exit:2"}


def test_alone_the_deepest_exit_always_emits(partition: Partition) -> None:
    tokens, _ = generate(partition, (1.0, 1.0))
    assert {token.source for token in tokens} == {"exit:2"}


def test_without_the_cloud_that_was_wanted_it_is_a_fallback(partition: Partition) -> None:
    tokens, _ = generate(partition, (1.0, 1.0), ask_cloud=True)
    assert {token.source for token in tokens} == {"fallback"}


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(partition: Partition) -> None:
    hot = [
        [
            t.token_id
            for t in generate(partition, (0.0, 0.0), Sampling(temperature=1.5, seed=seed))[0]
        ]
        for seed in (1, 1, 2)
    ]
    assert hot[0] == hot[1] != hot[2]


def test_the_backlog_is_run_before_a_deeper_exit_speaks(partition: Partition) -> None:
    tokens, decoder = generate(partition, (0.0, 0.0))
    assert decoder.cascade.num_filled(1) == 0
    decoder.cascade.run(1)
    assert (
        decoder.cascade.num_filled(1)
        == decoder.cascade.num_filled(0)
        == len(PROMPT) + len(tokens) - 1
    )


def test_what_is_cut_off_is_as_if_it_had_never_been(partition: Partition) -> None:
    expected = Decoder(partition, 64, (1.0, 1.0), Sampling())
    expected.text += [*PROMPT, 7]
    decoder = Decoder(partition, 64, (1.0, 1.0), Sampling())
    decoder.text += [*PROMPT, 8, 9]
    decoder.choose()
    decoder.truncate(len(PROMPT))
    decoder.text.append(7)
    choice = decoder.choose()
    wanted = expected.choose()
    assert choice.token_id == wanted.token_id
    assert choice.logprob == pytest.approx(wanted.logprob, abs=1e-4)


def test_a_cut_text_is_asked_for_its_own_next_token(partition: Partition) -> None:
    expected = Decoder(partition, 64, (1.0, 1.0), Sampling())
    expected.text += PROMPT
    decoder = Decoder(partition, 64, (1.0, 1.0), Sampling())
    decoder.text += PROMPT
    decoder.choose()
    decoder.text += [8, 9]
    decoder.choose()
    decoder.truncate(len(PROMPT))
    choice = decoder.choose()
    wanted = expected.choose()
    assert choice.token_id == wanted.token_id
    assert choice.logprob == pytest.approx(wanted.logprob, abs=1e-4)


def test_an_answer_that_is_late_ends_with_an_error(partition: Partition) -> None:
    decoder = Decoder(partition, 64, (1.0, 1.0), Sampling())
    generator = Generator(
        decoder, ModeController(Mode.STANDALONE, Targets(), Measurements(), 100), EOS
    )
    with pytest.raises(DeadlineError, match="deadline passed after 0 tokens; allow more time"):
        list(generator.generate(PROMPT, 12, deadline=float("-inf")))


def test_a_long_prompt_is_given_up_between_two_chunks(partition: Partition) -> None:
    decoder = Decoder(partition, 4 * MAX_CHUNK, (1.0, 1.0), Sampling())
    generator = Generator(
        decoder, ModeController(Mode.STANDALONE, Targets(), Measurements(), 100), EOS
    )
    prompt = [i % 300 for i in range(3 * MAX_CHUNK)]
    is_cancelled = lambda: decoder.cascade.num_filled(0) >= MAX_CHUNK  # noqa: E731
    assert list(generator.generate(prompt, 12, is_cancelled=is_cancelled)) == []
    assert (decoder.cascade.num_filled(0), decoder.cascade.num_filled(1)) == (MAX_CHUNK, 0)


def test_a_deadline_that_passes_in_a_long_prompt_ends_it(
    partition: Partition, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(partition, 4 * MAX_CHUNK, (1.0, 1.0), Sampling())
    generator = Generator(
        decoder, ModeController(Mode.STANDALONE, Targets(), Measurements(), 100), EOS
    )
    monkeypatch.setattr(
        "edge_agent.generation.generator.time.monotonic",
        lambda: float(decoder.cascade.num_filled(0)),
    )
    with pytest.raises(DeadlineError, match="after 0 tokens"):
        list(generator.generate([7] * 3 * MAX_CHUNK, 12, deadline=2.0 * MAX_CHUNK))
    assert decoder.cascade.num_filled(0) == 2 * MAX_CHUNK


def test_a_cancelled_answer_ends(partition: Partition) -> None:
    decoder = Decoder(partition, 64, (1.0, 1.0), Sampling())
    generator = Generator(
        decoder, ModeController(Mode.STANDALONE, Targets(), Measurements(), 100), EOS
    )
    assert list(generator.generate(PROMPT, 12, is_cancelled=lambda: True)) == []
