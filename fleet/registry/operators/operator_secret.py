"""The text of a secret that stands for an operator."""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from typing import Final

from fleet.errors import CredentialsError

ID_BYTES: Final = 8
SECRET_BYTES: Final = 32
KEY_PREFIX: Final = "fleet-operator-"
SECRET: Final = re.compile(r"([0-9a-f]{16})-([0-9a-f]{64})")


class OperatorSecretKind(enum.StrEnum):
    """The use of a secret."""

    LINK = "link"
    SESSION = "session"
    KEY = "key"


@dataclass(frozen=True)
class OperatorSecret:
    """A secret: its public `id`, and its `secret` of 256 random bits."""

    kind: OperatorSecretKind
    id: str
    secret: str = field(repr=False)

    @classmethod
    def new(cls, kind: OperatorSecretKind) -> OperatorSecret:
        """Return a new random secret."""
        return cls(kind, secrets.token_hex(ID_BYTES), secrets.token_hex(SECRET_BYTES))

    @classmethod
    def parse(cls, kind: OperatorSecretKind, text: str) -> OperatorSecret:
        """Parse the text of a secret. Raises CredentialsError; its message has no part of it."""
        is_key = kind is OperatorSecretKind.KEY
        match = SECRET.fullmatch(text.strip().removeprefix(KEY_PREFIX if is_key else ""))
        if not match:
            raise CredentialsError(f"that is no {kind} of an operator; copy the whole of it")
        return cls(kind, *match.groups())

    @property
    def secret_hash(self) -> str:
        """SHA-256 of the secret in hex: 256 random bits need no salt and no slow hash."""
        return hashlib.sha256(self.secret.encode()).hexdigest()

    def has_hash(self, secret_hash: str) -> bool:
        """Whether the secret has this hash, in a time that does not depend on it."""
        return hmac.compare_digest(self.secret_hash, secret_hash)

    def __str__(self) -> str:
        prefix = KEY_PREFIX if self.kind is OperatorSecretKind.KEY else ""
        return f"{prefix}{self.id}-{self.secret}"
