"""The keys of a device's API, and the addresses that need one."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.local_api.api_keys import ApiKeys, check_exposure
from fleet.errors import ConfigError, CredentialsError
from fleet.http_api.api_address import ApiAddress

FIRST = "0123456789abcdef"
SECOND = "fedcba9876543210"


def keys(tmp_path: Path, text: str) -> ApiKeys:
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    return ApiKeys.load(path)


def test_each_key_of_a_file_is_accepted(tmp_path: Path) -> None:
    loaded = keys(tmp_path, f"# of the phone\n{FIRST}\n\n  {SECOND}  \n")
    loaded.check(FIRST)
    loaded.check(SECOND)
    for wrong in (None, "", FIRST[:-1], "# of the phone"):
        with pytest.raises(CredentialsError, match="Authorization: Bearer KEY"):
            loaded.check(wrong)


def test_without_keys_each_client_is_accepted() -> None:
    ApiKeys().check(None)
    ApiKeys().check("anything")


@pytest.mark.parametrize("text", ["", "# nothing\n", f"{FIRST}\nshort\n"])
def test_a_file_without_a_key_or_with_a_short_one_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 16 characters"):
        keys(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "address", "is_local"),
    [
        ("127.0.0.1:11434", ("127.0.0.1", 11434), True),
        ("127.0.0.1", ("127.0.0.1", 11434), True),
        ("127.8.8.8:1", ("127.8.8.8", 1), True),
        ("localhost:80", ("localhost", 80), True),
        ("[::1]:80", ("::1", 80), True),
        ("0.0.0.0:80", ("0.0.0.0", 80), False),
        ("[::]:80", ("::", 80), False),
        ("192.0.2.5:80", ("192.0.2.5", 80), False),
        ("kitchen.local:80", ("kitchen.local", 80), False),
    ],
)
def test_an_address_beyond_this_machine_needs_a_key(
    text: str, address: tuple[str, int], is_local: bool
) -> None:
    parsed = ApiAddress.parse(text)
    assert (parsed.host, parsed.port) == address
    assert parsed.is_local == is_local
    assert (parsed.request_hosts is not None) == is_local
    check_exposure(parsed, has_keys=True)
    if is_local:
        check_exposure(parsed, has_keys=False)
    else:
        with pytest.raises(ConfigError, match="--api-key-file"):
            check_exposure(parsed, has_keys=False)


@pytest.mark.parametrize(
    "text", ["", ":80", "::1:80", "host:x", "host:99999", "http://host:80", "8080", "8080:80"]
)
def test_a_text_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        ApiAddress.parse(text)
