"""A house: its broker (mosquitto), and a client that reads and writes as Home Assistant does."""

from __future__ import annotations

import json
import subprocess
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from fleet.protocol.access import Role
from fleet.registry.store import Registry
from fleet.server.bridge.bridge_options import BridgeOptions, HouseAddress
from fleet.server.bridge.house_bridge import HouseBridge
from fleet.server.bridge.mapped_topics import TopicMap
from fleet.server.change_watcher import ChangeWatcher
from fleet.transport.in_memory import InMemoryBroker
from tests.brokers import HOST, Mosquitto, find_mosquitto, free_port, wait_until
from tests.fleet.conftest import add
from tests.fleet.server.gateway.api_fleet import ManualDevice

APP: Final = "house"
DEVICE: Final = "kitchen"
BASE: Final = f"ce-collm/{APP}"
PROMPT: Final = f"{BASE}/{DEVICE}/prompt"
ANSWER: Final = f"{BASE}/{DEVICE}/answer"
STATE: Final = f"{BASE}/{DEVICE}/state"
AVAILABILITY: Final = f"{BASE}/{DEVICE}/availability"
BRIDGE_AVAILABILITY: Final = f"{BASE}/availability"
CONFIG: Final = f"homeassistant/device/ce-collm-{APP}/{DEVICE}/config"
MAPS: Final = ("zigbee2mqtt/hall=hall", "zigbee2mqtt/+", "#=all")


class HouseBroker(Mosquitto):
    """A mosquitto as people have at home, with the lines `access` in its configuration."""

    def __init__(self, folder: Path, access: Sequence[str] = ("allow_anonymous true",)) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        config = folder / "house.conf"
        lines = (f"listener {self.port} {HOST}", *access, "log_type error", "user root", "")
        config.write_text("\n".join(lines))
        super().__init__(self.port, config)


def write_password(folder: Path, user: str, password: str) -> Path:
    """Return mosquitto's file of one user."""
    path = folder / "passwords"
    program = find_mosquitto("mosquitto_passwd")
    subprocess.run([program, "-b", "-c", path, user, password], check=True, capture_output=True)
    return path


class HomeAssistant:
    """A client at the house's broker: the newest payload of each topic, and all in order."""

    def __init__(self, port: int, user: str | None = None, password: str | None = None) -> None:
        self.newest: dict[str, bytes] = {}
        self.arrived: deque[tuple[str, bytes]] = deque()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self._client.username_pw_set(user, password)
        self._client.on_connect = lambda client, *_: client.subscribe("#", 1)
        self._client.on_message = self._on_message
        self._client.reconnect_delay_set(1, 1)
        self._client.connect(HOST, port)

    def __enter__(self) -> Self:
        self._client.loop_start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_message(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        payload = bytes(message.payload)
        self.newest[message.topic] = payload
        self.arrived.append((message.topic, payload))

    def publish(self, topic: str, payload: str | bytes, *, retain: bool = False) -> None:
        self._client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(10)

    def wait_for(self, topic: str, payload: bytes) -> None:
        """Wait until the newest message on a topic has a payload."""
        wait_until(lambda: self.newest.get(topic) == payload, f"{topic} is {payload!r}")

    def payloads(self, topic: str) -> list[bytes]:
        return [payload for each, payload in list(self.arrived) if each == topic]

    def answers(self, number: int, topic: str = ANSWER) -> list[dict[str, Any]]:
        """Wait for this number of answers, and return them."""
        wait_until(lambda: len(self.payloads(topic)) >= number, f"{number} answers on {topic}")
        return [json.loads(payload) for payload in self.payloads(topic)]

    def state(self, topic: str = STATE) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(self.newest.get(topic) or b"{}")
        return fields


class House:
    """A fleet in memory with the devices of `DEVICE` and `attic`, a house, and a bridge."""

    def __init__(self, stack: ExitStack, database: Path, folder: Path) -> None:
        self.stack = stack
        self.registry = stack.enter_context(Registry.open(database, "bridge"))
        for device in (DEVICE, "attic"):
            add(self.registry, device)
        add(self.registry, APP, Role.APP, targets=(DEVICE,))
        self.fleet_broker = InMemoryBroker()
        self.link = stack.enter_context(self.fleet_broker.connect(APP))
        self.house_broker = HouseBroker(folder)
        self.house_broker.start()
        stack.callback(self.house_broker.stop)
        self.ha = stack.enter_context(HomeAssistant(self.house_broker.port))
        self._bridges = stack.enter_context(ExitStack())

    def start_bridge(self, *maps: str) -> HouseBridge:
        """Start the bridge, and wait until the house sees it."""
        options = BridgeOptions(
            app=APP,
            house=HouseAddress(host=HOST, port=self.house_broker.port),
            topic_map=TopicMap.parse(maps),
        )
        watcher = ChangeWatcher(self.registry, poll_s=0.05)
        bridge = HouseBridge(self.link, self.registry, watcher, options)
        self._bridges.enter_context(bridge)
        self.ha.wait_for(BRIDGE_AVAILABILITY, b"online")
        return bridge

    def stop_bridge(self) -> None:
        self._bridges.close()

    def start_device(self, name: str = DEVICE) -> ManualDevice:
        """Start a device whose replies the test gives."""
        return ManualDevice(self.stack, self.fleet_broker, name)


@contextmanager
def running_house(database: Path, folder: Path) -> Iterator[House]:
    """Start a house whose fleet has the registry in `database`."""
    with ExitStack() as stack:
        yield House(stack, database, folder)
