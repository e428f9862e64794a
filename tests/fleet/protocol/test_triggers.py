"""Triggers: events, conditions, templates and the prompts made of them."""

from __future__ import annotations

import time
import unicodedata
from contextlib import suppress
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.errors import ConfigError, DecodeError, OversizedError, PromptError
from fleet.protocol.desired_config import Settings, parse_settings
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import AnswerOptions, PromptRequest
from fleet.protocol.triggers import (
    MAX_EVENT_BYTES,
    MAX_TEXT,
    Trigger,
    event_filters,
    fill,
    make_prompt,
    read_event,
    request_name,
    trigger_of,
)

WARM = (
    b'{"room": "kitchen", "sensor": {"celsius": 31.27, "ok": true}, "last": [30, 31], "note": null}'
)


def trigger(**changes: Any) -> Trigger:
    """Decode a trigger from JSON fields."""
    values = {"name": "warm", "events": "thermostat/warmth", "template": "It is warm."}
    return msgspec.convert(values | changes, Trigger)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("It is {sensor.celsius:.1f} degrees in the {room}.", "It is 31.3 degrees in the kitchen."),
        ("{sensor.celsius}", "31.27"),
        ("{last.0:+d} {last.1:4d}", "+30   31"),
        ("{room:>8}", " kitchen"),
        ("{sensor.ok} {note} {last}", "true null [30,31]"),
        ("{{room}} {channel}", "{room} warmth"),
        ("{payload}", WARM.decode()),
        ("{sensor}", '{"celsius":31.27,"ok":true}'),
    ],
)
def test_a_template_is_filled_with_the_fields_of_the_event(template: str, text: str) -> None:
    assert fill(template, read_event("warmth", WARM)) == text


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"The window is open.", "The window is open."),
        (b" 21.5\n", "21.5"),
        (b"007", "007"),
        (b"1.10", "1.10"),
        (b"12e5", "12e5"),
        (b"89490200001234567890", "89490200001234567890"),
        (b'"open"', "open"),
        (b'"open', '"open'),
        (b"[1, 2]", "[1, 2]"),
        ("grüß".encode(), "grüß"),
    ],
)
def test_plain_text_is_the_payload(payload: bytes, text: str) -> None:
    assert fill("{payload}", read_event("warmth", payload)) == text


@pytest.mark.parametrize(
    ("when", "holds"),
    [
        ('payload == "1"', True),
        ('payload != "1"', False),
        ('payload < "5"', True),
        ("payload == 1", True),
        ("payload == 1.0", True),
        ("payload < 5", True),
        ('s == "1"', True),
        ("s == 1", True),
    ],
)
def test_digits_are_a_text_where_a_text_is_expected_and_a_number_elsewhere(
    when: str, holds: bool
) -> None:
    event = read_event("warmth", b"1" if when.startswith("payload") else b'{"s": "1"}')
    assert (make_prompt(trigger(when=when), event) is not None) is holds


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("{v}", "1.10"),
        ("{v:>6}", "  1.10"),
        ("{v:6s}", "1.10  "),
        ("{v:.3f}", "1.100"),
        ("{v:06}", "0001.1"),
    ],
)
def test_digits_become_a_number_in_a_format_of_numbers_only(field: str, text: str) -> None:
    assert fill(field, read_event("x", b'{"v": "1.10"}')) == text
    assert fill(field.replace("v", "payload"), read_event("x", b"1.10")) == text


def test_a_long_number_is_compared_with_all_its_digits() -> None:
    event = read_event("card", b'{"id": 89490200001234567891}')
    assert make_prompt(trigger(when="id == 89490200001234567891"), event)
    assert not make_prompt(trigger(when="id == 89490200001234567890"), event)


def test_a_number_alone_can_be_formatted_and_compared() -> None:
    event = read_event("warmth", b"31.27")
    assert fill("{payload:.1f}", event) == "31.3"
    assert make_prompt(trigger(when="payload > 31"), event)
    assert not make_prompt(trigger(when="payload > 32"), event)


@pytest.mark.parametrize(
    "template",
    [
        "{room.__class__}", "{room.upper}", "{last.__len__}", "{sensor.items}", "{cellar}",
        "{sensor.humidity}", "{last.2}", "{last.-1}", "{room.0}",
    ],
)  # fmt: skip
def test_a_path_leads_only_to_plain_data(template: str) -> None:
    with pytest.raises(PromptError, match="expected a field"):
        fill(template, read_event("warmth", WARM))


@pytest.mark.parametrize(
    "template", ["{room:.1f}", "{sensor:.1f}", "{sensor.ok:d}", "{note:>5}", "{sensor.celsius:d}"]
)
def test_a_value_that_does_not_fit_its_format_is_named(template: str) -> None:
    with pytest.raises(PromptError, match=r"expected a value that fits \{"):
        fill(template, read_event("warmth", WARM))


