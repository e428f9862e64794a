"""The address on which a program serves its HTTP API."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

from fleet.errors import ConfigError
from fleet.utils.host_address import host_port

DEFAULT_PORT: Final = 11434
ADDRESS: Final = re.compile(
    r"(?:\[(?P<ipv6>[^\]]*)\]|(?P<host>[^:\[\]]+))(?::(?P<port>[0-9]{1,5}))?"
)
LOCAL_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class ApiAddress:
    """A host and a port."""

    host: str
    port: int

    @classmethod
    def parse(
        cls, text: str, option: str = "--api", default_port: int = DEFAULT_PORT
    ) -> ApiAddress:
        """Parse ``HOST:PORT`` of an option; without a port it is `default_port`.

        Raises:
            ConfigError: it is no address.
        """
        match = ADDRESS.fullmatch(text)
        port = int(match["port"] or default_port) if match else 0
        if match is None or port > 65535 or (match["host"] or "").isdecimal():
            raise ConfigError(
                f"{option} {text[:80]!r}: expected HOST:PORT, such as 127.0.0.1:{default_port} or "
                f"[::1]:{default_port}"
            )
        return cls(match["ipv6"] or match["host"], port)

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        return host_port(self.host, self.port)

    @property
    def request_hosts(self) -> frozenset[str] | None:
        """The hosts that requests may name; None for any, where other machines can connect."""
        return LOCAL_HOSTS | {self.host} if self.is_local else None
