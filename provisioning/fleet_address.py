"""Where an identity finds its fleet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fleet.identity.identity import IdentityConfig
from fleet.protocol.access import Role


@dataclass(frozen=True, kw_only=True)
class FleetAddress:
    """The broker's `host` and `port`, and the base URL of the service as `server`, where there is one.

    `bundle` is the folder of the model that devices and workers serve; `shared_subscriptions` says that the broker has
    them.
    """

    host: str
    port: int
    server: str | None = None
    bundle: Path | None = None
    shared_subscriptions: bool = False

    def identity_config(self, name: str, role: Role) -> IdentityConfig:
        """What `identity.json` says of one identity: only devices and workers serve a bundle."""
        bundle = (
            str(self.bundle.resolve())
            if self.bundle and role in (Role.DEVICE, Role.WORKER)
            else None
        )
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
    """``https://HOST:PORT``; an IPv6 address in brackets."""
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