@pytest.mark.parametrize(
    "template",
    [
        "{", "}", "{}", "{0}", "{room", "{a b}", "{room[0]}", "{room!r}", "{room:{width}}",
        "{room:999}", "{room:.999f}", "{_.x!s}", "{room:x<5}", "", "x" * 2001,
    ],
)  # fmt: skip
def test_a_bad_template_is_refused(template: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        trigger(template=template)


OTHER_KEYS = read_event(
    "x",
    '{"air": {"PM2.5": 44.1, "PM2": {"1": 7}}, "24_hours": 12, "My Team": 1, "28-EA41": 18.2, '
    '"temp°C": 3, "a\'b": 4, "a:b}": 5, "": 6}'.encode(),
)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{air.PM2.5:.0f}", "44"),
        ("{air.'PM2.5'}", "44.1"),
        ('{air."PM2.5"}', "44.1"),
        ("{air.PM2.1}", "7"),
        ("{'24_hours'}", "12"),
        ("{'My Team':>3}", "  1"),
        ("{'28-EA41':.1f}", "18.2"),
        ("{'temp°C'}", "3"),
        (r"{'a\'b'}", "4"),
        ('{"a\'b"}', "4"),
        ("{'a:b}'}", "5"),
        ("{''}", "6"),
    ],
)
def test_a_quoted_path_reaches_every_key(template: str, text: str) -> None:
    assert fill(template, OTHER_KEYS) == text


@pytest.mark.parametrize("when", ["'My Team' == 1", "air.'PM2.5' > 44", "air.PM2.5 > 44"])
def test_a_condition_reaches_every_key(when: str) -> None:
    assert make_prompt(trigger(when=when), OTHER_KEYS)


@pytest.mark.parametrize("template", ["{24_hours}", "{My Team}", "{28-EA41}", "{temp°C}"])
def test_the_error_of_a_bad_path_shows_how_to_quote_a_key(template: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"\{air\.'PM2\.5'\} \(a key of other"):
        trigger(template=template)


@pytest.mark.parametrize("when", ["sensor.ok > true", "note <= null"])
def test_a_condition_that_never_holds_is_refused(when: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="a number or a text in quotes"):
        trigger(when=when)


@pytest.mark.parametrize("text", ["31.2", " 31.2", "3.12e1", "+31.2", "031.2", ".312e2"])
def test_a_text_that_is_a_number_counts_as_one(text: str) -> None:
    event = read_event("x", msgspec.json.encode({"celsius": text}))
    assert fill("{celsius:.1f}", event) == "31.2"
    assert fill("{celsius}", event) == text
    assert make_prompt(trigger(when="celsius > 30"), event)
    assert make_prompt(trigger(when="celsius == 31.2"), event)
    assert not make_prompt(trigger(when='celsius == "31"'), event)


@pytest.mark.parametrize("text", ["31,2", "20.6 °C", "unavailable", "nan", ""])
def test_a_text_that_is_no_number_drops_the_event(text: str) -> None:
    event = read_event("x", msgspec.json.encode({"celsius": text}))
    with pytest.raises(PromptError, match="expected a number at"):
        make_prompt(trigger(when="celsius > 30"), event)
    with pytest.raises(PromptError, match="expected a value that fits"):
        fill("{celsius:.1f}", event)


@pytest.mark.parametrize(
    "broken",
    ["nan", "NaN", "-inf", "Infinity", "1e999", "-1e999", "[1, nan]", "ovf", "1.#QNAN", "-1.#IND"],
)
def test_one_broken_number_does_not_lose_the_other_fields(broken: str) -> None:
    text = f'{{"one": {{"celsius": 31.0}}, "nan": "say \\"nan\\" [1e999", "two": {broken}}}'
    event = read_event("x", text.encode())
    assert fill("{one.celsius:.1f} {nan}", event) == '31.0 say "nan" [1e999'
    assert event["two"] in (None, [1, None])
    with pytest.raises(PromptError, match="expected a"):
        make_prompt(trigger(when="two > 30"), event)


@pytest.mark.parametrize("number", ["+31.2", "031.2", ".312e2", '"+31.2"'])
def test_a_number_in_an_instruments_form_is_a_number(number: str) -> None:
    event = read_event("x", f'{{"celsius": {number}, "ok": true}}'.encode())
    assert fill("{celsius:.1f} {ok}", event) == "31.2 true"
    assert make_prompt(trigger(when="celsius > 30"), event)


@pytest.mark.parametrize("number", ["5", "5.0", "5.", "+5", '"5.0"'])
def test_a_whole_number_fits_a_format_of_whole_numbers(number: str) -> None:
    assert fill("{n:d}", read_event("x", f'{{"n": {number}}}'.encode())) == "5"
    with pytest.raises(PromptError, match="expected a value that fits"):
        fill("{n:d}", read_event("x", b'{"n": 5.5}'))


