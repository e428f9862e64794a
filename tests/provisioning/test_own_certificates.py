"""The fleet's own certificates, renewed where its authority is."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from cloud_broker_worker.broker.embedded import EmbeddedBroker
from fleet.errors import ConfigError
from fleet.identity.identity import CERT_FILE, KEY_FILE, Identity
from fleet.protocol.access import Role
from fleet.registry.store import Registry
from fleet.server.certificate_renewal_task import CertificateRenewalTask
from fleet.server.home import FleetConfig, FleetHome
from fleet.transport.mqtt import MqttTransport
from provisioning.certificate import Certificate
from provisioning.own_certificates import is_due, renew_own
from tests.brokers import HOST, fingerprint_of, free_port, wait_until

DAY_S = 86_400.0
COLLECTOR = "collector"


@pytest.fixture
def state(tmp_path: Path) -> FleetHome:
    return FleetHome.create(
        tmp_path / "state",
        FleetConfig(host=HOST, port=free_port(), bundle="/no/bundle", service_port=0),
    )


@pytest.fixture
def registry(state: FleetHome) -> Iterator[Registry]:
    with state.registry() as opened:
        yield opened


def shown_by(port: int) -> str:
    """The certificate that a server shows, in PEM."""
    return ssl.get_server_certificate((HOST, port))


def make_old(state: FleetHome, folder: Path) -> None:
    """Puts a server certificate of which two thirds are over into `folder`."""
    authority = state.authority()
    life = timedelta(seconds=1)
    made: Certificate = authority.certify("broker", Role.SERVER, life)
    made.write(folder)


def test_a_certificate_is_due_at_two_thirds_of_its_life(state: FleetHome) -> None:
    folder = state.identity(COLLECTOR, Role.SERVER).folder
    now = time.time()
    assert not is_due(folder, now + 59 * DAY_S)
    assert is_due(folder, now + 61 * DAY_S)


def test_an_identity_has_another_key_and_both_certificates_count(
    state: FleetHome, registry: Registry
) -> None:
    identity = state.identity(COLLECTOR, Role.SERVER)
    old = fingerprint_of(identity)
    old_key = (identity.folder / KEY_FILE).read_bytes()
    renew_own(registry, state.authority(), identity)
    assert (identity.folder / KEY_FILE).read_bytes() != old_key
    assert fingerprint_of(identity) != old
    assert (
        registry.admitted(COLLECTOR, old)
        == registry.admitted(COLLECTOR, fingerprint_of(identity))
        is not None
    )
    assert registry.audit_log(COLLECTOR)[0].action == "renew"


def test_whoever_is_connected_stays_so_and_takes_the_new_one_at_the_next_connection(
    state: FleetHome, registry: Registry
) -> None:
    identity = state.identity(COLLECTOR, Role.SERVER)
    seen = []

    def lookup(name: str, fingerprint: str) -> object:
        seen.append(fingerprint)
        return registry.admitted(name, fingerprint)

    tls = state.server_tls()
    broker = EmbeddedBroker(HOST, state.config.port, tls, lookup)  # type: ignore[arg-type]
    with broker, MqttTransport.connect(identity) as link:
        old = fingerprint_of(identity)
        assert set(seen) == {old}
        renew_own(registry, state.authority(), identity)
        assert link.is_up
        broker.__exit__(None, None, None)
        with EmbeddedBroker(HOST, state.config.port, tls, lookup):  # type: ignore[arg-type]
            wait_until(
                lambda: fingerprint_of(identity) in seen, "it comes back with the new one", 20.0
            )
            wait_until(lambda: link.is_up, "it is up")


def test_upkeep_renews_what_is_due_and_makes_the_broker_show_it(
    state: FleetHome, registry: Registry
) -> None:
    tls = state.server_tls()
    with EmbeddedBroker(HOST, state.config.port, tls, registry.admitted) as broker:
        before = shown_by(state.config.port)
        upkeep = CertificateRenewalTask(state, [tls.cert_file.parent], [broker.reload_certificate])
        upkeep.tend()
        assert shown_by(state.config.port) == before
        make_old(state, tls.cert_file.parent)
        CertificateRenewalTask(state, [tls.cert_file.parent], [broker.reload_certificate]).tend()
        assert shown_by(state.config.port) not in (before, "")
        assert not is_due(tls.cert_file.parent)
        with MqttTransport.connect(state.identity(COLLECTOR, Role.SERVER)) as link:
            assert link.is_up


def test_upkeep_repeats_a_reload_that_failed_and_those_behind_it(state: FleetHome) -> None:
    tls = state.server_tls()
    calls = list[str]()

    def reload() -> None:
        calls.append("failed" if not calls else "reloaded")
        if calls == ["failed"]:
            raise ConfigError("no process")

    make_old(state, tls.cert_file.parent)
    upkeep = CertificateRenewalTask(
        state, [tls.cert_file.parent], [reload, lambda: calls.append("next")]
    )
    with pytest.raises(ConfigError):
        upkeep.tend()
    upkeep.tend()
    upkeep.tend()
    assert calls == ["failed", "reloaded", "next"]


def test_upkeep_renews_the_fleets_own_identities(
    state: FleetHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities = [state.identity(COLLECTOR, Role.SERVER), state.identity("worker-1", Role.WORKER)]
    before = [fingerprint_of(identity) for identity in identities]
    later = time.time() + 61 * DAY_S
    monkeypatch.setattr("provisioning.own_certificates.time.time", lambda: later)
    CertificateRenewalTask(state, [], []).tend()
    assert not {fingerprint_of(identity) for identity in identities} & set(before)


def test_an_identity_that_is_due_and_cannot_be_renewed_goes_on_with_what_it_has(
    state: FleetHome, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before: Identity = state.identity(COLLECTOR, Role.SERVER)
    old = (before.folder / CERT_FILE).read_bytes()
    (state.folder / "ca").rename(state.folder / "away")
    later = time.time() + 61 * DAY_S
    monkeypatch.setattr("provisioning.own_certificates.time.time", lambda: later)
    assert state.identity(COLLECTOR, Role.SERVER) == before
    assert (before.folder / CERT_FILE).read_bytes() == old
    assert "is due and not renewed" in caplog.text
