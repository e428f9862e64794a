"""The options of a bridge to a house's broker."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fleet.errors import ConfigError
from fleet.identity.identity import holds_pair
from fleet.server.bridge.mapped_topics import TopicMap
from fleet.utils.host_address import check_host
from fleet.utils.text_files import read_text

PLAIN_PORT: Final = 1883
TLS_PORT: Final = 8883
MAX_PASSWORD: Final = 65_535  # bytes, as MQTT has it
AUTHORITY: Final = "give the file of the authority's certificate in PEM"


@dataclass(frozen=True, kw_only=True)
class HouseAddress:
    """A broker of a house, and the credentials there.

    With `ca_file`, `cert_file` or `tls` the connection has TLS; without `ca_file` it trusts the
    authorities of this machine. The password stays in its file until a connection needs it.
    """

    host: str
    port: int | None = None
    user: str | None = None
    password_file: Path | None = None
    tls: bool = False
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def check(self) -> None:
        """Check the options, and that their files can be used. Raises ConfigError."""
        try:
            check_host(self.host)
        except ValueError as error:
            raise ConfigError(f"--{error}") from None
        if (self.user is None) != (self.password_file is None):
            raise ConfigError("--user and --password-file: one of them is missing")
        if (self.cert_file is None) != (self.key_file is None):
            raise ConfigError("--cert and --cert-key: one of them is missing")
        self.password()
        self.tls_context()

    @property
    def has_tls(self) -> bool:
        """Whether the connection has TLS."""
        return self.tls or bool(self.ca_file or self.cert_file)

    @property
    def broker_port(self) -> int:
        """The port: that of the options, or MQTT's own."""
        return self.port or (TLS_PORT if self.has_tls else PLAIN_PORT)

    @property
    def files(self) -> list[Path]:
        """The files that the bridge reads."""
        files = (self.password_file, self.ca_file, self.cert_file, self.key_file)
        return [file for file in files if file]

    def password(self) -> str | None:
        """Read the password: the first line of its file. Raises ConfigError."""
        if self.password_file is None:
            return None
        lines = read_text(self.password_file, "write the password into it").splitlines()
        password = lines[0] if lines else ""
        if not 0 < len(password.encode()) <= MAX_PASSWORD:
            raise ConfigError(f"{self.password_file}: expected a password in the first line")
        return password

    def tls_context(self) -> ssl.SSLContext | None:
        """Return the context for TLS; None without. Raises ConfigError."""
        if not self.has_tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:
            raise ConfigError(f"--ca {self.ca_file}: {error}; {AUTHORITY}") from None
        if self.cert_file and self.key_file:
            self._load_certificate(context, self.cert_file, self.key_file)
        return context

    def _load_certificate(self, context: ssl.SSLContext, certificate: Path, key: Path) -> None:
        try:
            if not holds_pair(certificate, key):
                raise ConfigError(
                    f"--cert {certificate}, --cert-key {key}: expected a certificate and its key "
                    "in PEM, without a passphrase"
                )
            context.load_cert_chain(certificate, key)
        except OSError as error:
            raise ConfigError(f"--cert {certificate}: {error}; name a file in PEM") from None

    def arguments(self) -> list[str]:
        """Return the options as a command line, which has no password."""
        values = {
            "--host": self.host,
            "--port": self.port,
            "--user": self.user,
            "--password-file": self.password_file,
            "--ca": self.ca_file,
            "--cert": self.cert_file,
            "--cert-key": self.key_file,
        }
        pairs = [(name, str(value)) for name, value in values.items() if value is not None]
        return [word for pair in pairs for word in pair] + (["--tls"] if self.tls else [])


@dataclass(frozen=True, kw_only=True)
class BridgeOptions:
    """The options of a bridge; `app` is its name in the fleet."""

    app: str
    house: HouseAddress
    topic_map: TopicMap = field(default_factory=TopicMap)

    def arguments(self) -> list[str]:
        """Return the options as a command line."""
        maps = [word for each in self.topic_map.mappings for word in ("--map", str(each))]
        return ["--app", self.app, *self.house.arguments(), *maps]
