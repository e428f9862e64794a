"""The examples for Home Assistant and Node-RED, replayed at a real broker with a real device.

Small interpreters run the parts of both systems that the examples use, and publish with paho.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import jinja2
import pytest
import yaml

from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.protocol.modes import Mode
from fleet.protocol.topics import matches
from fleet.protocol.triggers import Trigger
from tests.brokers import wait_until
from tests.fleet.server.bridge.house import AVAILABILITY, DEVICE, House, running_house
from tests.system.memory_fleet import memory_fleet

pytestmark = pytest.mark.mosquitto
EXAMPLES: Final = Path(__file__).parents[2] / "examples"
WARM: Final = '{"temperature": 31.5, "battery": 90}'
COLD: Final = '{"temperature": 12, "battery": 90}'
Message = dict[str, Any]
Publish = Callable[[str, str], None]


@pytest.fixture
def house(tmp_path: Path, ready_sqlite: Path, tiny_bundle: Bundle) -> Iterator[House]:
    """A house whose kitchen answers with a tiny model, and reacts to the sensor in the porch."""
    database = Path(shutil.copy(ready_sqlite, tmp_path / "registry.sqlite"))
    trigger = Trigger(name="dark", events="house/porch", template="{lux} lux. What to do?")
    config = AgentConfig(num_threads=1, mode=Mode.STANDALONE, max_new_tokens=4, triggers=(trigger,))
    with running_house(database, tmp_path / "house") as started, ExitStack() as stack:
        fleet = stack.enter_context(memory_fleet(started.fleet_broker))
        fleet.start_device(tiny_bundle, config, DEVICE)
        started.start_bridge("zigbee2mqtt/porch=porch")
        started.ha.wait_for(AVAILABILITY, b"online")
        yield started


class Automations:
    """The automations of a file: MQTT triggers, conditions by templates, and two actions."""

    def __init__(self, path: Path, publish: Publish) -> None:
        self._automations = yaml.safe_load(path.read_text(encoding="utf-8"))["automation"]
        self._publish = publish
        self.notifications: list[Message] = []

    def receive(self, topic: str, payload: bytes) -> None:
        for each in self._automations:
            if any(matches(trigger["topic"], topic) for trigger in each["triggers"]):
                variables = {"topic": topic, "payload_json": json.loads(payload)}
                self._run(each, {"trigger": variables})

    def _run(self, automation: Message, variables: Message) -> None:
        conditions = automation.get("conditions", [])
        if any(_render(each["value_template"], variables) != "True" for each in conditions):
            return
        for action in automation["actions"]:
            data = {key: _render(str(text), variables) for key, text in action["data"].items()}
            if action["action"] == "mqtt.publish":
                self._publish(data["topic"], data["payload"])
            else:
                assert action["action"] == "persistent_notification.create"
                self.notifications.append(data)


def _render(template: str, variables: Message) -> str:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(variables)


class Flow:
    """A flow of Node-RED: nodes by their ids, of the types that the example uses."""

    def __init__(self, path: Path, publish: Publish) -> None:
        nodes = json.loads(path.read_text(encoding="utf-8"))
        self._nodes = {node["id"]: node for node in nodes}
        self._publish = publish
        self.shown: list[str] = []
        assert len(self._nodes) == len(nodes)
        links = [self._nodes[id_] for each in nodes for ids in each.get("wires", ()) for id_ in ids]
        assert len(links) == 4  # each leads to a node

    def receive(self, topic: str, payload: bytes) -> None:
        for node in self._nodes.values():
            if node["type"] == "mqtt in" and matches(node["topic"], topic):
                assert node["datatype"] == "json"
                assert self._nodes[node["broker"]]["type"] == "mqtt-broker"
                self._pass_on(node, {"topic": topic, "payload": json.loads(payload)})

    def _pass_on(self, node: Message, message: Message) -> None:
        for id_ in node["wires"][0]:
            self._run(self._nodes[id_], message)

    def _run(self, node: Message, message: Message) -> None:
        match node["type"]:
            case "switch":
                (rule,) = node["rules"]
                assert (rule["t"], rule["vt"]) == ("gt", "num")
                if _property(message, node["property"]) > float(rule["v"]):
                    self._pass_on(node, message)
            case "template":
                fields = re.compile(r"{{(.*?)}}")
                text = fields.sub(lambda match: str(_property(message, match[1])), node["template"])
                self._pass_on(node, message | {node["field"]: text})
            case "mqtt out":
                self._publish(node["topic"], message["payload"])
            case "debug":
                self.shown.append(_property(message, node["complete"]))


def _property(message: Message, path: str) -> Any:
    value: Any = message
    for step in path.split("."):
        value = value[step]
    return value


def replay(house: House, receive: Callable[[str, bytes], None]) -> None:
    """Give each message at the house's broker to a system, until it was given an answer."""
    answers = 0
    while not answers:
        wait_until(lambda: bool(house.ha.arrived), "a message")
        topic, payload = house.ha.arrived.popleft()
        if topic.startswith(("zigbee2mqtt/", "ce-collm/")) and payload.startswith(b"{"):
            receive(topic, payload)
            answers += topic.endswith("/answer")


def test_home_assistant_asks_when_a_sensor_changes(house: House) -> None:
    automations = Automations(EXAMPLES / "home-assistant.yaml", house.ha.publish)
    house.ha.publish("zigbee2mqtt/hall", COLD)
    house.ha.publish("zigbee2mqtt/hall", WARM)
    replay(house, automations.receive)
    (notification,) = automations.notifications
    assert notification["title"] == "Kitchen"
    assert notification["message"] not in ("", "None")
    prompt = house.ha.newest["ce-collm/house/kitchen/prompt"].decode()
    assert prompt == "It is 31.5 degrees in the hall. Say in one sentence what to do."


def test_node_red_asks_when_a_sensor_changes(house: House) -> None:
    flow = Flow(EXAMPLES / "node-red.json", house.ha.publish)
    house.ha.publish("zigbee2mqtt/hall", COLD)
    house.ha.publish("zigbee2mqtt/hall", WARM)
    replay(house, flow.receive)
    (text,) = flow.shown
    assert text
    prompt = house.ha.newest["ce-collm/house/kitchen/prompt"].decode()
    assert prompt == "It is 31.5 degrees in the hall. Say in one sentence what to do."


def test_a_trigger_of_a_device_hears_a_sensor_of_the_house(house: House) -> None:
    house.ha.publish("zigbee2mqtt/porch", '{"lux": 3}')
    (answer,) = house.ha.answers(1)
    assert answer["trigger"] == "dark"
    assert answer["usage"]["tokens"] == 4
