"""Checks of `fleet doctor`: registry, authority, clock, certificates, broker, bundle, disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from fleet.bundles.manifest import Bundle
from fleet.errors import FleetError
from fleet.operator_api.audit_operations import Check
from fleet.protocol.types import DAY_S
from fleet.server.home import FleetHome
from fleet.server.host_checks import (
    check_broker_limits,
    check_descriptors,
    check_units,
    is_renewed,
)
from fleet.server.shared_identities import SHARED_IDENTITY, WINDOW_S
from fleet.transport.mqtt import MqttTransport
from fleet.utils.host_address import host_port
from fleet.utils.printable import count
from provisioning.authority_rotation import not_renewed

RENEWAL_DAYS: Final = 30  # a certificate of 90 days is renewed at two thirds of its life
CA_DAYS: Final = 365
SKEW_S: Final = 300.0
GB: Final = 1 << 30
MIN_FREE_BYTES: Final = GB
MAX_NAMES: Final = 5
CONNECT_S: Final = 5.0


CheckResult = tuple[str, str]
"""The finding, and the problem or ""."""


def check_fleet(folder: Path) -> tuple[Check, ...]:
    """Run all checks on the fleet in `folder`; a check that fails is a problem of its own."""
    return tuple(run_checks(FleetHome.load(folder)))


def run_checks(home: FleetHome) -> Iterator[Check]:
    """Run all checks on a fleet, one after the other."""
    checks: dict[str, Callable[[FleetHome], CheckResult]] = {
        "registry": _check_registry,
        "authority": _check_authority,
        "clock": _check_clock,
        "certificates": _check_certificates,
        "identities": _check_identities,
        "broker": _check_broker,
        "broker limits": check_broker_limits,
        "descriptors": check_descriptors,
        "units": check_units,
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
    workers_online = count(num_workers, "worker")
    finding = f"{count(len(devices), 'device')}, {num_devices} online; {workers_online} online"
    problem = "no worker is online, so devices are alone; see 'fleet up'"
    # A bundle whose devices hold the whole model has no folder of that name.
    needs_worker = num_devices > 0 and (Path(home.config.bundle) / "cloud").is_dir()
    return finding, problem if needs_worker and not num_workers else ""


def _check_authority(home: FleetHome) -> CheckResult:
    authority = home.authority()
    days = (authority.not_after - time.time()) / DAY_S
    finding = f"ends in {days:.0f} days"
    if authority.successor:
        with home.registry() as registry:
            left = not_renewed(authority, registry.identities.newest_certificates())
        waiting = count(len(left), "identity", "identities")
        return (
            f"{finding}; it has a successor; not renewed yet: {waiting}",
            "" if left else "every identity is renewed; run: fleet authority retire",
        )
    problem = f"the authority {finding}; replace it with 'fleet authority rotate'"
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
        identities = [row for row in registry.identities.all() if row.not_after]
    end = time.time() + RENEWAL_DAYS * DAY_S
    due = sorted((row for row in identities if row.not_after < end), key=lambda row: row.not_after)
    by_hand = [row.name for row in identities if not is_renewed(home, row)]
    note = f"; no process renews {_first(by_hand)}" if by_hand else ""
    if not due:
        number = count(len(identities), "identity", "identities")
        return f"{number}, none ends within {RENEWAL_DAYS} days{note}", ""
    names = [row.name for row in due]
    renewing = [name for name in names if name not in by_hand]
    advice = []
    if renewing:
        advice.append(f"start {_first(renewing)} to renew")
    if len(renewing) < len(names):
        others = [name for name in names if name in by_hand]
        advice.append(f"enrol {_first(others)} again with 'fleet enroll NAME --force --out DIR'")
    return (
        f"{len(due)} of {len(identities)} end within {RENEWAL_DAYS} days{note}",
        f"not renewed: {_first(names)}; {', and '.join(advice)}",
    )


def _check_identities(home: FleetHome) -> CheckResult:
    since = time.time() - WINDOW_S
    with home.registry() as registry:
        entries = registry.audit_log.entries(since=since, action=SHARED_IDENTITY)
    names = sorted({entry.subject for entry in entries})
    if not names:
        return "each in use by one process", ""
    return (
        f"{len(names)} in use by two processes",
        f"two processes use the identity of {_first(names)} and disconnect each other; stop one "
        "of them, or enrol the second machine under a name of its own",
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")


def _check_broker(home: FleetHome) -> CheckResult:
    with home.operator() as identity:
        MqttTransport.connect(identity, timeout_s=CONNECT_S).close()
    return f"reachable on {host_port(home.config.host, home.config.port)}", ""


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
