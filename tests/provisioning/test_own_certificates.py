"""Renewal of the fleet's own certificates."""

from __future__ import annotations

import errno
import os
import ssl
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from cloud_broker_worker.broker.embedded import EmbeddedBroker
from fleet.errors import ConfigError
from fleet.identity.enrolment import Enrolment
from fleet.identity.identity import CERT_FILE, KEY_FILE, RENEWED_FILE, Identity
from fleet.protocol.access import Role
from fleet.registry.store import Registry
from fleet.server.certificate_renewal_task import CertificateRenewalTask
from fleet.server.home import FleetConfig, FleetHome, check_own_names
from fleet.transport.mqtt import MqttTransport
from provisioning.certificate import Certificate
from provisioning.own_certificates import is_due, renew_own
from tests.brokers import HOST, LookupRegistry, fingerprint_of, free_port, wait_until

DAY_S = 86_400.0
COLLECTOR = "collector"


@pytest.fixture
def home(tmp_path: Path) -> FleetHome:
    return FleetHome.create(
        tmp_path / "state",
        FleetConfig(host=HOST, port=free_port(), bundle="/no/bundle", service_port=0),
    )


@pytest.fixture
def registry(home: FleetHome) -> Iterator[Registry]:
    with home.registry() as opened:
        yield opened


def server_certificate(port: int) -> str:
    """Return the certificate of a server in PEM."""
    return ssl.get_server_certificate((HOST, port))


def make_old(home: FleetHome, folder: Path) -> None:
    """Write a server certificate that is due for renewal into `folder`."""
    authority = home.authority()
    life = timedelta(seconds=1)
    certificate: Certificate = authority.certify("broker", Role.SERVER, life)
    certificate.write(folder)


def test_a_certificate_is_due_at_two_thirds_of_its_life(home: FleetHome) -> None:
    folder = home.identity(COLLECTOR, Role.SERVER).folder
    now = time.time()
    assert not is_due(folder, now + 59 * DAY_S)
    assert is_due(folder, now + 61 * DAY_S)


def test_a_renewed_identity_has_another_key_and_both_certificates_are_valid(
    home: FleetHome, registry: Registry
) -> None:
    identity = home.identity(COLLECTOR, Role.SERVER)
    old = fingerprint_of(identity)
    old_key = (identity.folder / KEY_FILE).read_bytes()
    renew_own(registry, home.authority(), identity)
    assert (identity.folder / KEY_FILE).read_bytes() != old_key
    assert fingerprint_of(identity) != old
    assert (
        registry.identities.admitted(COLLECTOR, old)
        == registry.identities.admitted(COLLECTOR, fingerprint_of(identity))
        is not None
    )
    assert registry.audit_log.entries(COLLECTOR)[0].action == "recertify"


def test_a_connected_client_uses_the_new_certificate_at_its_next_connection(
    home: FleetHome, registry: Registry
) -> None:
    identity = home.identity(COLLECTOR, Role.SERVER)
    fingerprints = []

    def lookup(name: str, fingerprint: str) -> object:
        fingerprints.append(fingerprint)
        return registry.identities.admitted(name, fingerprint)

    tls = home.server_tls()
    broker = EmbeddedBroker(HOST, home.config.port, tls, LookupRegistry(lookup))  # type: ignore[arg-type]
    with broker, MqttTransport.connect(identity) as link:
        old = fingerprint_of(identity)
        assert set(fingerprints) == {old}
        renew_own(registry, home.authority(), identity)
        assert link.is_up
        broker.__exit__(None, None, None)
        with EmbeddedBroker(HOST, home.config.port, tls, LookupRegistry(lookup)):  # type: ignore[arg-type]
            wait_until(
                lambda: fingerprint_of(identity) in fingerprints,
                "it reconnects with the new one",
                20.0,
            )
            wait_until(lambda: link.is_up, "it is up")


def test_the_task_renews_a_certificate_that_is_due_and_reloads_the_broker(
    home: FleetHome, registry: Registry
) -> None:
    tls = home.server_tls()
    with EmbeddedBroker(HOST, home.config.port, tls, registry) as broker:
        before = server_certificate(home.config.port)
        task = CertificateRenewalTask(home, [tls.cert_file.parent], [broker.reload_certificate])
        task.run()
        assert server_certificate(home.config.port) == before
        make_old(home, tls.cert_file.parent)
        CertificateRenewalTask(home, [tls.cert_file.parent], [broker.reload_certificate]).run()
        assert server_certificate(home.config.port) not in (before, "")
        assert not is_due(tls.cert_file.parent)
        with MqttTransport.connect(home.identity(COLLECTOR, Role.SERVER)) as link:
            assert link.is_up


def test_the_task_repeats_a_failed_reload_and_those_after_it(home: FleetHome) -> None:
    tls = home.server_tls()
    calls = list[str]()

    def reload() -> None:
        calls.append("failed" if not calls else "reloaded")
        if calls == ["failed"]:
            raise ConfigError("no process")

    make_old(home, tls.cert_file.parent)
    task = CertificateRenewalTask(
        home, [tls.cert_file.parent], [reload, lambda: calls.append("next")]
    )
    with pytest.raises(ConfigError):
        task.run()
    task.run()
    task.run()
    assert calls == ["failed", "reloaded", "next"]


