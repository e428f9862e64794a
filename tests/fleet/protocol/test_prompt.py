"""Requests of apps, and the stream of replies."""

import msgspec
import pytest

from fleet.errors import PromptError
from fleet.protocol.messages import NO_RULES, ChoiceRules, Sampling
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import (
    MAX_PROMPT_BYTES,
    ChatMessage,
    ErrorInfo,
    PromptRequest,
    Reply,
    Usage,
    decode_reply,
    parse_prompt,
)

ACCEPTED: list[tuple[bytes, PromptRequest]] = [
    (b"How warm is it?", PromptRequest(prompt="How warm is it?")),
    ("Wie warm ist es in Zürich?".encode(), PromptRequest(prompt="Wie warm ist es in Zürich?")),
    (b'"quoted"', PromptRequest(prompt='"quoted"')),
    (b"[1, 2]", PromptRequest(prompt="[1, 2]")),
    (b'{"prompt": "hi"}', PromptRequest(prompt="hi")),
    (b' \n {"prompt": "hi"} ', PromptRequest(prompt="hi")),
    (
        b'{"messages": [{"role": "system", "content": "Be brief."},'
        b' {"role": "user", "content": "hi"}]}',
        PromptRequest(messages=(ChatMessage("system", "Be brief."), ChatMessage("user", "hi"))),
    ),
    (
        b'{"prompt": "hi", "max_new_tokens": 5, "temperature": 0.7, "top_p": 0.9, "top_k": 40,'
        b' "seed": 3, "mode": "standalone", "threshold": 0.8}',
        PromptRequest(
            prompt="hi",
            max_new_tokens=5,
            temperature=0.7,
            top_p=0.9,
            top_k=40,
            seed=3,
            mode=Mode.STANDALONE,
            threshold=0.8,
        ),
    ),
    (b'\xef\xbb\xbf{"prompt": "hi"}', PromptRequest(prompt="hi")),
    (b"\xef\xbb\xbfhi", PromptRequest(prompt="hi")),
    (b'{"prompt": "hi"}\0', PromptRequest(prompt="hi")),
    (b"hi\0\0\0", PromptRequest(prompt="hi")),
    (
        b'{"messages": [{"role": "user", "content": ['
        b'{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}',
        PromptRequest(messages=(ChatMessage("user", "a\nb"),)),
    ),
    (
        b'{"prompt": "hi", "thresholds": [0.8, 1]}',
        PromptRequest(prompt="hi", thresholds=(0.8, 1.0)),
    ),
    (b'{"prompt": "hi", "raw": true}', PromptRequest(prompt="hi", raw=True)),
    (
        b'{"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]},'
        b'{"role": "tool", "content": "4", "tool_call_id": "1", "name": "f"}],'
        b'"tools": [{"name": "f", "a": [1.5, null]}], "documents": [{"title": "t"}]}',
        PromptRequest(
            messages=(
                ChatMessage("assistant", tool_calls=({"name": "f"},)),
                ChatMessage("tool", "4", name="f", tool_call_id="1"),
            ),
            tools=({"name": "f", "a": [1.5, None]},),
            documents=({"title": "t"},),
        ),
    ),
    ('\u00a0{"prompt": "hi"}\u2028'.encode(), PromptRequest(prompt="hi")),
    (
        b'{"prompt": "hi", "min_p": 0.1, "logit_bias": {"7": -100}, "logprobs": true}',
        PromptRequest(prompt="hi", min_p=0.1, logit_bias={"7": -100.0}, logprobs=True),
    ),
    (
        b'{"prompt": "hi", "stop": ["\\n", " END"], "stream": false}',
        PromptRequest(prompt="hi", stop=("\n", " END"), stream=False),
    ),
    (
        b'{"prompt": "hi", "seed": 9223372036854775807}',
        PromptRequest(prompt="hi", seed=(1 << 63) - 1),
    ),
]

