"""Configuration of a mosquitto that keeps the fleet's rules: one file of settings, one of rights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from fleet.access import Action, Grants, granted
from fleet.identity import ServerTls

CONFIG_FILE: Final = "mosquitto.conf"
ACL_FILE: Final = "acl"
MAX_PACKET_BYTES: Final = 1 << 20

CONFIG: Final = """\
# Written by cecollm-fleet. Names come from certificates; a client can take no other's id.
listener {port} {host}
cafile {tls.ca_file}
certfile {tls.cert_file}
keyfile {tls.key_file}
tls_version tlsv1.2
require_certificate true
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false
acl_file {acl}
set_tcp_nodelay true
message_size_limit {max_bytes}
max_queued_messages 10000
persistence false
log_dest stderr
log_type error
log_type warning
"""


def write_config(folder: Path, port: int, tls: ServerTls, grants: Iterable[Grants], host: str = "127.0.0.1") -> Path:
    """Writes `mosquitto.conf` and the rights of every identity into `folder`; gives the path of the former."""
    folder.mkdir(parents=True, exist_ok=True)
    acl = folder / ACL_FILE
    acl.write_text("\n".join(rule for grant in grants for rule in acl_lines(grant)) + "\n")
    acl.chmod(0o600)
    path = folder / CONFIG_FILE
    path.write_text(CONFIG.format(port=port, host=host, tls=tls, acl=acl, max_bytes=MAX_PACKET_BYTES))
    return path


def acl_lines(grants: Grants) -> list[str]:
    """The rights of one identity in mosquitto's ACL syntax."""
    lines = [f"user {grants.name}"]
    for action, word in ((Action.PUBLISH, "write"), (Action.SUBSCRIBE, "read")):
        lines += [f"topic {word} {f}" for f in granted(grants.role, grants.name, action, grants.targets)]
    return lines
