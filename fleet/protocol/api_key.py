"""The text of a key with which an app sends prompts over HTTP."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from typing import Final

from fleet.errors import CredentialsError

ID_BYTES: Final = 8
SECRET_BYTES: Final = 32
API_KEY: Final = re.compile(r"fleet-([0-9a-f]{16})-([0-9a-f]{64})")
KEY_ID: Final = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class ApiKey:
    """A key: its public `id`, and its `secret` of 256 random bits."""

    id: str
    secret: str = field(repr=False)

    @classmethod
    def new(cls) -> ApiKey:
        """Return a new random key."""
        return cls(secrets.token_hex(ID_BYTES), secrets.token_hex(SECRET_BYTES))

    @classmethod
    def parse(cls, text: str) -> ApiKey:
        """Parse a key. Raises CredentialsError; its message does not repeat `text`."""
        match = API_KEY.fullmatch(text.strip())
        if not match:
            raise CredentialsError(
                "that is no API key: expected fleet-<16 hex digits>-<64>, "
                "as 'fleet key create APP' prints it"
            )
        return cls(*match.groups())

    @property
    def secret_hash(self) -> str:
        """SHA-256 of the secret in hex: 256 random bits need no salt and no slow hash."""
        return hashlib.sha256(self.secret.encode()).hexdigest()

    def has_hash(self, secret_hash: str) -> bool:
        """Whether the secret has this hash, in a time that does not depend on it."""
        return hmac.compare_digest(self.secret_hash, secret_hash)

    def __str__(self) -> str:
        return f"fleet-{self.id}-{self.secret}"
