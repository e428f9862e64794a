"""Settings: merged from wide to narrow, parsed, on the wire."""

from __future__ import annotations

import msgspec
import pytest

from fleet.errors import ConfigError, DecodeError, OversizedError
from fleet.protocol.desired_config import (
    MAX_DESIRED_BYTES,
    DesiredConfig,
    Settings,
    decode_desired,
    encode_desired,
    merge_scopes,
    parse_settings,
)
from fleet.protocol.modes import Mode


@pytest.mark.parametrize(
    ("scopes", "merged"),
    [
        ((), Settings()),
        ((Settings(max_draft=4), Settings(mode=Mode.AUTO)), Settings(max_draft=4, mode=Mode.AUTO)),
        ((Settings(max_draft=4), Settings(max_draft=8), Settings()), Settings(max_draft=8)),
        (
            (Settings(threshold=0.5), Settings(thresholds=(0.7, 0.8))),
            Settings(thresholds=(0.7, 0.8)),
        ),
        ((Settings(thresholds=(0.7, 0.8)), Settings(threshold=0.5)), Settings(threshold=0.5)),
        (
            (Settings(agreement_sample=0.2), Settings(agreement_sample=0.0)),
            Settings(agreement_sample=0.0),
        ),
        (
            (Settings(temperature=0.7, system_prompt="Rhyme."), Settings(system_prompt="")),
            Settings(temperature=0.7, system_prompt=""),
        ),
    ],
)
def test_the_narrowest_scope_that_has_a_value_decides(
    scopes: tuple[Settings, ...], merged: Settings
) -> None:
    assert merge_scopes(*scopes) == merged


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"treshold": 0.5}, "unknown field `treshold`.*known settings are .*mode, threshold"),
        ({"threshold": 1.5}, "threshold: expected a number from 0 to 1, such as 0.8, got 1.5$"),
        ({"mode": "fast"}, "mode: expected one of standalone, .*, got 'fast'$"),
        ({"max_draft": 0}, "max_draft: expected a whole number from 1 to "),
        ({"bundle": "../etc"}, "bundle"),
        ({"temperature": 6}, "temperature: expected a number from 0 to 5, got 6$"),
        ({"top_p": 0}, "top_p: expected a number "),
        ({"top_k": 1001}, "top_k: expected a whole number from 0 to 1,000, got 1001$"),
        ({"min_p": -0.1}, "min_p: expected a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number from 0.1 to 10"),
        ({"presence_penalty": 3}, "presence_penalty: expected a number from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty: expected a number from -2 to 2"),
        (
            {"system_prompt": "x" * 8001},
            "system_prompt: expected a text of at most 8,000 characters",
        ),
    ],
)
def test_a_setting_that_is_none_is_refused_by_name(values: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_settings(values)


def test_a_device_that_does_not_know_versions_of_software_reads_the_settings() -> None:
    """Such a device refuses unknown settings, and ignores unknown fields next to them."""
    payload = encode_desired(DesiredConfig.of(7, Settings(mode=Mode.AUTO, software="0.9.0")))
    assert payload == b'{"version":7,"settings":{"mode":"auto"},"software":"0.9.0"}'
    assert decode_desired(payload).software == "0.9.0"


@pytest.mark.parametrize("version", ["", "../x", ".new", "1.0/x", "V1", "1" * 64])
def test_a_version_of_software_is_the_name_of_a_folder(version: str) -> None:
    with pytest.raises(DecodeError):
        decode_desired(msgspec.json.encode({"version": 1, "settings": {}, "software": version}))


def test_a_missing_value_is_not_on_the_wire() -> None:
    desired = DesiredConfig(7, Settings(mode=Mode.AUTO))
    assert encode_desired(desired) == b'{"version":7,"settings":{"mode":"auto"}}'
    assert decode_desired(encode_desired(desired)) == desired


@pytest.mark.parametrize(
    "payload", [b"", b"{}", b"[1]", b'{"version":-1,"settings":{}}', b"\xff", b"[" * 10_000]
)
def test_bytes_that_are_no_configuration_are_refused(payload: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_desired(payload)


def test_a_configuration_beyond_the_limit_is_not_looked_at() -> None:
    with pytest.raises(OversizedError):
        decode_desired(b" " * (MAX_DESIRED_BYTES + 1))
