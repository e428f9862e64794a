"""A mosquitto for a fleet: its files, its process, and the sync with the registry."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cloud_broker_worker.broker import mosquitto_reload
from cloud_broker_worker.broker.mosquitto import (
    CONFIG_FILE,
    CRL_FILE,
    PID_FILE,
    check_own_folder,
    find_mosquitto,
    write_config,
)
from cloud_broker_worker.broker.mosquitto_sync import MosquittoSync
from fleet.errors import ConfigError
from fleet.server.child_process import Child
from fleet.server.home import MOSQUITTO, FleetHome
from fleet.utils.file_limit import raise_file_limit
from provisioning.authority import LEAF_DAYS, CertificateAuthority
from provisioning.crl import CRL_DAYS, CrlFile
from provisioning.session_takeover import SessionTakeover

if TYPE_CHECKING:
    from fleet.registry.store import Registry

README: Final = """\
A mosquitto for the fleet in {home}, on port {port}. Start it:

    {start}

or by the units of 'fleet systemd --broker mosquitto'. It needs mosquitto 2.0.11 or later, and runs
as the user who wrote these files.

A fleet server can keep these files in step with the registry:

    fleet server --no-broker --mosquitto {folder}

(with --reload 'systemctl reload NAME' if it may not send signals to mosquitto). Without it, run
this after every enrol, suspend, resume and revoke, and at least once in {crl_days} days, since
mosquitto refuses every client when the revocation list has expired:

    fleet broker config --out {folder} && kill -HUP "$(cat {pid_file})"

A connection that is open then stays open, without rights if its name was revoked. The broker's
certificate is valid for {leaf_days} days; the same command issues a new one.
"""


def write_mosquitto(
    home: FleetHome,
    registry: Registry,
    folder: Path,
    host: str | None = None,
    port: int | None = None,
) -> Path:
    """Write every file of a mosquitto for `home` into `folder`; return its configuration file.

    Raises:
        ConfigError: the folder cannot be written, or has files of another mosquitto.
        IdentityError: there is no certificate authority.
    """
    check_own_folder(folder)
    port = port or home.config.port
    authority = home.authority()
    path = write_config(
        folder,
        port,
        home.server_tls(folder),
        registry.identities.all_grants(),
        host or home.config.host,
        has_crl=True,
    )
    crl = CrlFile(folder / CRL_FILE, authority)
    crl.update(registry.identities.revoked_certificates(), time.time())
    _write_readme(home, folder, path, port)
    return path


def _write_readme(home: FleetHome, folder: Path, config: Path, port: int) -> None:
    readme = README.format(
        home=home.folder,
        port=port,
        start=shlex.join(["mosquitto", "-c", str(config)]),
        folder=shlex.quote(str(folder)),
        pid_file=shlex.quote(str(folder / PID_FILE)),
        crl_days=CRL_DAYS,
        leaf_days=LEAF_DAYS,
    )
    (folder / "README").write_text(readme, encoding="utf-8")


def start_mosquitto(home: FleetHome, folder: Path, listen: str | None = None) -> Child:
    """Start a mosquitto for `home` with its files in `folder`; it listens on return.

    It listens on the address `listen`, by default on the fleet's host.

    Raises:
        ConfigError: mosquitto is not installed, or the folder cannot be written.
        FleetError: mosquitto did not start.
    """
    program = find_mosquitto()
    raise_file_limit()  # mosquitto inherits the limit
    with home.registry() as registry:
        path = write_mosquitto(home, registry, folder, listen)
    process = Child(MOSQUITTO, ("-c", str(path)), (program,))
    try:
        process.wait_listening(listen or home.config.host, home.config.port)
    except BaseException:
        process.stop()
        raise
    return process


def reload_by(folder: Path, command: str | None) -> Callable[[], None]:
    """Return the function that reloads the mosquitto of `folder`, by `command` or by SIGHUP."""
    if command:
        return mosquitto_reload.reload_by_command(command)
    return mosquitto_reload.reload_by_signal(folder / PID_FILE)


def make_sync(
    home: FleetHome,
    registry: Registry,
    folder: Path,
    reload: Callable[[], None],
    authority: CertificateAuthority,
) -> MosquittoSync:
    """Make the task that keeps the files in `folder` equal to the registry.

    Raises:
        ConfigError: the folder has no files of `write_mosquitto`.
    """
    if not (folder / CONFIG_FILE).exists():
        raise ConfigError(
            f"no {CONFIG_FILE} in {folder}; make it: "
            + shlex.join(["fleet", "broker", "config", "--out", str(folder)])
        )
    crl = CrlFile(folder / CRL_FILE, authority)
    takeover = SessionTakeover(authority, home.config.host, home.config.port)
    return MosquittoSync(folder, registry, crl, reload, takeover)
