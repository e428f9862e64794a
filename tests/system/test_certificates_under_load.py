"""Twenty busy devices: one is revoked and no other notices; all renew without a loss."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.worker import Worker
from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.errors import FleetError, LinkError
from fleet.identity.certificate_renewer import renew_certificate
from fleet.identity.credentials import new_key
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.protocol.access import Grants, Role
from fleet.protocol.prompt import PromptRequest
from fleet.server.change_watcher import ChangeWatcher
from fleet.server.collector import Collector
from fleet.server.denylist_publisher import DenylistPublisher
from fleet.transport.base import Will
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from provisioning.enrolment_service import EnrolmentService
from provisioning.fleet_address import FleetAddress
from provisioning.service import EnrolmentServer
from tests.brokers import BROKERS, HOST, fingerprint_of, wait_until
from tests.registered import RegisteredSite, registered_site

DEVICES = tuple(f"d{i}" for i in range(20))
REVOKED = "d7"
FLEET = (
    *(Grants(Role.DEVICE, name) for name in DEVICES),
    Grants(Role.APP, "a1", DEVICES),
    Grants(Role.WORKER, "w1"),
    Grants(Role.SERVER, "s1"),
)
MQTT_LOG = "fleet.transport.mqtt"
OUT_S = 5.0
WAIT_S = 120.0
NUM_TOKENS = 8
REQUEST = PromptRequest(prompt="How warm is it?", threshold=1.0, max_new_tokens=NUM_TOKENS)
PATIENT = AgentConfig(num_threads=1, assist_deadline_ms=60_000)


class BusyFleet:
    """Twenty agents, a worker, and an app that prompts each device again after its answer.

    The device `silent`, which will be revoked, has less time for an answer, and is asked again.
    """

    def __init__(
        self, site: RegisteredSite, bundle: Bundle, stack: ExitStack, silent: str = ""
    ) -> None:
        self.answers: Counter[str] = Counter()
        self.errors: dict[str, str] = {}
        self.sources = {"cloud"}
        self._silent = silent
        self._stop = threading.Event()
        server = stack.enter_context(site.connect("s1"))
        stack.enter_context(Collector(server, site.registry))
        watcher = ChangeWatcher(site.registry)
        watcher.add(DenylistPublisher(server, site.registry).publish)
        stack.enter_context(watcher)
        cloud = stack.enter_context(
            site.connect("w1", Will(topics.worker_status("w1"), Worker.will()))
        )
        config = WorkerConfig(num_threads=1, shared_opens=False)
        self.worker = stack.enter_context(Worker(cloud, bundle, config))
        self.links: dict[str, MqttTransport] = {}
        for name in DEVICES:
            link = stack.enter_context(
                site.connect(name, Will(topics.device_status(name), Agent.will()))
            )
            stack.enter_context(Agent(link, bundle, PATIENT))
            self.links[name] = link
        client = PromptClient(stack.enter_context(site.connect("a1")))
        self._threads = [
            threading.Thread(target=self._ask, args=(client, name), daemon=True) for name in DEVICES
        ]
        stack.callback(self.stop_asking)
        for thread in self._threads:
            thread.start()

    def _ask(self, client: PromptClient, name: str) -> None:
        while not self._stop.is_set():
            try:
                timeout_s = OUT_S if name == self._silent else WAIT_S
                last = list(client.ask(name, REQUEST, timeout_s=timeout_s))[-1]
            except FleetError as error:
                self.errors[name] = str(error)
                if name == self._silent:
                    continue
                return
            if (
                last.usage is None
                or last.usage.tokens != NUM_TOKENS
                or set(last.usage.sources) - self.sources
            ):
                self.errors[name] = f"{last}"
            self.answers[name] += 1

    def stop_asking(self) -> None:
        """Wait until each prompt has its answer."""
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_S)


def lost_links(caplog: pytest.LogCaptureFixture) -> Counter[str]:
    """Count the lost connections of each device.

    Another log may tell that a report waits while a link connects anew with its new certificate.
    """
    return Counter(
        record.getMessage().split()[0]
        for record in caplog.records
        if record.name == MQTT_LOG and "lost its link to the broker" in record.getMessage()
    )


@pytest.fixture(params=BROKERS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RegisteredSite]:
    with registered_site(request.param, tmp_path, FLEET) as running:
        yield running


def test_one_of_twenty_busy_devices_is_revoked_and_out_within_five_seconds_and_the_others_go_on(
    site: RegisteredSite, tiny_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, MQTT_LOG)
    others = [name for name in DEVICES if name != REVOKED]
    with ExitStack() as stack:
        fleet = BusyFleet(site, tiny_bundle, stack, silent=REVOKED)
        wait_until(
            lambda: all(fleet.answers[name] for name in DEVICES),
            "every device has answered",
            WAIT_S,
        )
        site.registry.identities.revoke(REVOKED)
        wait_until(lambda: not fleet.links[REVOKED].is_up, "it is disconnected", OUT_S)
        wait_until(
            lambda: REVOKED not in {key.device for key in list(fleet.worker.engine.sessions)},
            "its session ends",
            OUT_S,
        )
        before = Counter(fleet.answers)
        wait_until(
            lambda: all(fleet.answers[name] >= before[name] + 2 for name in others),
            "they go on",
            WAIT_S,
        )
        assert not fleet.links[REVOKED].is_up
        with suppress(LinkError), site.connect(REVOKED):
            pytest.fail("it was let in again")
    assert set(lost_links(caplog)) == {REVOKED}
    assert set(fleet.errors) <= {REVOKED}


@contextmanager
def service(site: RegisteredSite) -> Iterator[str]:
    """The base URL of the service where a site's identities renew."""
    enrolment = EnrolmentService(
        registry=site.registry,
        authority=site.authority,
        address=FleetAddress(host=HOST, port=site.port),
        find_bundle=lambda _: None,
    )
    with EnrolmentServer(HOST, 0, site.tls, enrolment) as running:
        yield running.url


def test_twenty_busy_devices_renew_their_certificates_and_no_answer_is_lost(
    site: RegisteredSite, tiny_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, MQTT_LOG)
    with ExitStack() as stack:
        url = stack.enter_context(service(site))
        old = {name: fingerprint_of(site.identities[name]) for name in DEVICES}
        fleet = BusyFleet(site, tiny_bundle, stack)
        fleet.sources |= {"fallback"}  # while it connects anew a device goes on alone
        wait_until(
            lambda: all(fleet.answers[name] for name in DEVICES),
            "every device has answered",
            WAIT_S,
        )

        def rotate(name: str) -> None:
            identity = site.identities[name]
            config = msgspec.structs.replace(identity.config, server=url)
            renew_certificate(Identity(identity.folder, config), new_key())
            fleet.links[name].reload_certificate()

        with ThreadPoolExecutor(len(DEVICES)) as pool:
            list(pool.map(rotate, DEVICES))
        before = Counter(fleet.answers)
        wait_until(
            lambda: all(fleet.answers[name] >= before[name] + 2 for name in DEVICES),
            "they go on",
            WAIT_S,
        )
        fleet.stop_asking()
        assert fleet.errors == {}
        new = {name: fingerprint_of(site.identities[name]) for name in DEVICES}
        assert not set(new.values()) & set(old.values())
        assert all(site.registry.identities.knows_certificate(name, new[name]) for name in DEVICES)
        wait_until(
            lambda: (
                {row.device: row.generations for row in site.registry.stats.per_device()}
                == fleet.answers
            ),
            "the registry counts every answer once",
            WAIT_S,
        )
    assert lost_links(caplog) == {}
