"""`fleet up` serves its bundle, and starts a worker for another bundle that is desired."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from fleet.bundles.manifest import Bundle
from fleet.bundles.verify import verify_bundle
from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.protocol.desired_config import Settings
from fleet.protocol.report import WorkerStatus, decode_status
from fleet.registry.targets import Scope, Target
from fleet.server.child_process import child
from fleet.server.home import FleetHome
from fleet.transport.mqtt import MqttTransport
from tests.brokers import free_port, wait_until

WAIT_S = 120.0


def test_a_wanted_bundle_gets_a_worker_of_its_own_until_the_fleet_goes(
    tmp_path: Path, tiny_bundle: Bundle, make_tiny_bundle: Callable[..., Bundle]
) -> None:
    folder = tmp_path / "state"
    other = make_tiny_bundle((1,))
    options = (
        "--home",
        str(folder),
        "--port",
        str(free_port()),
        "--service-port",
        "0",
        "--bundle",
        str(tiny_bundle.folder),
    )
    heard: dict[str, WorkerStatus] = {}

    def hear(topic: str, payload: bytes) -> None:
        heard[topics.parse_topic(topic, topics.WORKER_STATUS_FILTER)[0]] = decode_status(
            payload, WorkerStatus
        )

    with ExitStack() as stack:
        up = stack.enter_context(child("the fleet", "fleet.cli", "up", *options))
        up.wait_ready(WAIT_S)
        home = FleetHome.load(folder)
        kept = home.bundles / tiny_bundle.manifest.bundle_id
        assert verify_bundle(kept, folder / "ca" / "ca.pem").signature == "valid"
        home.enroll("gw", Role.DEVICE, tmp_path / "gw")
        bundle_id = home.keep_bundle(other.folder)
        registry = stack.enter_context(home.registry())
        link = stack.enter_context(MqttTransport.connect(stack.enter_context(home.operator())))
        link.subscribe(topics.WORKER_STATUS_FILTER, hear, qos=1)
        registry.desired_state.change_settings(
            Target(Scope.DEVICE, "gw"), lambda _: Settings(bundle=bundle_id)
        )
        wait_until(
            lambda: "worker-2" in heard and heard["worker-2"].online,
            "a second worker is there",
            WAIT_S,
        )
        assert heard["worker-2"].bundle_ids == (bundle_id,)
        assert heard["worker-1"].bundle_ids == (tiny_bundle.manifest.bundle_id,)
        up.stop()
        assert up.process.returncode == 0
