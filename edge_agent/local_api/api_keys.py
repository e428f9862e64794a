"""The keys of the HTTP API of a device."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from fleet.errors import ConfigError, CredentialsError
from fleet.http_api.api_address import ApiAddress
from fleet.utils.text_files import decode_text

MIN_KEY_LENGTH: Final = 16


class ApiKeys:
    """The keys that clients may send; without any each client is accepted."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        self._hashes = frozenset(map(_hash, keys))

    @classmethod
    def load(cls, path: Path) -> ApiKeys:
        """Load a file with one key in each line; lines that begin with ``#`` are comments.

        Raises:
            ConfigError: the file has no key, or one that is too short to be safe.
            OSError: it cannot be read.
        """
        lines = [line.strip() for line in decode_text(path.read_bytes(), str(path)).splitlines()]
        keys = tuple(line for line in lines if line and not line.startswith("#"))
        if not keys or min(map(len, keys)) < MIN_KEY_LENGTH:
            raise ConfigError(
                f"{path}: expected keys of at least {MIN_KEY_LENGTH} characters, one in each line; "
                "'openssl rand -hex 24' makes one"
            )
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def check(self, key: str | None) -> None:
        """Check the key of a client.

        Raises:
            CredentialsError: it is missing or wrong.
        """
        if self and _hash(key or "") not in self._hashes:
            raise CredentialsError(
                "expected a key of this device in the header 'Authorization: Bearer KEY', got "
                + ("another one" if key else "none")
            )


def check_exposure(address: ApiAddress, *, has_keys: bool) -> None:
    """Check that an API beyond this machine needs a key.

    Raises:
        ConfigError: it does not.
    """
    if not address.is_local and not has_keys:
        raise ConfigError(
            f"--api {address} accepts connections of other machines, which needs a key: add "
            "--api-key-file FILE with one key in each line, or listen on 127.0.0.1"
        )


def _hash(key: str) -> bytes:
    # aiohttp decodes the bytes of a header that are not in UTF-8 as surrogates.
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
