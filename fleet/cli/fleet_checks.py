"""Checks of `fleet doctor`: registry, authority, clock, certificates, broker, bundle, disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from fleet.bundles.manifest import Bundle
from fleet.errors import FleetError
from fleet.protocol.types import DAY_S
from fleet.server.home import FleetHome
from fleet.transport.mqtt import MqttTransport

RENEWAL_DAYS: Final = 30  # a certificate of 90 days is renewed at two thirds of its life
CA_DAYS: Final = 365
SKEW_S: Final = 300.0
GB: Final = 1 << 30
MIN_FREE_BYTES: Final = GB
MAX_NAMES: Final = 5
CONNECT_S: Final = 5.0


class Check(Struct, frozen=True):
    """A check and its finding; `problem` has the fault and its remedy, "" without one."""

    name: str
    found: str
    problem: str = ""


CheckResult = tuple[str, str]
"""The finding, and the problem or ""."""


def check_fleet(folder: Path) -> tuple[Check, ...]:
    """Run all checks on the fleet in `folder`; a check that fails is a problem of its own."""
    return tuple(_run_checks(FleetHome.load(folder)))


def _run_checks(home: FleetHome) -> Iterator[Check]:
    checks: dict[str, Callable[[FleetHome], CheckResult]] = {
        "registry": _check_registry,
        "authority": _check_authority,
        "clock": _check_clock,
        "certificates": _check_certificates,
        "broker": _check_broker,
        "bundle": _check_bundle,
        "configuration": _check_configuration,
        "disk": _check_disk,
    }
    for name, check in checks.items():
        try:
            yield Check(name, *check(home))
        except FleetError as error:
            yield Check(name, "cannot be used", str(error))


def _check_registry(home: FleetHome) -> CheckResult:
    with home.registry() as registry:
        devices = registry.stats.devices()
        workers = registry.stats.workers()
    num_devices = sum(device.online for device in devices)
    num_workers = sum(worker.online for worker in workers)
    finding = f"{len(devices)} devices, {num_devices} online; {num_workers} workers online"
    problem = "no worker is online, so devices are alone; see 'fleet up'"
    return finding, problem if num_devices and not num_workers else ""


def _check_authority(home: FleetHome) -> CheckResult:
    days = (home.authority().not_after - time.time()) / DAY_S
    finding = f"ends in {days:.0f} days"
    problem = (
        f"the authority {finding}; make a new fleet and enrol every identity again before that"
    )
    return finding, problem if days < CA_DAYS else ""


def _check_clock(home: FleetHome) -> CheckResult:
    """Compare this machine's clock with the newest time in the registry."""
    with home.registry() as registry:
        times = [row.at for row in registry.audit_log.entries(limit=1)]
        times += [device.last_seen or 0.0 for device in registry.stats.devices()]
    behind_s = max(times, default=0.0) - time.time()
    if behind_s <= SKEW_S:
        return "not behind the registry", ""
    return (
        f"{behind_s:.0f} s behind the registry",
        "this machine's clock is behind; set it, or no client can connect",
    )


def _check_certificates(home: FleetHome) -> CheckResult:
    with home.registry() as registry:
        identities = registry.identities.all()
    end = time.time() + RENEWAL_DAYS * DAY_S
    due = sorted((row.not_after, row.name) for row in identities if 0 < row.not_after < end)
    if not due:
        return f"{len(identities)} identities, none ends within {RENEWAL_DAYS} days", ""
    return (
        f"{len(due)} of {len(identities)} end within {RENEWAL_DAYS} days",
        f"not renewed: {_first([name for _, name in due])}; start the devices so that they renew, "
        "or enrol them again with 'fleet enroll'",
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")


def _check_broker(home: FleetHome) -> CheckResult:
    with home.operator() as identity:
        MqttTransport.connect(identity, timeout_s=CONNECT_S).close()
    return f"reachable on {home.config.host}:{home.config.port}", ""


def _check_bundle(home: FleetHome) -> CheckResult:
    manifest = Bundle.load(Path(home.config.bundle)).manifest
    with home.registry() as registry:
        workers = [row for row in registry.stats.workers() if row.online]
        devices = [row for row in registry.stats.devices() if row.online]
    served = {bundle_id for row in workers for bundle_id in row.bundle_ids}
    alone = [row.device for row in devices if row.bundle_id not in served]
    finding = f"{manifest.model.name}, {manifest.bundle_id}, every file as in its manifest"
    if not alone or not served:
        return finding, ""
    return (
        finding,
        f"no worker serves the bundle of {_first(alone)}; start one with it, "
        "or set their bundle with 'fleet config'",
    )


def _check_configuration(home: FleetHome) -> CheckResult:
    with home.registry() as registry:
        desired = registry.desired_state.configs()
        rows = [row for row in registry.stats.devices() if row.online and row.device in desired]
    num_following = sum(
        row.config_version == desired[row.device].version and not row.config_error for row in rows
    )
    finding = f"{num_following} of {len(rows)} online devices follow"
    return finding, "see 'fleet config diff' for the others" if num_following < len(rows) else ""


def _check_disk(home: FleetHome) -> CheckResult:
    free_bytes = shutil.disk_usage(home.folder).free
    finding = f"{free_bytes / GB:.1f} GB free for {home.folder}"
    problem = "less than 1 GB is free; make room before the registry cannot write"
    return finding, problem if free_bytes < MIN_FREE_BYTES else ""
