"""Text and JSON of users, as editors on every system save them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.config import CONFIG_FILE, AgentConfig
from fleet.bundles.calibration_file import read_calibration
from fleet.cli.config import _parse_pair
from fleet.errors import ConfigError
from fleet.identity.identity import IDENTITY_FILE, Identity
from fleet.planning.cost_model import read_fits
from fleet.protocol.desired_config import parse_settings
from fleet.server.home import FLEET_FILE, FleetHome
from fleet.utils.text_files import decode_json, decode_text, read_text

MARK = b"\xef\xbb\xbf"
FLEET = b'{"host": "h", "port": 1, "bundle": "/b"}'
IDENTITY = b'{"name": "pi", "role": "device", "host": "h", "port": 1}'


@pytest.mark.parametrize("data", ["Wärme".encode(), MARK + "Wärme".encode()])
def test_a_byte_order_mark_is_skipped(data: bytes) -> None:
    assert decode_text(data, "a file") == "Wärme"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_text_in_utf_16_is_refused_by_its_name(encoding: str) -> None:
    with pytest.raises(ConfigError, match="a file is in UTF-16, expected UTF-8; save it as UTF-8"):
        decode_text('{"a": 1}'.encode(encoding), "a file")


@pytest.mark.parametrize("data", [b"caf\xe9 noir", b'"\\ud83d"', b'"\\ud83d pair"', b"[" * 9999])
def test_data_that_is_no_text_or_no_json_is_an_error_of_one_line(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^a file is not ") as raised:
        decode_json(data, "a file")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent: No such file.*; make it"):
        read_text(tmp_path / "absent", "make it")


def test_files_of_settings_may_begin_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / FLEET_FILE).write_bytes(MARK + FLEET)
    assert FleetHome.load(tmp_path).config.host == "h"
    (tmp_path / CONFIG_FILE).write_bytes(MARK + b'{"max_new_tokens": 7}')
    assert AgentConfig.load(tmp_path).max_new_tokens == 7
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).touch()
    (tmp_path / IDENTITY_FILE).write_bytes(MARK + IDENTITY)
    assert Identity.load(tmp_path).name == "pi"


def test_a_link_to_settings_that_are_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).symlink_to("absent.json")
    with pytest.raises(FileNotFoundError):
        AgentConfig.load(tmp_path)


def test_a_file_nested_too_deeply_is_refused_by_every_reader(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_bytes(b'[{"later": ' + b"[" * 9999)
    with pytest.raises(ConfigError, match=r"deep\.json"):
        read_fits(path)
    path.write_bytes(b'{"later": ' + b"[" * 9999)
    with pytest.raises(ConfigError, match=r"deep\.json"):
        read_calibration(path)
    with pytest.raises(ConfigError, match="triggers"):
        parse_settings(dict([_parse_pair("triggers=" + "[" * 9999)]))
