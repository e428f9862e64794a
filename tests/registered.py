"""A site whose broker follows a real registry of identities and certificates."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cloud_broker_worker.broker.mosquitto import CRL_FILE, PID_FILE, write_config
from cloud_broker_worker.broker.mosquitto_reload import reload_by_signal
from cloud_broker_worker.broker.mosquitto_sync import MosquittoSync
from fleet.identity.identity import Identity
from fleet.protocol.access import Grants, Role
from fleet.registry.store import Registry
from fleet.server.change_watcher import ChangeWatcher
from fleet.transport.base import Will
from fleet.transport.mqtt import MqttTransport
from provisioning.authority import CertificateAuthority
from provisioning.crl import CrlFile
from provisioning.session_takeover import SessionTakeover
from tests.brokers import FLEET, HOST, Amqtt, Mosquitto, RunningBroker, free_port
from tests.identities import enroll_identity


class RegisteredSite:
    """An authority, a registry, and a broker of either kind that follows the registry."""

    def __init__(
        self, kind: str, folder: Path, fleet: tuple[Grants, ...], stack: ExitStack
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.authority = CertificateAuthority.create(folder / "ca")
        self.registry = stack.enter_context(Registry.open(folder / "registry.sqlite", "tests"))
        self.identities: dict[str, Identity] = {}
        self._numbers = itertools.count()
        for grants in sorted(
            fleet, key=lambda grants: grants.role is Role.APP
        ):  # devices before who may prompt them
            self.enroll(grants.name, grants.role, grants.targets if grants.role is Role.APP else ())
        self.tls = self.authority.server_tls(folder / "server", HOST)
        self.watcher = ChangeWatcher(self.registry)
        self.broker = (
            self._start_embedded()
            if kind == "embedded"
            else self._start_mosquitto(folder / "mosquitto")
        )
        stack.callback(self.broker.stop)
        stack.enter_context(self.watcher)

    def _start_embedded(self) -> RunningBroker:
        broker = Amqtt(self.port, self.tls, self.registry)
        broker.start()
        return broker

    def _start_mosquitto(self, folder: Path) -> RunningBroker:
        config = write_config(
            folder, self.port, self.tls, self.registry.identities.all_grants(), has_crl=True
        )
        crl = CrlFile(folder / CRL_FILE, self.authority)
        crl.update(self.registry.identities.revoked_certificates(), time.time())
        broker = Mosquitto(self.port, config)
        broker.start()
        evictions = SessionTakeover(self.authority, HOST, self.port)
        keeper = MosquittoSync(
            folder, self.registry, crl, reload_by_signal(folder / PID_FILE), evictions
        )
        self.watcher.add(keeper.sync, periodic=True)
        return broker

    def enroll(
        self, name: str, role: Role = Role.DEVICE, targets: tuple[str, ...] = ()
    ) -> Identity:
        """A new certificate for `name`, which is active from then on; earlier ones are revoked."""
        out = self.folder / "identities" / f"{name}-{next(self._numbers)}"
        self.identities[name] = enroll_identity(
            self.registry,
            self.authority,
            name,
            role,
            out,
            host=HOST,
            port=self.port,
            targets=targets,
            force=True,
        )
        return self.identities[name]

    def connect(self, name: str, will: Will | None = None) -> MqttTransport:
        """Under the newest certificate of `name`."""
        return MqttTransport.connect(self.identities[name], will=will)


@contextmanager
def registered_site(
    kind: str, folder: Path, fleet: tuple[Grants, ...] = FLEET
) -> Iterator[RegisteredSite]:
    """A site whose broker runs; `kind` is embedded or mosquitto."""
    with ExitStack() as stack:
        yield RegisteredSite(kind, folder, fleet, stack)
