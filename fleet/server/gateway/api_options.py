"""The address and certificate of a web server of the fleet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleet.errors import ConfigError
from fleet.http_api.api_address import DEFAULT_PORT, ApiAddress
from fleet.server.home import CONSOLE_GATEWAY, GATEWAY
from fleet.utils.paths import absolute_path

CONSOLE_PORT: Final = 8885


@dataclass(frozen=True, kw_only=True)
class ApiOptions:
    """The address of a web server, and the files of a certificate that its clients trust.

    Without files it has no TLS if only this machine can connect, else the certificate of the
    fleet's own authority.
    """

    address: ApiAddress
    cert_file: Path | None = None
    key_file: Path | None = None
    option: str = "--api"

    @classmethod
    def of(
        cls,
        address: str | None,
        cert: Path | None,
        key: Path | None,
        option: str = "--api",
        default_port: int = DEFAULT_PORT,
    ) -> ApiOptions | None:
        """Return the options of a command, with absolute paths; None without an address.

        `option` is the name of the option with the address.

        Raises:
            ConfigError: the address is none, or an option is missing.
        """
        if (cert is None) != (key is None) or (cert and address is None):
            raise ConfigError(
                f"{option}, {option}-cert and {option}-cert-key: one of them is missing"
            )
        if address is None:
            return None
        return cls(
            address=ApiAddress.parse(address, option, default_port),
            cert_file=cert and absolute_path(cert),
            key_file=key and absolute_path(key),
            option=option,
        )

    @classmethod
    def of_console(
        cls, address: str | None, cert: Path | None, key: Path | None
    ) -> ApiOptions | None:
        """Return the options of the console, as `of` does."""
        return cls.of(address, cert, key, "--console", CONSOLE_PORT)

    @property
    def gateway(self) -> str:
        """The name of the identity that sends this server's prompts."""
        return GATEWAY if self.option == "--api" else CONSOLE_GATEWAY

    @property
    def files(self) -> list[Path]:
        """The files that the server reads."""
        return [file for file in (self.cert_file, self.key_file) if file]

    def arguments(self) -> list[str]:
        """Return the options as a command line."""
        name = self.option
        arguments = [name, str(self.address)]
        if self.cert_file and self.key_file:
            arguments += [f"{name}-cert", str(self.cert_file), f"{name}-cert-key"]
            arguments.append(str(self.key_file))
        return arguments
