"""What `fleet doctor` looks at in a fleet: registry, authority, clock, certificates, broker, bundles, disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct

from fleet.bundles.manifest import Bundle
from fleet.errors import FleetError
from fleet.server.home import FleetHome
from fleet.utils.optional_imports import load

DAY_S: Final = 86_400.0
RENEWAL_DAYS: Final = (
    30  # certificates of 90 days that were not renewed at two thirds of their life
)
CA_DAYS: Final = 365
SKEW_S: Final = 300.0
MIN_FREE_BYTES: Final = 1 << 30
MAX_NAMES: Final = 5
CONNECT_S: Final = 5.0


class Check(Struct, frozen=True):
    """One thing that was looked at, and what was found; `problem` says what is wrong and what to do, "" is fine."""

    name: str
    found: str
    problem: str = ""


Finding = tuple[str, str]
"""What was found, and the problem or ""."""


def check_fleet(folder: Path) -> tuple[Check, ...]:
    """Looks at the fleet in `folder`; a part that cannot be looked at is a problem of its own, and stops no other."""
    state = FleetHome.load(folder)
    return tuple(_checks(state))


def _checks(state: FleetHome) -> Iterator[Check]:
    looks: tuple[tuple[str, Callable[[FleetHome], Finding]], ...] = (
        ("registry", _registry),
        ("authority", _authority),
        ("clock", _clock),
        ("certificates", _certificates),
        ("broker", _broker),
        ("bundle", _bundle),
        ("configuration", _configuration),
        ("disk", _disk),
    )
    for name, look in looks:
        try:
            yield Check(name, *look(state))
        except FleetError as error:
            yield Check(name, "cannot be used", str(error))


def _registry(state: FleetHome) -> Finding:
    with state.registry() as registry:
        devices = registry.devices()
        workers = registry.workers()
    online = sum(device.online for device in devices), sum(worker.online for worker in workers)
    found = f"{len(devices)} devices, {online[0]} online; {online[1]} workers online"
    return found, "" if online[1] or not online[
        0
    ] else "no worker is online, so devices are alone; see 'fleet up'"


def _authority(state: FleetHome) -> Finding:
    authority = load("provisioning.authority").CertificateAuthority.load(state.folder / "ca")
    days = (authority.not_after - time.time()) / DAY_S
    problem = f"the authority ends in {days:.0f} days; make a new fleet and enrol everybody anew before that"
    return f"ends in {days:.0f} days", problem if days < CA_DAYS else ""


def _clock(state: FleetHome) -> Finding:
    """The registry was written by clocks, too: nothing in it can be from the future."""
    with state.registry() as registry:
        newest = max((row.at for row in registry.audit_log(limit=1)), default=0.0)
        newest = max([newest, *(device.last_seen or 0.0 for device in registry.devices())])
    behind = newest - time.time()
    if behind <= SKEW_S:
        return "not behind the registry", ""
    return (
        f"{behind:.0f} s behind the registry",
        "this machine's clock is behind; set it, or nobody can connect",
    )


def _certificates(state: FleetHome) -> Finding:
    with state.registry() as registry:
        identities = registry.identities()
    soon = sorted(
        (row.not_after, row.name)
        for row in identities
        if 0 < row.not_after < time.time() + RENEWAL_DAYS * DAY_S
    )
    if not soon:
        return f"{len(identities)} identities, none ends within {RENEWAL_DAYS} days", ""
    names = ", ".join(name for _, name in soon[:MAX_NAMES]) + (
        ", ..." if len(soon) > MAX_NAMES else ""
    )
    return (
        f"{len(soon)} of {len(identities)} end within {RENEWAL_DAYS} days",
        f"not renewed: {names}; start the devices so that they renew, or enrol them again with 'fleet enroll'",
    )


def _broker(state: FleetHome) -> Finding:
    where = f"{state.config.host}:{state.config.port}"
    with state.operator() as identity:
        load("fleet.transport.mqtt").MqttTransport.connect(identity, timeout_s=CONNECT_S).close()
    return f"answers on {where}", ""


def _bundle(state: FleetHome) -> Finding:
    bundle = Bundle.load(Path(state.config.bundle))
    with state.registry() as registry:
        served = {
            bundle_id for row in registry.workers() if row.online for bundle_id in row.bundle_ids
        }
        lonely = [
            row.device for row in registry.devices() if row.online and row.bundle_id not in served
        ]
    found = (
        f"{bundle.manifest.model.name}, {bundle.manifest.bundle_id}, every file as in its manifest"
    )
    if not lonely or not served:
        return found, ""
    names = ", ".join(lonely[:MAX_NAMES])
    return (
        found,
        f"no worker serves the bundle of {names}; start one with it, or set their bundle with 'fleet config'",
    )


def _configuration(state: FleetHome) -> Finding:
    with state.registry() as registry:
        wanted = registry.desired_configs()
        rows = [row for row in registry.devices() if row.online and row.device in wanted]
    behind = [
        row.device
        for row in rows
        if row.config_version != wanted[row.device].version or row.config_error
    ]
    found = f"{len(rows) - len(behind)} of {len(rows)} online devices follow"
    return found, "see 'fleet config diff' for the others" if behind else ""


def _disk(state: FleetHome) -> Finding:
    free = shutil.disk_usage(state.folder).free
    found = f"{free / (1 << 30):.1f} GB free for {state.folder}"
    return (
        found,
        ""
        if free >= MIN_FREE_BYTES
        else "less than 1 GB is free; make room before the registry cannot write",
    )
