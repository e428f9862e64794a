"""The options of the fleet's HTTP API."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fleet.errors import ConfigError
from fleet.http_api.api_address import ApiAddress
from fleet.utils.paths import absolute_path


@dataclass(frozen=True, kw_only=True)
class ApiOptions:
    """The address of the API, and the files of a certificate that its clients trust.

    Without files the API has no TLS if only this machine can connect, else the certificate of the
    fleet's own authority.
    """

    address: ApiAddress
    cert_file: Path | None = None
    key_file: Path | None = None

    @classmethod
    def of(cls, address: str | None, cert: Path | None, key: Path | None) -> ApiOptions | None:
        """Return the options of a command, with absolute paths; None without an address.

        Raises:
            ConfigError: the address is none, or an option is missing.
        """
        if (cert is None) != (key is None) or (cert and address is None):
            raise ConfigError("--api, --api-cert and --api-cert-key: one of them is missing")
        if address is None:
            return None
        return cls(
            address=ApiAddress.parse(address),
            cert_file=cert and absolute_path(cert),
            key_file=key and absolute_path(key),
        )

    @property
    def files(self) -> list[Path]:
        """The files that the server reads."""
        return [file for file in (self.cert_file, self.key_file) if file]

    def arguments(self) -> list[str]:
        """Return the options as a command line."""
        arguments = ["--api", str(self.address)]
        if self.cert_file and self.key_file:
            arguments += ["--api-cert", str(self.cert_file), "--api-cert-key", str(self.key_file)]
        return arguments