def test_the_task_renews_the_fleets_own_identities(
    home: FleetHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities = [home.identity(COLLECTOR, Role.SERVER), home.identity("worker-1", Role.WORKER)]
    before = [fingerprint_of(identity) for identity in identities]
    later = time.time() + 61 * DAY_S
    monkeypatch.setattr("provisioning.own_certificates.time.time", lambda: later)
    CertificateRenewalTask(home, [], []).run()
    assert not {fingerprint_of(identity) for identity in identities} & set(before)


def test_files_of_another_user_are_reported_once_and_hinder_no_other_identity(
    home: FleetHome, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stat = Path.stat

    def refuse(path: Path, **options: bool) -> os.stat_result:
        if "operator-1" in path.parts:  # the modes of files do not bind root
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    worker = home.identity("worker-1", Role.WORKER)
    before = fingerprint_of(worker)
    later = time.time() + 61 * DAY_S
    monkeypatch.setattr("provisioning.own_certificates.time.time", lambda: later)
    monkeypatch.setattr(Path, "stat", refuse)
    task = CertificateRenewalTask(home, [], [])
    task.run()
    task.run()
    (line,) = [each for each in caplog.messages if "operator-1" in each]
    assert "identity.json: Permission denied for the user" in line
    assert fingerprint_of(worker) != before


def test_an_identity_that_cannot_be_renewed_stays_in_use(
    home: FleetHome, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before: Identity = home.identity(COLLECTOR, Role.SERVER)
    old = (before.folder / CERT_FILE).read_bytes()
    (home.folder / "ca").rename(home.folder / "away")
    later = time.time() + 61 * DAY_S
    monkeypatch.setattr("provisioning.own_certificates.time.time", lambda: later)
    assert home.identity(COLLECTOR, Role.SERVER) == before
    assert (before.folder / CERT_FILE).read_bytes() == old
    assert "is due and not renewed" in caplog.text


def let_expire(home: FleetHome, identity: Identity) -> None:
    """Replace the certificate of an identity by an expired one, as after a long pause."""
    config = identity.config
    certificate = home.authority().certify(config.name, config.role, timedelta(minutes=-1))
    with home.registry() as registry:
        registry.identities.recertify(config.name, config.role, certificate.issued)
    certificate.write(identity.folder)


@pytest.mark.parametrize(
    ("name", "role"),
    [(COLLECTOR, Role.SERVER), ("operator-1", Role.SERVER), ("worker-1", Role.WORKER)],
)
def test_an_identity_of_the_fleet_that_has_ended_is_renewed_at_its_next_use(
    home: FleetHome, registry: Registry, name: str, role: Role
) -> None:
    let_expire(home, home.identity(name, role))
    assert registry.identities.grants(name) is None
    identity = home.identity(name, role)
    assert registry.identities.admitted(name, fingerprint_of(identity)) is not None
    assert not is_due(identity.folder)


def test_a_fleet_that_was_switched_off_for_a_quarter_starts_again(home: FleetHome) -> None:
    identities = [home.identity(COLLECTOR, Role.SERVER), home.identity("worker-1", Role.WORKER)]
    for identity in identities:
        let_expire(home, identity)
    home.renew_own()
    assert not any(is_due(identity.folder) for identity in identities)


def test_a_collector_that_became_a_pending_device_is_mended(
    home: FleetHome, registry: Registry
) -> None:
    identity = home.identity(COLLECTOR, Role.SERVER)
    let_expire(home, identity)
    registry.identities.enroll([Enrolment(name=COLLECTOR)], 60.0)
    home.identity(COLLECTOR, Role.SERVER)
    (row,) = (row for row in registry.identities.all() if row.name == COLLECTOR)
    assert (row.role, row.state) == ("server", "active")


@pytest.mark.parametrize("name", ["identity.json", "cert.pem", "key.pem", "ca.pem"])
def test_a_damaged_file_of_an_identity_of_the_fleet_is_made_again(
    home: FleetHome, registry: Registry, name: str
) -> None:
    folder = home.identity("operator-1", Role.SERVER).folder
    (folder / name).write_bytes(b"")
    identity = home.identity("operator-1", Role.SERVER)
    identity.ssl_context()
    assert identity == Identity.load(folder)
    assert registry.identities.admitted("operator-1", fingerprint_of(identity)) is not None


def test_a_damaged_renewal_of_an_operator_leaves_its_pair(home: FleetHome) -> None:
    identity = home.identity("operator-1", Role.SERVER)
    before = (identity.folder / CERT_FILE).read_bytes()
    (identity.folder / RENEWED_FILE).touch()
    home.identity("operator-1", Role.SERVER)
    assert (identity.folder / CERT_FILE).read_bytes() == before


def test_a_revoked_identity_of_the_fleet_stays_revoked(
    home: FleetHome, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    identity = home.identity("worker-1", Role.WORKER)
    let_expire(home, identity)
    registry.identities.revoke("worker-1")
    home.identity("worker-1", Role.WORKER)
    assert registry.identities.grants("worker-1") is None
    assert "is due and not renewed" in caplog.text


@pytest.mark.parametrize("name", ["collector", "operator-2", "worker-7"])
def test_a_name_of_the_fleet_is_no_devices(home: FleetHome, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name!r} is a name of the fleet's own"):
        home.enroll(name, Role.DEVICE, tmp_path / name)
    with pytest.raises(ConfigError, match="choose another"):
        check_own_names([Enrolment(name=name, role=Role.APP)])


def test_a_worker_on_another_machine_may_have_the_name_of_a_worker(
    home: FleetHome, tmp_path: Path
) -> None:
    assert home.enroll("worker-7", Role.WORKER, tmp_path / "worker-7").name == "worker-7"
