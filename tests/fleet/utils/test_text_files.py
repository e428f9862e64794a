"""Text and JSON of users, as editors on every system save them."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from edge_agent.config import CONFIG_FILE, AgentConfig
from fleet.bundles.calibration_file import read_calibration
from fleet.bundles.manifest import MANIFEST_FILE, read_manifest
from fleet.cli.config import _parse_pair
from fleet.errors import BundleError, ConfigError
from fleet.identity.identity import IDENTITY_FILE, Identity
from fleet.planning.cost_model import read_fits
from fleet.protocol.desired_config import parse_settings
from fleet.server.home import FLEET_FILE, FleetHome
from fleet.utils.paths import user_name
from fleet.utils.text_files import decode_json, decode_text, read_json, read_text

MARK = b"\xef\xbb\xbf"
FLEET = b'{"host": "h", "port": 1, "bundle": "/b"}'
IDENTITY = b'{"name": "pi", "role": "device", "host": "h", "port": 1}'


@pytest.mark.parametrize("data", ["Wärme".encode(), MARK + "Wärme".encode()])
def test_a_byte_order_mark_is_skipped(data: bytes) -> None:
    assert decode_text(data, "a file") == "Wärme"


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (gzip.compress(b"prompt", mtime=0), "a gzip file, expected text; unpack it with gunzip"),
        (bz2.compress(b"prompt"), r"an archive \(bzip2\), expected text; unpack it with bunzip2"),
        (lzma.compress(b"prompt"), r"an archive \(xz\), expected text; unpack it with unxz"),
        (b"\x28\xb5\x2f\xfd\0", r"an archive \(zstd\), expected text; unpack it with unzstd"),
        (zipped(), r"a spreadsheet, a document or an archive \(zip\), .*; save it as text or CSV"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0", "an old spreadsheet or document, expected text"),
        (b"%PDF-1.7\n", "a PDF, expected text; save it as text"),
    ],
)
def test_a_file_that_is_no_plain_text_is_refused_by_its_kind(data: bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=f"a file is {words}"):
        decode_text(data, "a file")


@pytest.mark.parametrize("order", ["", "-le", "-be"])
@pytest.mark.parametrize("name", ["UTF-16", "UTF-32"])
def test_text_in_a_wide_encoding_is_refused_by_its_name(name: str, order: str) -> None:
    with pytest.raises(ConfigError, match=f"a file is in {name}, expected UTF-8; save it as UTF-8"):
        decode_text('{"a": 1}'.encode(name + order), "a file")


@pytest.mark.parametrize(("data", "nul"), [(b"{}\0\0", 2), (b"\0\0\0\0", 0), (b"on\0e\n", 2)])
def test_a_nul_is_named_by_its_place(data: bytes, nul: int) -> None:
    words = f"a file is damaged: byte {nul} of {len(data)} is a NUL, as after a loss of power"
    with pytest.raises(ConfigError, match=words):
        decode_json(data, "a file")


@pytest.mark.parametrize("data", [b"", b" \n", MARK])
def test_an_empty_file_is_called_empty(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^a file is empty, expected JSON; give another$"):
        decode_json(data, "a file", remedy="give another")


def test_a_key_that_is_given_twice_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(b'{"mode": "auto", "mode": "standalone"}')
    with pytest.raises(ConfigError, match=r"agent\.json is not usable: 'mode' is given twice"):
        AgentConfig.load(tmp_path)
    (tmp_path / FLEET_FILE).write_bytes(FLEET[:-1] + b', "port": 2}')
    with pytest.raises(ConfigError, match=r"fleet\.json is not usable: 'port' is given twice"):
        FleetHome.load(tmp_path)
    (tmp_path / "triggers.json").write_bytes(b'[{"name": "a", "name": "b"}]')
    with pytest.raises(ConfigError, match=r"triggers\.json is not usable: 'name' is given twice"):
        _parse_pair(f"triggers=@{tmp_path / 'triggers.json'}")
    with pytest.raises(ConfigError, match="triggers is not usable: 'name' is given twice"):
        _parse_pair('triggers=[{"name": "a", "name": "b"}]')


def test_a_folder_in_place_of_a_file_is_called_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}: it is a folder, expected a file; make it"):
        read_json(tmp_path, Any, "make it")


def test_the_owner_of_a_file_that_this_user_may_not_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    path = tmp_path / MANIFEST_FILE
    path.touch()
    monkeypatch.setattr(Path, "open", refuse)
    owner = user_name(path.stat().st_uid)
    words = (
        rf"{path}: Permission denied for the user {user_name()}; "
        rf"run this as its owner \(sudo -u {owner}\)"
    )
    with pytest.raises(ConfigError, match=f"{words}, or change its rights$"):
        read_json(path, Any, "make it")
    with pytest.raises(BundleError, match=f"{words}, or change its rights$"):
        read_manifest(tmp_path)


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


def test_a_file_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.utils.text_files.MAX_BYTES", 1000)
    with pytest.raises(ConfigError, match="/dev/zero has more than 1,000 bytes, expected fewer"):
        read_json(Path("/dev/zero"), dict, "give a file of JSON")
