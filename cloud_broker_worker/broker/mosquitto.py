"""The configuration of a mosquitto: a file of settings, a file of rights, a revocation list."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from fleet.errors import ConfigError
from fleet.identity.identity import ServerTls
from fleet.protocol.access import Action, Grants
from fleet.transport.base import MAX_IN_FLIGHT, MAX_PACKET_BYTES
from fleet.utils.atomic_files import write_file
from fleet.utils.paths import user_name

CONFIG_FILE: Final = "mosquitto.conf"
ACL_FILE: Final = "acl"
CRL_FILE: Final = "crl.pem"
PID_FILE: Final = "mosquitto.pid"
MAX_QUEUED: Final = 50_000  # messages that wait for one client, also limited in bytes
MAX_QUEUED_BYTES: Final = 8 << 20  # messages that wait for one client
MAX_MEMORY_BYTES: Final = 256 << 20  # heap of the whole broker; 1,000 devices need 44 MB
MAX_CONNECTIONS: Final = 10_000

OWN_LINE: Final = "use_username_as_clientid true\n"  # of every file that we have written

# Names come from certificates, and no client can use another's id. The CA and the revocation list
# alone decide on a connection; a name without rights can do nothing. Each identity has one
# connection: a second one ends the first.
CONFIG: Final = """\
# Written by 'fleet broker config', which replaces this file.
listener {port} {host}
max_connections {max_connections}
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
max_queued_bytes {max_queued_bytes}
memory_limit {max_memory_bytes}
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
    """Write `mosquitto.conf` and the rights of every identity into `folder`.

    A running mosquitto reads new rights on SIGHUP. With `has_crl` it also reads a new `crl.pem`,
    which must exist when it starts, and writes its process id to `mosquitto.pid`.

    Return the path of `mosquitto.conf`.

    Raises:
        ConfigError: the folder cannot be written, or has files of another mosquitto.
    """
    path = folder / CONFIG_FILE
    acl = folder / ACL_FILE
    settings = _settings_text(folder, host, port, tls)
    if has_crl:
        crl = (folder / CRL_FILE).resolve()
        settings += f"crlfile {crl}\npid_file {(folder / PID_FILE).resolve()}\n"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_own_folder(folder)
        write_file(path, settings.encode())
        write_file(acl, acl_text(grants).encode())
    except OSError as error:
        raise ConfigError(
            f"cannot write {CONFIG_FILE} into {folder}: {error.strerror}; choose another folder"
        ) from None
    return path


def check_own_folder(folder: Path) -> None:
    """Raise ConfigError if `write_config` would replace a file that it has not written."""
    path = folder / CONFIG_FILE
    if path.exists():
        is_own = OWN_LINE in path.read_text(encoding="utf-8", errors="replace")
    else:
        is_own = not (folder / ACL_FILE).exists()
    if not is_own:
        raise ConfigError(
            f"{folder} has {CONFIG_FILE} or {ACL_FILE} of another mosquitto, expected a new folder "
            "or the fleet's own; name another folder with --out"
        )


def _settings_text(folder: Path, host: str, port: int, tls: ServerTls) -> str:
    return CONFIG.format(
        port=port,
        host=host,
        user=user_name(),
        ca=tls.ca_file.resolve(),
        certificate=tls.cert_file.resolve(),
        key=tls.key_file.resolve(),
        acl=(folder / ACL_FILE).resolve(),
        max_packet_bytes=MAX_PACKET_BYTES,
        max_in_flight=MAX_IN_FLIGHT,
        max_queued=MAX_QUEUED,
        max_queued_bytes=MAX_QUEUED_BYTES,
        max_memory_bytes=MAX_MEMORY_BYTES,
        max_connections=MAX_CONNECTIONS,
    )


def acl_text(grants: Iterable[Grants]) -> str:
    """Return the content of mosquitto's ACL file."""
    return "".join(f"{rule}\n" for grant in grants for rule in acl_rules(grant))


def acl_rules(grants: Grants) -> list[str]:
    """Return the rights of one identity as lines of mosquitto's ACL file."""
    rules = [f"user {grants.name}"]
    for action, access in ((Action.PUBLISH, "write"), (Action.SUBSCRIBE, "read")):
        rules += [f"topic {access} {topic_filter}" for topic_filter in grants.filters[action]]
    return rules


def find_mosquitto(folders: str | None = None) -> str:
    """Return the path of the program.

    It is searched for in `folders`, separated by colons, or on the path and in Debian's folders.

    Raises:
        ConfigError: it is not installed.
    """
    path = shutil.which(
        "mosquitto",
        path=folders or f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin",
    )
    if path is None:
        raise ConfigError(
            "mosquitto is not installed; on Debian and Ubuntu: apt-get install mosquitto, "
            "or start without --broker"
        )
    return path
