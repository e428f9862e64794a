"""The events that reach a device's triggers by the registry's rights, on real brokers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from cloud_broker_worker.broker.fleet_broker import REVOCATION_S
from edge_agent.serving.event_triggers import EventTriggers
from fleet.protocol import topics
from fleet.protocol.access import Grants, Role
from fleet.protocol.prompt import PromptRequest, parse_prompt
from fleet.protocol.triggers import Trigger
from fleet.registry.store import Registry
from fleet.transport.mqtt import RETRY_S
from tests.brokers import BROKERS, WAIT_S, Inbox, Site, running_site, wait_until
from tests.fleet.conftest import add

APPS = THERMOSTAT, STRANGER = "thermostat", "stranger"
DEVICES = KITCHEN, ATTIC = "kitchen", "attic"
TRIGGERS = [
    Trigger(name=app, events=f"{app}/warmth", template="{payload}", max_in_flight=64)
    for app in APPS
]
MARKER = b"marker"
MARKER_PROMPT = PromptRequest(prompt="marker")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """Return two devices and two apps without rights."""
    with Registry.open(tmp_path / "registry.sqlite") as opened:
        for name in DEVICES:
            add(opened, name)
        for name in APPS:
            add(opened, name, Role.APP)
        yield opened


def granted(registry: Registry) -> list[Grants]:
    return [grants for name in (*DEVICES, *APPS) if (grants := registry.identities.grants(name))]


def armed(stack: ExitStack, site: Site, device: str) -> Inbox:
    """Collect the prompts of a device with triggers for both apps."""
    inbox = Inbox()
    EventTriggers(stack.enter_context(site.connect(device)), 1, inbox, lambda *_: False).set(
        TRIGGERS
    )
    return inbox


@pytest.mark.parametrize("kind", BROKERS)
def test_only_an_app_that_was_allowed_the_device_pulls_its_triggers(
    kind: str, registry: Registry, tmp_path: Path
) -> None:
    registry.identities.tag(KITCHEN, {"floor": "1"})
    registry.identities.allow(THERMOSTAT, ["floor=1"])
    registry.identities.allow(STRANGER, [ATTIC])
    with running_site(kind, tmp_path / "site", granted(registry)) as site, ExitStack() as stack:
        kitchen = armed(stack, site, KITCHEN)
        attic = armed(stack, site, ATTIC)
        thermostat, stranger = (stack.enter_context(site.connect(app)) for app in APPS)
        stranger.publish(topics.app_event(THERMOSTAT, "warmth"), b"forged", qos=1)
        stranger.publish(topics.app_event(STRANGER, "warmth"), b"from the stranger", qos=1)
        stranger.publish(topics.app_event(STRANGER, "warmth"), MARKER, qos=1)
        assert _until_marker(attic) == ["from the stranger"]
        thermostat.publish(topics.app_event(THERMOSTAT, "warmth"), b"from the thermostat", qos=1)
        thermostat.publish(topics.app_event(THERMOSTAT, "warmth"), MARKER, qos=1)
        assert _until_marker(kitchen) == ["from the thermostat"]
        assert attic.is_empty


def test_a_right_granted_while_a_device_is_connected_takes_effect(
    registry: Registry, tmp_path: Path
) -> None:
    with (
        running_site("embedded", tmp_path / "site", granted(registry)) as site,
        ExitStack() as stack,
    ):
        kitchen = armed(stack, site, KITCHEN)
        thermostat = stack.enter_context(site.connect(THERMOSTAT))

        def is_heard() -> bool:
            thermostat.publish(topics.app_event(THERMOSTAT, "warmth"), MARKER, qos=1)
            return not kitchen.is_empty

        assert not is_heard()
        registry.identities.allow(THERMOSTAT, [KITCHEN])
        site.known.update({grants.name: grants for grants in granted(registry)})
        wait_until(is_heard, "the device hears the app", RETRY_S[1] + REVOCATION_S + WAIT_S)


def test_an_app_without_its_former_right_reaches_no_device(
    registry: Registry, tmp_path: Path
) -> None:
    registry.identities.allow(THERMOSTAT, [KITCHEN])
    with (
        running_site("embedded", tmp_path / "site", granted(registry)) as site,
        ExitStack() as stack,
    ):
        kitchen = armed(stack, site, KITCHEN)
        thermostat = stack.enter_context(site.connect(THERMOSTAT))
        registry.identities.disallow(THERMOSTAT, [KITCHEN])
        site.known.update({grants.name: grants for grants in granted(registry)})

        def is_silent() -> bool:
            before = _drained(kitchen)
            thermostat.publish(topics.app_event(THERMOSTAT, "warmth"), MARKER, qos=1)
            time.sleep(0.2)
            return before == 0 and kitchen.is_empty

        wait_until(is_silent, "the device hears the app no more")


def _until_marker(inbox: Inbox) -> list[str]:
    """Return the prompts that came before the marker."""
    return [
        parse_prompt(payload).prompt or ""
        for payload in inbox.until(msgspec.json.encode(MARKER_PROMPT))
    ]


def _drained(inbox: Inbox) -> int:
    count = 0
    while not inbox.is_empty:
        inbox.get()
        count += 1
    return count
