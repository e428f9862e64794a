"""The address of a fleet: its broker and its service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fleet.identity.identity import IdentityConfig
from fleet.protocol.access import Role


@dataclass(frozen=True, kw_only=True)
class FleetAddress:
    """The broker's `host` and `port`; `server` is the base URL of the service, if there is one.

    `bundle` is the folder of the model that devices and workers serve; `shared_subscriptions` is
    true if the broker supports them.
    """

    host: str
    port: int
    server: str | None = None
    bundle: Path | None = None
    shared_subscriptions: bool = False

    def identity_config(self, name: str, role: Role) -> IdentityConfig:
        """Return the content of `identity.json`; only devices and workers serve a bundle."""
        bundle = None
        if self.bundle and role in (Role.DEVICE, Role.WORKER):
            bundle = str(self.bundle.resolve())
        return IdentityConfig(
            name=name,
            role=role,
            host=self.host,
            port=self.port,
            bundle=bundle,
            shared_subscriptions=self.shared_subscriptions,
            server=self.server,
        )


def base_url(host: str, port: int) -> str:
    """Return ``https://HOST:PORT``, with an IPv6 address in brackets."""
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
