"""The benchmark of conversations: rows of a chat on the tiny model, in process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from benchmarks.chat import (
    ChatBench,
    common_prefix,
    measure_chat,
    num_apps_of,
    print_chat,
    readings,
)
from benchmarks.chat_engines import DeviceResponder, LlamaResponder, read_answer
from benchmarks.plots import plot_chat
from edge_agent.engine.tokenizer import ChatTokenizer
from fleet.bundles.manifest import Bundle
from fleet.errors import FleetError
from fleet.protocol.modes import FALLBACK, Mode
from fleet.protocol.prompt import PromptRequest, Reply, Usage
from fleet.server.local_fleet import DEVICE, LocalFleet
from fleet.utils.console import new_console

QUESTIONS = ("Hello?", "And now?")
NUM_TEMPLATES = 3


@pytest.fixture(scope="module")
def result(tiny_bundle: Bundle) -> dict[str, Any]:
    """The figures of two turns and of three prompts of a template."""
    tokenizer = ChatTokenizer(tiny_bundle)
    options = {"max_new_tokens": 4, "mode": Mode.VERIFIED}
    with LocalFleet(tiny_bundle) as fleet:
        names = (f"new-{number}" for number in itertools.count())
        responder = DeviceResponder(lambda: fleet.connect(next(names)), DEVICE)
        with responder:
            figures = measure_chat(
                {"ours": responder},
                lambda each: ChatBench(each, tokenizer, options),
                QUESTIONS,
                num_rounds=2,
                num_templates=NUM_TEMPLATES,
                progress=lambda _: None,
            )
        used = int(next(names).removeprefix("new-"))
    assert used == num_apps_of(len(QUESTIONS), 2, NUM_TEMPLATES)
    return {"mode": Mode.VERIFIED.value, **figures["ours"], "peers": {}}


def test_each_turn_has_a_row_and_the_same_prompt_without_reuse(result: dict[str, Any]) -> None:
    assert [row["turn"] for row in result["turns"]] == [1, 2]
    for row, fresh in zip(result["turns"], result["fresh"], strict=True):
        assert row["prompt_tokens"] == fresh["prompt_tokens"]
        assert row["bytes_up"] > 0
        assert row["ttft_ms"] > 0
        assert fresh["new_positions"] == fresh["prompt_tokens"] + fresh["new_tokens"]
    assert result["same_answers"] is True


def test_a_later_turn_has_only_its_new_text_as_new(result: dict[str, Any]) -> None:
    first, second = result["turns"]
    assert first["new_positions"] == first["prompt_tokens"] + first["new_tokens"]
    grown = second["prompt_tokens"] - first["prompt_tokens"]
    assert 0 < second["new_positions"] - second["new_tokens"] <= grown
    alone = result["new_text"][1]
    assert 0 < alone["prompt_tokens"] < second["prompt_tokens"]
    assert alone["new_tokens"] == 1
    ratio = second["ttft_ms"] / alone["ttft_ms"]
    assert result["last_turn_over_new_text"] == pytest.approx(ratio)


def test_prompts_of_a_template_share_their_beginning(result: dict[str, Any]) -> None:
    templates = result["templates"]
    assert [row["turn"] for row in templates["turns"]] == [1, 2, 3]
    first, second, _ = templates["turns"]
    assert second["new_positions"] < first["new_positions"] / 2
    assert set(templates["median"]) == {"turns", "fresh"}
    assert len(templates["fresh"]) == NUM_TEMPLATES


def test_the_plot_has_a_line_for_each_engine_with_and_without_reuse(
    result: dict[str, Any],
) -> None:
    peer = {**result, "templates": {}}
    times, sizes = plot_chat({**result, "peers": {"other": peer}}).axes
    labels = ["device, verified", "device, verified, fresh", "other", "other, fresh"]
    assert times.get_legend_handles_labels()[1] == labels
    assert len(sizes.lines) == 2


def test_the_tables_have_the_turns_and_the_medians(
    result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    print_chat(new_console(), result)
    lines = capsys.readouterr().out
    assert "verified: ms to the first token, bytes up" in lines
    assert "template, fresh: " in lines


def test_an_answer_of_the_device_alone_is_no_figure() -> None:
    usage = Usage(
        prompt_tokens=1,
        tokens=1,
        sources={FALLBACK: 1},
        bytes_up=0,
        bytes_down=0,
        offload_rate=0.0,
        ttft_ms=1.0,
        tpot_ms=1.0,
    )
    with pytest.raises(FleetError, match="without its worker"):
        read_answer([Reply(seq=0, done=True, usage=usage)])


class KeptPrompt:
    """A process of llama.cpp that records what it is asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        self.asked.append({"op": op, **arguments})
        return {"token_ids": [7, 8], "text": "ab", "ttft_ms": 2.0, "reused_tokens": 3}


def test_llama_cpp_keeps_a_conversation_in_one_process_and_nothing_in_the_other(
    tiny_bundle: Bundle,
) -> None:
    kept, fresh = KeptPrompt(), KeptPrompt()
    responder = LlamaResponder(kept, fresh, ChatTokenizer(tiny_bundle))  # type: ignore[arg-type]
    responder.begin()
    request = PromptRequest(prompt="Hello?", max_new_tokens=2)
    answer = responder.ask(request, reuse=True)
    responder.ask(request, reuse=False)
    assert [each["reuse"] for each in kept.asked] == [False, True]
    assert [each["reuse"] for each in fresh.asked] == [False]
    assert kept.asked[1]["prompt"] == fresh.asked[0]["prompt"]
    assert (answer.reused_tokens, answer.token_ids, answer.text) == (3, (7, 8), "ab")
    assert answer.prompt_tokens == len(kept.asked[1]["prompt"])


def test_the_common_prefix_ends_at_the_first_difference() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([], [1]) == 0


def test_readings_of_a_template_differ() -> None:
    assert len(set(readings(100))) == 100