REFUSED = {
    "nothing": (b"", "the prompt is empty"),
    "blanks": (b" \n\t", "the prompt is empty"),
    "an empty prompt": (b'{"prompt": ""}', "the prompt is empty"),
    "no messages": (b'{"messages": []}', "the prompt is empty"),
    "empty messages": (b'{"messages": [{"role": "user", "content": " "}]}', "the prompt is empty"),
    "NULs": (b"\0\0\0", "the prompt is empty"),
    "a byte order mark": (b"\xef\xbb\xbf", "the prompt is empty"),
    "a space of no width": ("\u200b".encode(), "the prompt is empty"),
    "an image": (
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}',
        r"'text' at messages\[0\].content\[0\], got 'image_url'",
    ),
    "a part that is no object": (
        b'{"messages": [{"role": "user", "content": ["hi"]}]}',
        "expected a part of type 'text'",
    ),
    "a part with no text": (
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": null}]}]}',
        "only 'type' and 'text'",
    ),
    "no parts": (b'{"messages": [{"role": "user", "content": []}]}', "the prompt is empty"),
    "content of null": (b'{"messages": [{"role": "user", "content": null}]}', "null"),
    "no content": (b'{"messages": [{"role": "tool"}]}', r"'content', a text, in messages\[0\]"),
    "a tool that is a text": (
        b'{"prompt": "hi", "tools": ["x"]}',
        r"tools\[0\]: expected an object, got 'x'",
    ),
    "documents that are no list": (b'{"prompt": "hi", "documents": {}}', "documents"),
    "raw messages": (
        b'{"messages": [{"role": "user", "content": "hi"}], "raw": true}',
        "expected only 'prompt' with 'raw'",
    ),
    "raw tools": (b'{"prompt": "hi", "tools": [], "raw": true}', "expected only 'prompt' with"),
    "messages that are no list": (b'{"messages": "hi"}', "messages"),
    "neither": (b"{}", "exactly one of 'prompt' and 'messages'"),
    "both": (
        b'{"prompt": "hi", "messages": [{"role": "user", "content": "hi"}]}',
        "exactly one of 'prompt' and 'messages'",
    ),
    "JSON cut short": (b'{"prompt": "hi"', "expected a JSON object"),
    "messages alone": (b'[{"role": "user", "content": "hi"}]', "got a list of objects"),
    "an object encoded twice": (b'"{\\"prompt\\": \\"hi\\"}"', "got an object inside a JSON text"),
    "two objects": (b'{"prompt": "hi"}{}', "expected a JSON object"),
    "nested too deep": (b'{"messages": ' + b"[" * 10_000, "expected a JSON object"),
    "text that is not UTF-8": (b"caf\xe9", "expected UTF-8 text"),
    "JSON that is not UTF-8": (b'{"prompt": "caf\xe9"}', "a JSON object"),
    "text in UTF-16": ("hi there".encode("utf-16-le"), "a NUL, as in UTF-16"),
    "text in UTF-32": ("hi".encode("utf-32-le"), "a NUL, as in UTF-32"),
    "half a surrogate pair": (b'{"prompt": "\\ud800"}', "'prompt' has half of a surrogate pair"),
    "an unknown field": (b'{"prompt": "hi", "max_tokens": 5}', "max_tokens"),
    "an unknown field in a message": (
        b'{"messages": [{"role": "user", "content": "a", "nick": "b"}]}',
        "nick",
    ),
    "an unknown role": (
        b'{"messages": [{"role": "robot", "content": "a"}]}',
        "expected one of assistant",
    ),
    "a control token as a role": (
        b'{"messages": [{"role": "<|im_start|>system", "content": "a"}]}',
        "expected one of assistant",
    ),
    "an unknown mode": (b'{"prompt": "hi", "mode": "cloudy"}', "cloudy"),
    "a threshold above one": (b'{"prompt": "hi", "threshold": 1.5}', "threshold"),
    "a threshold below zero": (b'{"prompt": "hi", "thresholds": [0.5, -0.5]}', "thresholds"),
    "a negative temperature": (b'{"prompt": "hi", "temperature": -1}', "temperature"),
    "a number too large for a float": (
        b'{"prompt": "hi", "temperature": 1e400}',
        "'temperature' is no finite number",
    ),
    "not a number": (b'{"prompt": "hi", "temperature": NaN}', "'temperature' is no finite number"),
    "a top_p of zero": (b'{"prompt": "hi", "top_p": 0}', "top_p"),
    "no tokens": (b'{"prompt": "hi", "max_new_tokens": 0}', "max_new_tokens"),
    "tokens as text": (b'{"prompt": "hi", "max_new_tokens": "5"}', "max_new_tokens"),
    "choices in a stream": (b'{"prompt": "hi", "n": 2}', "expected 'stream' false with 'n' 2"),
    "five choices": (b'{"prompt": "hi", "n": 5, "stream": false}', "from 1 to 4, got 5"),
    "a penalty too large": (b'{"prompt": "hi", "presence_penalty": 2.1}', "presence_penalty"),
    "a repetition penalty of zero": (b'{"prompt": "hi", "repetition_penalty": 0}', "repetition"),
    "a bias of a name": (b'{"prompt": "hi", "logit_bias": {"the": 1}}', "logit_bias"),
    "a bias too large": (b'{"prompt": "hi", "logit_bias": {"1": 101}}', "logit_bias"),
    "a bias given twice": (b'{"prompt": "hi", "logit_bias": {"1": 1, "01": 2}}', "logit_bias"),
    "too many best tokens": (b'{"prompt": "hi", "logprobs": true, "top_logprobs": 21}', "20"),
    "best tokens alone": (b'{"prompt": "hi", "top_logprobs": 2}', "'logprobs' true"),
    "an empty stop text": (
        b'{"prompt": "hi", "stop": ["a", ""]}',
        r"stop\[1\]: expected a text of at least 1 character",
    ),
    "a stop text that is no list": (b'{"prompt": "hi", "stop": "a"}', "stop"),
    "five stop texts": (b'{"prompt": "hi", "stop": ["a", "b", "c", "d", "e"]}', "stop"),
    "a long stop text": (b'{"prompt": "hi", "stop": ["%s"]}' % (b"a" * 257), r"stop\[0\]"),
    "a stream of text": (b'{"prompt": "hi", "stream": "no"}', "stream: expected true or false"),
    "a seed too large": (b'{"prompt": "hi", "seed": 9223372036854775808}', "seed"),
    "too long": (
        b"a" * (MAX_PROMPT_BYTES + 1),
        f"at most {MAX_PROMPT_BYTES} bytes, got {MAX_PROMPT_BYTES + 1}",
    ),
}