def test_an_event_in_quotes_of_json_is_its_text() -> None:
    assert make_prompt(trigger(when='payload == "ON"'), read_event("x", b'"ON"'))
    twice = msgspec.json.encode(WARM.decode())
    assert fill("{sensor.celsius:.1f}", read_event("x", twice)) == "31.3"


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("of_trigger", ["NFC", "NFD"])
def test_a_key_is_found_in_each_form_of_unicode(
    form: Literal["NFC", "NFD"], of_trigger: Literal["NFC", "NFD"]
) -> None:
    text = unicodedata.normalize(form, '{"wärme": {"höhe": "grün"}}')
    when = unicodedata.normalize(of_trigger, 'wärme.höhe == "grün"')
    template = unicodedata.normalize(of_trigger, "{wärme.höhe}")
    assert make_prompt(trigger(when=when, template=template), read_event("x", text.encode()))


def test_a_broken_event_of_many_quotes_is_refused_at_once() -> None:
    payload = b'{"' + b'\\"' * ((MAX_EVENT_BYTES - 2) // 2)
    started = time.monotonic()
    with pytest.raises(DecodeError):
        read_event("x", payload)
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize(
    "payload", ["\ufeff31.2", "31.2\0", "31.2\n\0\0"], ids=["byte order mark", "NUL", "NULs"]
)
def test_invisible_bytes_around_an_event_are_skipped(payload: str) -> None:
    assert fill("{payload:.2f}", read_event("x", payload.encode())) == "31.20"


def test_invisible_bytes_around_the_json_of_an_event_are_skipped() -> None:
    event = read_event("x", b"\xef\xbb\xbf" + WARM + b"\0")
    assert fill("{sensor.celsius:.1f}", event) == "31.3"


def test_the_length_of_a_filled_template_is_bounded() -> None:
    event = read_event("warmth", b"x" * (MAX_TEXT // 10))
    with pytest.raises(PromptError, match="at most 16384 characters"):
        fill("{payload}" * 200, event)


@pytest.mark.parametrize("payload", [b"", b"  \n", b"\0", "\ufeff\u200b".encode()])
def test_an_empty_prompt_is_refused(payload: bytes) -> None:
    with pytest.raises(PromptError, match="empty prompt"):
        fill("{payload}", read_event("warmth", payload))


@pytest.mark.parametrize(
    ("when", "holds"),
    [
        ("sensor.celsius > 31", True),
        ("sensor.celsius>31.27", False),
        ("sensor.celsius >= 31.27", True),
        ("sensor.celsius < 1e2", True),
        ("sensor.celsius <= 31", False),
        ("last.0 == 30", True),
        ("last.0 != 30", False),
        ('room == "kitchen"', True),
        ('room < "l"', True),
        ('channel != "warmth"', False),
        ("sensor.ok == true", True),
        ("sensor.ok == 1", False),
        ("note == null", True),
        ('note != "x"', True),
    ],
)
def test_a_condition_compares_a_field_with_a_value(when: str, holds: bool) -> None:
    assert (make_prompt(trigger(when=when), read_event("warmth", WARM)) is not None) is holds


@pytest.mark.parametrize(
    "when", ["room > 3", 'sensor.celsius > "3"', "sensor.ok > 0", "note > 0", "last > 0"]
)
def test_values_that_cannot_be_compared_are_named(when: str) -> None:
    with pytest.raises(PromptError, match=r"expected a (number|text) at"):
        make_prompt(trigger(when=when), read_event("warmth", WARM))


def test_a_condition_on_a_field_that_is_missing_is_an_error() -> None:
    with pytest.raises(PromptError, match="expected a field 'humidity'"):
        make_prompt(trigger(when="humidity > 3"), read_event("warmth", WARM))


@pytest.mark.parametrize(
    "when",
    [
        "",
        "warm",
        "celsius",
        "celsius >",
        "> 3",
        "celsius = 3",
        "celsius > warm",
        "celsius > [3]",
        "a()> 3",
    ],
)
def test_a_bad_condition_is_refused(when: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="condition like celsius > 30"):
        trigger(when=when)


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (b'{"room": "kitchen"', DecodeError),
        (b"{room}", DecodeError),
        (b"{" * 5000, DecodeError),
        (b'{"a":' + b"[" * 5000, DecodeError),
        (b"\xff\xfe", DecodeError),
        (b"x" * (MAX_EVENT_BYTES + 1), OversizedError),
    ],
)
def test_a_bad_event_is_refused(payload: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        read_event("warmth", payload)


FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
JSON_EVENTS = JSON_VALUES.map(lambda value: msgspec.json.encode({"room": value}))


@given(st.binary(max_size=200) | JSON_EVENTS)
def test_any_payload_makes_a_prompt_or_a_fleet_error(payload: bytes) -> None:
    for each in (
        trigger(template="{room:.1f}"),
        trigger(template="{room} {payload}", when="room > 3"),
    ):
        with suppress(DecodeError, OversizedError, PromptError):
            prompt = make_prompt(each, read_event("warmth", payload))
            assert prompt is None or prompt.prompt


@given(st.text(max_size=60))
def test_any_template_is_refused_or_filled(template: str) -> None:
    with suppress(msgspec.ValidationError, PromptError):
        prompt = make_prompt(trigger(template=template), read_event("warmth", WARM))
        assert prompt
        assert prompt.prompt


def test_the_prompt_has_the_triggers_options() -> None:
    options = {
        "max_new_tokens": 8,
        "mode": "standalone",
        "temperature": 0.5,
        "seed": 7,
        "deadline_ms": 1000,
    }
    assert make_prompt(trigger(**options), read_event("warmth", b"")) == PromptRequest(
        prompt="It is warm.",
        max_new_tokens=8,
        mode=Mode.STANDALONE,
        temperature=0.5,
        seed=7,
        deadline_ms=1000,
    )


def test_a_trigger_has_all_options_of_a_prompt() -> None:
    assert set(AnswerOptions.__struct_fields__) == set(PromptRequest.__struct_fields__) - {
        "prompt",
        "messages",
        "raw",
        "tools",
        "documents",
        "trace",
    }
    assert set(trigger().options()) == set(AnswerOptions.__struct_fields__)


@pytest.mark.parametrize(
    ("events", "channel", "listens_to"),
    [
        ("thermostat/warmth", "warmth", True),
        ("thermostat/warmth", "door", False),
        ("thermostat/+", "door", True),
        ("other/+", "door", False),
    ],
)
def test_a_trigger_listens_to_the_events_of_its_app(
    events: str, channel: str, listens_to: bool
) -> None:
    assert trigger(events=events).listens_to("thermostat", channel) is listens_to


@pytest.mark.parametrize(
    "events", ["", "warmth", "+/warmth", "#", "a/#", "a/b/c", "A/b", "a/", "/b"]
)
def test_events_are_those_of_one_app(events: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="expected events like thermostat/warmth"):
        trigger(events=events)


def test_each_event_is_subscribed_to_once() -> None:
    triggers = [
        trigger(name=str(i), events=events)
        for i, events in enumerate(["a/x", "a/x", "a/y", "b/z", "b/+", "c/+", "c/+", "ab/y"])
    ]
    assert event_filters(triggers) == {
        f"ce/v1/e/{events}" for events in ("a/x", "a/y", "b/+", "c/+", "ab/y")
    }  # fmt: skip


def test_the_rate_allows_one_in_each_interval() -> None:
    slow = trigger(min_interval_s=60)
    assert slow.is_due(float("-inf"), 0.0)
    assert not slow.is_due(100.0, 159.9)
    assert slow.is_due(100.0, 160.0)


def test_the_longest_trigger_makes_a_legal_request() -> None:
    named = trigger(name="a" * 32)
    request = request_name(named, (1 << 44) - 1, 10**9)
    assert len(request) <= 63
    assert request_name(named, 1, 2) != request_name(named, 1, 3) != request_name(named, 2, 3)


@pytest.mark.parametrize("name", ["a" * 32, "a-1f-2", "warm"])
def test_a_request_names_its_trigger(name: str) -> None:
    assert trigger_of(request_name(trigger(name=name), 0x1F, 7)) == name


@pytest.mark.parametrize("request_id", ["0123456789abcdef" * 2, "r1", "warm-1f", "a-x-1"])
def test_the_request_of_an_app_names_no_trigger(request_id: str) -> None:
    assert trigger_of(request_id) is None


def test_names_of_triggers_must_be_unique() -> None:
    values = msgspec.to_builtins(trigger())
    with pytest.raises(ConfigError, match="unique trigger names, got warm repeatedly"):
        parse_settings({"triggers": [values, values]})


def test_triggers_too_large_for_a_device_are_refused_when_they_are_set() -> None:
    triggers = [
        msgspec.to_builtins(trigger(name=f"t{i}", template="\u20ac" * 2000)) for i in range(16)
    ]
    with pytest.raises(
        ConfigError, match=r"at most 61440 bytes as JSON, got .*; shorten the triggers"
    ):
        parse_settings({"triggers": triggers})


def test_settings_keep_their_triggers_on_the_wire() -> None:
    settings = Settings(
        triggers=(trigger(when="payload > 30", reply_to="display", min_interval_s=60),)
    )
    assert msgspec.json.decode(msgspec.json.encode(settings), type=Settings) == settings


def test_a_trigger_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field `promt`"):
        trigger(promt="x")
