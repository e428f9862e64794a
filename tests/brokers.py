"""Real brokers on free ports of 127.0.0.1, with TLS, and a small fleet that they know."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import shutil
import socket
import ssl
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final, Protocol

import pytest

from cloud_broker_worker.broker.embedded import EmbeddedBroker
from cloud_broker_worker.broker.mosquitto import write_config
from cloud_broker_worker.broker.rights_cache import AdmissionRegistry
from fleet.errors import LinkError
from fleet.identity.identity import CERT_FILE, Identity, ServerTls
from fleet.protocol.access import Grants, Role
from fleet.transport.base import Will
from fleet.transport.mqtt import MqttTransport
from provisioning.authority import CertificateAuthority
from tests.identities import issue_identity

HOST: Final = "127.0.0.1"
PORTS: Final = range(15_000, 32_000)
WAIT_S: Final = 60.0
POLL_S: Final = 0.02
MAX_POLL_S: Final = 0.2
BROKERS: Final = ["embedded", pytest.param("mosquitto", marks=pytest.mark.mosquitto)]
FLEET: Final = (
    Grants(Role.DEVICE, "d1", ("a1",)),
    Grants(Role.DEVICE, "d2", ("a2",)),
    Grants(Role.APP, "a1", ("d1",)),
    Grants(Role.APP, "a2", ("d2",)),
    Grants(Role.WORKER, "w1"),
    Grants(Role.WORKER, "w2"),
    Grants(Role.SERVER, "s1"),
)


class Inbox:
    """A handler that keeps what it was given."""

    def __init__(self) -> None:
        self._items: SimpleQueue[tuple[str, bytes]] = SimpleQueue()

    def __call__(self, topic: str, payload: bytes) -> None:
        self._items.put((topic, payload))

    def get(self, timeout_s: float = WAIT_S) -> tuple[str, bytes]:
        """The next message; the test fails when none comes."""
        try:
            return self._items.get(timeout=timeout_s)
        except Empty:
            pytest.fail(f"no message came within {timeout_s} s")

    def until(self, payload: bytes) -> list[bytes]:
        """The payloads that came before `payload`."""
        payloads: list[bytes] = []
        while (got := self.get()[1]) != payload:
            payloads.append(got)
        return payloads

    @property
    def is_empty(self) -> bool:
        return self._items.empty()


class RunningBroker(Protocol):
    def start(self) -> None: ...

    def stop(self) -> None: ...

    def kill(self) -> None: ...


class Amqtt:
    """The embedded broker, with the rights of `registry`."""

    def __init__(self, port: int, tls: ServerTls, registry: AdmissionRegistry) -> None:
        self._port = port
        self._tls = tls
        self._registry = registry
        self._broker: EmbeddedBroker | None = None

    def start(self) -> None:
        self._broker = EmbeddedBroker(HOST, self._port, self._tls, self._registry).__enter__()

    def stop(self) -> None:
        if self._broker:
            self._broker.__exit__(None, None, None)
            self._broker = None

    def kill(self) -> None:
        self.stop()  # it has no process of its own


class LookupRegistry:
    """A registry of the rights that `lookup` returns, which may have changed at any time."""

    def __init__(self, lookup: Callable[[str, str], Grants | None]) -> None:
        self._lookup = lookup
        self._changes = itertools.count()
        self.audit_log = self
        self.identities = self

    def newest_change(self) -> int:
        return next(self._changes)

    def admitted_holders(self, holders: Sequence[tuple[str, str]]) -> list[Grants | None]:
        return [self._lookup(*holder) for holder in holders]


class Mosquitto:
    """A mosquitto process with a configuration that we wrote."""

    def __init__(self, port: int, config: Path) -> None:
        self._binary = find_mosquitto("mosquitto")
        self._port = port
        self._config = config

    def start(self) -> None:
        self._process = subprocess.Popen([self._binary, "-c", str(self._config)])
        wait_until(lambda: listens(self._port), "mosquitto listens")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Site:
    """One fleet: its authority, who is enrolled, and its broker."""

    def __init__(self, kind: str, folder: Path, fleet: Iterable[Grants] = FLEET) -> None:
        self.folder = folder
        self.authority = CertificateAuthority.create(folder / "ca")
        self.port = free_port()
        self.tls = self.authority.server_tls(folder / "server", HOST)
        self.known = {grants.name: grants for grants in fleet}
        self._issued: dict[str, set[str]] = defaultdict(set)
        self._open: set[str] = set()
        self.broker: RunningBroker = (
            Amqtt(self.port, self.tls, LookupRegistry(self.lookup))
            if kind == "embedded"
            else Mosquitto(
                self.port,
                write_config(folder / "mosquitto", self.port, self.tls, self.known.values()),
            )
        )

    def lookup(self, name: str, fingerprint: str) -> Grants | None:
        """As the registry: who is enrolled, with a certificate that was made here."""
        return (
            self.known.get(name)
            if name in self._open or fingerprint in self._issued[name]
            else None
        )

    def identity(self, name: str, authority: CertificateAuthority | None = None) -> Identity:
        """A certificate for `name`, enrolled or not, of this fleet's authority or another."""
        role = self.known[name].role if name in self.known else Role.DEVICE
        made_by = authority or self.authority
        folder = self.folder / "identities" / f"{name}-{id(made_by)}"
        identity = issue_identity(made_by, name, role, folder, host=HOST, port=self.port)
        if made_by is self.authority:
            self.admit(identity)
        return identity

    def admit_any(self, name: str) -> None:
        """Accept every certificate of the authority for `name`; another program issues them."""
        self._open.add(name)

    def admit(self, identity: Identity) -> None:
        """Has the certificate that is in an identity's folder now count."""
        self._issued[identity.name].add(fingerprint_of(identity))

    def connect(self, name: str, will: Will | None = None) -> MqttTransport:
        return MqttTransport.connect(self.identity(name), will=will)