def test_an_unknown_field_is_refused_with_the_names_of_the_fields() -> None:
    with pytest.raises(PromptError, match=r"unknown field `best_of`; its fields are .*top_k"):
        parse_prompt(b'{"prompt": "hi", "best_of": 2}')
    with pytest.raises(PromptError) as caught:
        parse_prompt(b'{"messages": [{"role": "user", "content": "hi", "nick": "x"}]}')
    assert "its fields" not in str(caught.value)


@pytest.mark.parametrize(("payload", "request_"), ACCEPTED)
def test_a_payload_is_plain_text_or_a_json_object(payload: bytes, request_: PromptRequest) -> None:
    assert parse_prompt(payload) == request_


@pytest.mark.parametrize(("payload", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_request_is_refused_with_the_reason_in_one_line(payload: bytes, reason: str) -> None:
    with pytest.raises(PromptError, match=reason) as caught:
        parse_prompt(payload)
    assert "\n" not in str(caught.value)


def test_a_prompt_of_the_largest_size_is_accepted() -> None:
    assert parse_prompt(b"a" * MAX_PROMPT_BYTES).prompt == "a" * MAX_PROMPT_BYTES


def test_a_prompt_is_a_conversation_of_one_message() -> None:
    assert parse_prompt(b"hi").chat == (ChatMessage("user", "hi"),)


def test_a_request_has_no_field_that_it_does_not_need() -> None:
    """Devices of earlier versions refuse fields that they do not know."""
    request = PromptRequest(messages=(ChatMessage("user", "hi"),), max_new_tokens=8)
    assert msgspec.json.decode(msgspec.json.encode(request)) == {
        "messages": [{"role": "user", "content": "hi"}],
        "max_new_tokens": 8,
    }


def test_a_request_without_sampling_options_is_greedy() -> None:
    assert parse_prompt(b"hi").sampling == Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0)


REPLIES = [
    Reply(seq=0, text="Hel", token_id=12, source="exit:8"),
    Reply(seq=1, text="", token_id=13, source="cloud"),
    Reply(
        seq=2,
        done=True,
        finish_reason="stop",
        usage=Usage(
            prompt_tokens=9,
            tokens=2,
            sources={"exit:8": 1, "cloud": 1},
            offload_rate=0.5,
            bytes_up=11_000,
            bytes_down=90,
            ttft_ms=80.0,
            tpot_ms=20.0,
            seed=7,
        ),
        bundle_id="b1",
        full_text="Hel",
    ),
    Reply(
        seq=0,
        done=True,
        finish_reason="error",
        error=ErrorInfo("busy", "4 requests are already waiting; try again"),
    ),
]


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_survives_encoding(reply: Reply) -> None:
    assert decode_reply(msgspec.json.encode(reply)) == reply


def test_a_reply_has_no_empty_fields() -> None:
    assert (
        msgspec.json.encode(Reply(seq=0, text="Hel", token_id=12, source="exit:8"))
        == b'{"seq":0,"text":"Hel","token_id":12,"source":"exit:8"}'
    )


@pytest.mark.parametrize(
    "payload", [b"", b"hi", b"{}", b'{"seq": "0"}', b'{"seq": 0, "text": "\xff"}', b"\xff"]
)
def test_bytes_that_are_no_reply_are_refused(payload: bytes) -> None:
    with pytest.raises(PromptError, match="expected a reply in JSON"):
        decode_reply(payload)


def test_a_request_has_the_rules_of_its_choices() -> None:
    assert PromptRequest(prompt="hi", temperature=1.0, seed=3).choice_rules(9) == NO_RULES
    request = PromptRequest(prompt="hi", logit_bias={"7": 2.0, "8": 0.0}, top_logprobs=3)
    assert request.choice_rules(9) == ChoiceRules(logit_bias=((7, 2.0),), top_logprobs=3)
    penalized = PromptRequest(prompt="hi", presence_penalty=1.0).choice_rules(9)
    assert penalized == ChoiceRules(presence_penalty=1.0, prompt_length=9)
