"""A site whose broker follows a real registry: who is enrolled there, and with which certificates."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cryptography import x509
from sqlalchemy import update
from sqlalchemy.orm import Session

from cloud_broker_worker.broker.keeper import MosquittoKeeper
from cloud_broker_worker.broker.mosquitto import CRL_FILE, PID_FILE, write_config
from cloud_broker_worker.broker.reload import by_signal
from fleet.access import Grants, Role
from fleet.identity import CERT_FILE, Identity
from fleet.mqtt import MqttTransport
from fleet.registry.audit import audit
from fleet.registry.models import CertificateRecord, IdentityRecord
from fleet.registry.states import State
from fleet.registry.store import Registry
from fleet.registry.watcher import ChangeWatcher
from fleet.transport import Will
from provisioning.authority import CertificateAuthority
from provisioning.crl import CrlFile
from provisioning.eviction import Evictions
from tests.brokers import FLEET, HOST, Amqtt, Mosquitto, RunningBroker, fingerprint_of, free_port


class RegisteredSite:
    """An authority, a registry with `fleet` in it, and a broker of either kind that asks it, or is kept equal to it."""

    def __init__(self, kind: str, folder: Path, fleet: tuple[Grants, ...], stack: ExitStack) -> None:
        self.folder = folder
        self.port = free_port()
        self.authority = CertificateAuthority.create(folder / "ca")
        self.registry = stack.enter_context(Registry.open(folder / "registry.sqlite", "tests"))
        self.identities: dict[str, Identity] = {}
        self._numbers = itertools.count()
        for grants in sorted(fleet, key=lambda grants: grants.role is Role.APP):  # devices before who may prompt them
            self.enroll(grants.name, grants.role, grants.targets)
        self.tls = self.authority.server_tls(folder / "server", HOST)
        self.watcher = ChangeWatcher(self.registry)
        self.broker = self._start_amqtt() if kind == "amqtt" else self._start_mosquitto(folder / "mosquitto")
        stack.callback(self.broker.stop)
        stack.enter_context(self.watcher)

    def _start_amqtt(self) -> RunningBroker:
        broker = Amqtt(self.port, self.tls, self.registry.admitted)
        broker.start()
        return broker

    def _start_mosquitto(self, folder: Path) -> RunningBroker:
        config = write_config(folder, self.port, self.tls, self.registry.all_grants(), has_crl=True)
        crl = CrlFile(folder / CRL_FILE, self.authority)
        crl.update(self.registry.revoked_certificates(), time.time())
        broker = Mosquitto(self.port, config)
        broker.start()
        evictions = Evictions(self.authority, HOST, self.port)
        keeper = MosquittoKeeper(folder, self.registry, crl, by_signal(folder / PID_FILE), evictions)
        self.watcher.add(keeper.sync, periodic=True)
        return broker

    def enroll(self, name: str, role: Role = Role.DEVICE, targets: tuple[str, ...] = ()) -> Identity:
        """A new certificate for `name`, which is active from then on; earlier ones stay as they are."""
        out = self.folder / "identities" / f"{name}-{next(self._numbers)}"
        identity = self.authority.issue(name, role, out, HOST, self.port)
        certificate = x509.load_pem_x509_certificate((identity.folder / CERT_FILE).read_bytes())
        fingerprint, not_after = fingerprint_of(identity), certificate.not_valid_after_utc.timestamp()
        self.registry.add_identity(
            name, role, targets=targets, fingerprint=fingerprint, not_after=not_after, replace=True
        )
        keep_certificate(self.registry, identity)
        self.identities[name] = identity
        return identity

    def connect(self, name: str, will: Will | None = None) -> MqttTransport:
        """Under the newest certificate of `name`."""
        return MqttTransport.connect(self.identities[name], will=will)

    def revoke(self, name: str) -> None:
        change_state(self.registry, name, State.REVOKED)

    def suspend(self, name: str) -> None:
        change_state(self.registry, name, State.SUSPENDED)

    def resume(self, name: str) -> None:
        change_state(self.registry, name, State.ACTIVE)


def keep_certificate(registry: Registry, identity: Identity) -> None:
    """Puts an identity's certificate into the registry's table, if it is not there yet."""
    pem = (identity.folder / CERT_FILE).read_text()
    certificate = x509.load_pem_x509_certificate(pem.encode())
    record = CertificateRecord(
        serial=f"{certificate.serial_number:x}",
        name=identity.name,
        fingerprint=fingerprint_of(identity),
        key_hash=fingerprint_of(identity),
        pem=pem,
        not_before=certificate.not_valid_before_utc.timestamp(),
        not_after=certificate.not_valid_after_utc.timestamp(),
    )
    registry._transactions.write(lambda db: db.merge(record))


def change_state(registry: Registry, name: str, state: State) -> None:
    """Suspends, resumes or revokes; the latter with every certificate of the name."""

    def work(db: Session) -> None:
        db.execute(update(IdentityRecord).where(IdentityRecord.name == name).values(state=state))
        if state is State.REVOKED:
            of_name = CertificateRecord.name == name
            db.execute(update(CertificateRecord).where(of_name).values(revoked_at=time.time()))
        audit(db, "tests", state, name)

    registry._transactions.write(work)


@contextmanager
def registered_site(kind: str, folder: Path, fleet: tuple[Grants, ...] = FLEET) -> Iterator[RegisteredSite]:
    """A site whose broker runs; `kind` is amqtt or mosquitto."""
    with ExitStack() as stack:
        yield RegisteredSite(kind, folder, fleet, stack)
