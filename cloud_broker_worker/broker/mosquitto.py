"""Configuration of a mosquitto that keeps the fleet's rules: one file of settings, one of rights, a revocation list."""

from __future__ import annotations

import getpass
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from fleet.errors import ConfigError
from fleet.identity.identity import ServerTls
from fleet.protocol.access import Action, Grants

CONFIG_FILE: Final = "mosquitto.conf"
ACL_FILE: Final = "acl"
CRL_FILE: Final = "crl.pem"
PID_FILE: Final = "mosquitto.pid"
MAX_PACKET_BYTES: Final = 1 << 20
MAX_IN_FLIGHT: Final = 100
MAX_QUEUED: Final = 10_000

# Names come from certificates, and no client can take another's id. Who may connect is decided by the CA alone,
# and the revocation list; a name without rights below can do nothing. Each identity has one connection: a second one
# ends the first.
CONFIG: Final = """\
listener {port} {host}
user {user}
cafile {ca}
certfile {certificate}
keyfile {key}
tls_version tlsv1.2
require_certificate true
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false
acl_file {acl}
max_qos 1
set_tcp_nodelay true
max_packet_size {max_packet_bytes}
max_inflight_messages {max_in_flight}
max_queued_messages {max_queued}
persistence false
log_dest stderr
log_type error
log_type warning
"""


def write_config(
    folder: Path,
    port: int,
    tls: ServerTls,
    grants: Iterable[Grants],
    host: str = "127.0.0.1",
    *,
    has_crl: bool = False,
) -> Path:
    """Writes `mosquitto.conf` and the rights of every identity into `folder`; gives the path of the former.

    A running mosquitto takes new rights on SIGHUP, and with `has_crl` a new `crl.pem`, which must be there when it
    starts; then it also writes its process id to `mosquitto.pid`.

    Raises:
        ConfigError: the folder cannot be written.
    """
    path = folder / CONFIG_FILE
    acl = folder / ACL_FILE
    settings = CONFIG.format(
        port=port,
        host=host,
        user=getpass.getuser(),
        ca=tls.ca_file.resolve(),
        certificate=tls.cert_file.resolve(),
        key=tls.key_file.resolve(),
        acl=acl.resolve(),
        max_packet_bytes=MAX_PACKET_BYTES,
        max_in_flight=MAX_IN_FLIGHT,
        max_queued=MAX_QUEUED,
    )
    if has_crl:
        settings += (
            f"crlfile {(folder / CRL_FILE).resolve()}\npid_file {(folder / PID_FILE).resolve()}\n"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        acl.touch(mode=0o600)
        acl.write_text(acl_text(grants))
        path.write_text(settings)
    except OSError as error:
        raise ConfigError(
            f"cannot write {CONFIG_FILE} into {folder}: {error.strerror}; choose another folder"
        ) from None
    return path


def acl_text(grants: Iterable[Grants]) -> str:
    """What stands in mosquitto's ACL file."""
    return "".join(f"{rule}\n" for grant in grants for rule in acl_rules(grant))


def acl_rules(grants: Grants) -> list[str]:
    """The rights of one identity as lines of mosquitto's ACL file."""
    rules = [f"user {grants.name}"]
    for action, word in ((Action.PUBLISH, "write"), (Action.SUBSCRIBE, "read")):
        rules += [f"topic {word} {topic_filter}" for topic_filter in grants.filters[action]]
    return rules


def find_mosquitto(folders: str | None = None) -> str:
    """Path of the program: in `folders`, separated by colons, or where the shell and Debian have theirs.

    Raises:
        ConfigError: it is not installed.
    """
    path = shutil.which(
        "mosquitto",
        path=folders or f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin",
    )
    if path is None:
        raise ConfigError(
            "mosquitto is not installed; on Debian and Ubuntu: apt-get install mosquitto, or start without --broker"
        )
    return path
