"""Files of users, as bytes, text or JSON: UTF-8 with or without a byte order mark."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from fleet.errors import ConfigError
from fleet.utils.json_text import parse_unique_json
from fleet.utils.paths import rights_remedy, user_name
from fleet.utils.text import wide_encoding
from fleet.utils.validation import JSON_ERRORS, describe_error

LFS_POINTER: Final = b"version https://git-lfs"
MAX_BYTES: Final = 1 << 28  # more than any file has that is read at once, and not /dev/zero
CONTAINERS: Final = (
    (b"\x1f\x8b", "a gzip file", "unpack it with gunzip"),
    (b"\xfd7zXZ\0", "an archive (xz)", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "an archive (zstd)", "unpack it with unzstd"),
    (b"BZh91AY&SY", "an archive (bzip2)", "unpack it with bunzip2"),
    (b"7z\xbc\xaf\x27\x1c", "an archive (7z)", "unpack it"),
    (b"PK\x03\x04", "a spreadsheet, a document or an archive (zip)", "save it as text or CSV"),
    (
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "an old spreadsheet or document",
        "save it as text or CSV",
    ),
    (b"%PDF-", "a PDF", "save it as text"),
)
"""The first bytes of files that users take for text, their kinds, and the next step."""


def check_no_pointer(path: Path) -> None:
    """Check that a file is not the pointer that a clone without Git LFS leaves in its place.

    Raises:
        ConfigError: it is one.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        _check_content(file.read(len(LFS_POINTER)), str(path))


def _check_content(data: bytes, source: str) -> None:
    if data.startswith(LFS_POINTER):
        raise ConfigError(
            f"{source} is a pointer of Git LFS, not the file; run 'git lfs pull' in its folder"
        )


def decode_text(data: bytes, source: str) -> str:
    """Decode UTF-8; a byte order mark is skipped. `source` names the data in the error.

    Raises:
        ConfigError: the data is no plain text, in another encoding, a pointer, or has a NUL.
    """
    _check_content(data, source)
    for beginning, kind, next_step in CONTAINERS:
        if data.startswith(beginning):
            raise ConfigError(f"{source} is {kind}, expected text; {next_step}")
    encoding = wide_encoding(data)
    if encoding:
        raise ConfigError(f"{source} is in {encoding}, expected UTF-8; save it as UTF-8")
    nul = data.find(b"\0")
    if nul >= 0:
        raise ConfigError(
            f"{source} is damaged: byte {nul} of {len(data)} is a NUL, as after a loss of power; "
            "restore it or write it again"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source} is not in UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from None


def read_bytes(path: Path, remedy: str) -> bytes:
    """Read a file. Raises ConfigError; `remedy` ends the line of a missing file."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(describe_read_error(path, error, remedy)) from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path} has more than {MAX_BYTES:,} bytes, expected fewer; {remedy}")
    return data


def read_text(path: Path, remedy: str) -> str:
    """Read a text file as UTF-8. Raises ConfigError; `remedy` ends the line of a missing file."""
    return decode_text(read_bytes(path, remedy), str(path))


def read_json(path: Path, type_: Any, remedy: str) -> Any:
    """Read a file of JSON as `decode_json` does. Raises ConfigError; `remedy` ends its line."""
    return decode_json(read_bytes(path, remedy), str(path), type_, remedy)


def decode_json(data: bytes, source: str, type_: Any = Any, remedy: str = "") -> Any:
    """Decode JSON in UTF-8 into a value of `type_`, which is a type of msgspec.

    Raises:
        ConfigError: the data is not JSON, not in UTF-8, has a key twice, or is no value of
            `type_`.
    """
    text = decode_text(data, source)
    next_step = f"; {remedy}" if remedy else ""
    if not text.strip():
        raise ConfigError(f"{source} is empty, expected JSON{next_step}")
    try:
        return parse_unique_json(text, type_)
    except JSON_ERRORS as error:
        reason = describe_error(error, type_)
        raise ConfigError(f"{source} is not usable: {reason}{next_step}") from None


def describe_read_error(path: Path, error: OSError, remedy: str) -> str:
    """Return the line of a file that cannot be read; `remedy` is the next step if it is missing."""
    if isinstance(error, IsADirectoryError):
        return f"cannot read {path}: it is a folder, expected a file; {remedy}"
    if isinstance(error, PermissionError):
        return (
            f"cannot read {path}: {error.strerror} for the user {user_name()}; "
            f"{rights_remedy(path)}"
        )
    return f"cannot read {path}: {error.strerror or error}; {remedy}"
