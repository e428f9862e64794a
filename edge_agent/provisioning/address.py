"""Another address of the fleet's server for an identity folder."""

from __future__ import annotations

import msgspec
import urllib3

from fleet.errors import ConfigError, IdentityError
from fleet.identity.identity import Identity, IdentityConfig
from fleet.identity.service_client import check_url
from fleet.utils.host_address import check_host, check_reachable


def change_address(
    identity: Identity, host: str, port: int | None = None, server: str | None = None
) -> Identity:
    """Write the broker's new `host` and `port`, and the service's new URL, into `identity.json`.

    The port stays if none is given. Without `server` the service moves to `host`, if it was on the
    broker's host; else it stays.

    Raises:
        ConfigError: the new address is not usable.
        IdentityError: the file cannot be written.
    """
    config = identity.config
    check_reachable(host)
    try:
        check_host(host)
        changes = {
            **msgspec.to_builtins(config),
            "host": host,
            "port": port or config.port,
            "server": check_url(server) if server else _moved_service(config, host),
        }
        changed = Identity(identity.folder, msgspec.convert(changes, IdentityConfig))
        changed.save()
    except (ValueError, msgspec.ValidationError) as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise IdentityError(
            f"cannot write into {identity.folder}: {error.strerror}; check the folder's rights"
        ) from None
    return changed


def _moved_service(config: IdentityConfig, host: str) -> str | None:
    if config.server is None:
        return None
    parsed = urllib3.util.parse_url(config.server)
    if (parsed.host or "").strip("[]") != config.host:
        return config.server
    bracketed = f"[{host}]" if ":" in host else host
    return check_url(
        f"https://{bracketed}:{parsed.port}" if parsed.port else f"https://{bracketed}"
    )