@contextmanager
def running_site(kind: str, folder: Path, fleet: Iterable[Grants] = FLEET) -> Iterator[Site]:
    """A site whose broker runs; `kind` is embedded or mosquitto."""
    site = Site(kind, folder, fleet)
    site.broker.start()
    try:
        yield site
    finally:
        site.broker.stop()


def can_connect(identity: Identity) -> bool:
    """Whether the broker lets it in; it leaves at once."""
    with suppress(LinkError):
        MqttTransport.connect(identity).close()
        return True
    return False


def fingerprint_of(identity: Identity) -> str:
    """SHA-256 of the DER of an identity's certificate, in hex."""
    pem = (identity.folder / CERT_FILE).read_text()
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


def installed_mosquitto(program: str) -> str | None:
    """Return the path of mosquitto or a client; None if it is not installed."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def find_mosquitto(program: str) -> str:
    """Return the path of mosquitto or a client; skip the test without it, or fail under CI."""
    path = installed_mosquitto(program)
    if path is None:
        reason = (
            f"{program} is not installed; on Debian: apt-get install mosquitto mosquitto-clients"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def free_port() -> int:
    """Return a free port below the range that outgoing connections use."""
    for _ in range(100):
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise AssertionError(f"no port of {PORTS} is free")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    """Poll ``condition()``; the test fails when it stays false.

    A poll counts for `MAX_POLL_S` at most, so the time in which a busy machine stalls is no wait.
    The condition takes about a tenth of the time: some conditions are large queries.
    """
    waited_s = 0.0
    polled_at = time.monotonic()
    while not condition():
        if waited_s > timeout_s:
            pytest.fail(f"waited {timeout_s} s in vain until {what}")
        cost_s = time.monotonic() - polled_at
        time.sleep(min(max(POLL_S, 9 * cost_s), MAX_POLL_S))
        now = time.monotonic()
        waited_s += min(now - polled_at, MAX_POLL_S)
        polled_at = now


def listens(port: int) -> bool:
    """Whether a server accepts connections there."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
