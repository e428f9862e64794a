"""The bridge between a fleet in memory and a real broker of a house."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleet.identity.identity import CERT_FILE, KEY_FILE
from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest, Reply, parse_prompt
from fleet.protocol.report import DeviceStatus, encode_status
from fleet.registry.targets import Scope, Target
from fleet.server.bridge.bridge_options import HouseAddress
from fleet.server.bridge.house_link import HouseLink
from fleet.server.bridge.prompt_relay import MAX_OPEN
from provisioning.authority import CertificateAuthority
from tests.brokers import HOST, Inbox, wait_until
from tests.fleet.conftest import add, report
from tests.fleet.server.bridge.house import (
    ANSWER,
    APP,
    AVAILABILITY,
    BASE,
    BRIDGE_AVAILABILITY,
    CONFIG,
    DEVICE,
    MAPS,
    PROMPT,
    STATE,
    HomeAssistant,
    House,
    HouseBroker,
    running_house,
    write_password,
)
from tests.identities import issue_identity

pytestmark = pytest.mark.mosquitto
SECRET = "s3cret"


@pytest.fixture
def house(tmp_path: Path, ready_sqlite: Path) -> Iterator[House]:
    database = Path(shutil.copy(ready_sqlite, tmp_path / "registry.sqlite"))
    with running_house(database, tmp_path / "house") as started:
        yield started


def set_mode(house: House, mode: str) -> None:
    """Publish a mode of the device, as it does after it has followed its configuration."""
    status = DeviceStatus(online=True, epoch=1, mode=mode)
    topic = topics.device_status(DEVICE)
    house.link.publish(topic, encode_status(status), qos=1, retain=True)


def stored_mode(house: House) -> Mode | None:
    return house.registry.desired_state.settings(Target(Scope.DEVICE, DEVICE)).mode


def last_reply(text: str) -> Reply:
    return Reply(seq=0, text=text, done=True, finish_reason="stop", full_text=text)


def test_a_device_is_available_while_it_is_online(house: House) -> None:
    house.start_bridge()
    house.ha.wait_for(AVAILABILITY, b"offline")
    device = house.start_device()
    house.ha.wait_for(AVAILABILITY, b"online")
    device.link.drop()
    house.ha.wait_for(AVAILABILITY, b"offline")
    device.link.restore()
    device.announce(epoch=2)
    house.ha.wait_for(AVAILABILITY, b"online")
    assert "attic" not in json.dumps([topic for topic, _ in house.ha.arrived])


def test_a_prompt_of_the_house_gets_its_whole_answer(house: House) -> None:
    house.start_bridge()
    device = house.start_device()
    prompts = Inbox()
    device.link.subscribe(topics.prompts_to(DEVICE), prompts, qos=1)
    house.ha.wait_for(AVAILABILITY, b"online")
    house.ha.publish(PROMPT, "How warm is it?")
    topic, payload = prompts.get()
    assert parse_prompt(payload) == PromptRequest(prompt="How warm is it?", stream=False)
    _, app, request = topics.parse_topic(topic, topics.PROMPT_FILTER)
    assert app == APP
    device.reply((app, request), last_reply("Warm. " * 100))
    (answer,) = house.ha.answers(1)
    assert answer["full_text"] == "Warm. " * 100
    assert answer["text"] == ("Warm. " * 100)[:254] + "…"
    assert answer["trigger"] is None


def test_a_prompt_in_json_has_options(house: House) -> None:
    house.start_bridge()
    device = house.start_device()
    prompts = Inbox()
    device.link.subscribe(topics.prompts_to(DEVICE), prompts, qos=1)
    house.ha.wait_for(AVAILABILITY, b"online")
    house.ha.publish(PROMPT, '{"prompt": "Hi", "max_new_tokens": 5}')
    assert parse_prompt(prompts.get()[1]).max_new_tokens == 5
    house.ha.publish(PROMPT, '{"prompt": "Hi", "max_new_tokens": -5}')
    (answer,) = house.ha.answers(1)
    assert "max_new_tokens" in answer["error"]


def test_a_device_that_goes_offline_ends_its_prompts(house: House) -> None:
    house.start_bridge()
    house.ha.publish(PROMPT, "too early")
    (early,) = house.ha.answers(1)
    assert early["error"] == "device kitchen is offline; ask again later"
    device = house.start_device()
    house.ha.wait_for(AVAILABILITY, b"online")
    house.ha.publish(PROMPT, "Hello")
    _, request = device.next_prompt()
    device.announce(epoch=2)
    _, late = house.ha.answers(2)
    assert late["error"] == "device kitchen went offline or restarted; ask again"
    assert late["text"].startswith("error: ")
    assert device.cancelled.get(timeout=10) == request


def test_too_many_prompts_are_refused(house: House) -> None:
    house.start_bridge()
    house.start_device()
    house.ha.wait_for(AVAILABILITY, b"online")
    for number in range(MAX_OPEN + 1):
        house.ha.publish(PROMPT, f"prompt {number}")
    (answer,) = house.ha.answers(1)
    assert answer["error"].startswith(f"{MAX_OPEN} prompts of the house wait")


def test_a_chosen_mode_becomes_a_desired_setting(house: House) -> None:
    house.start_bridge()
    set_mode(house, "auto")
    wait_until(lambda: house.ha.state().get("mode") == "auto", "the mode of the device")
    for wrong in ("fast", "", "auto" * 100):
        house.ha.publish(f"{BASE}/{DEVICE}/mode/set", wrong)
    house.ha.publish(f"{BASE}/attic/mode/set", "standalone")
    house.ha.publish(f"{BASE}/{DEVICE}/mode/set", "verified")
    wait_until(lambda: stored_mode(house) is Mode.VERIFIED, "the setting")
    attic = house.registry.desired_state.settings(Target(Scope.DEVICE, "attic"))
    assert attic.mode is None
    newest = house.registry.audit_log.newest_change()
    house.ha.publish(f"{BASE}/{DEVICE}/mode/set", "verified")
    house.ha.publish(f"{BASE}/{DEVICE}/mode/set", "auto")
    wait_until(lambda: stored_mode(house) is Mode.AUTO, "the setting")
    assert house.registry.audit_log.newest_change() == newest + 1


def test_a_mapped_topic_becomes_an_event(house: House) -> None:
    events = Inbox()
    house.link.subscribe(topics.app_event(APP, topics.ANY), events)
    house.ha.publish("zigbee2mqtt/hall", '{"old": 1}', retain=True)
    house.start_bridge(*MAPS[:2])
    house.ha.publish("zigbee2mqtt/hall", '{"occupancy": true}')
    assert events.get() == (topics.app_event(APP, "hall"), b'{"occupancy": true}')
    house.ha.publish("zigbee2mqtt/Living Room", "31")
    assert events.get() == (topics.app_event(APP, "zigbee2mqtt-living-room"), b"31")
    house.ha.publish("zigbee2mqtt/hall/availability", "unmapped")
    house.ha.publish("other/topic", "unmapped")
    house.ha.publish("zigbee2mqtt/hall", b"x" * 16_385)
    house.ha.publish("zigbee2mqtt/hall", "last")
    assert events.get() == (topics.app_event(APP, "hall"), b"last")
    assert events.is_empty


def test_no_message_of_a_bridge_or_of_the_fleet_becomes_an_event(house: House) -> None:
    everything = Inbox()
    house.link.subscribe("#", everything)
    house.start_bridge(MAPS[2])
    prompt = topics.device_prompt(DEVICE, APP, "r1")
    config = topics.device_config(DEVICE)
    for topic in (prompt, config, "homeassistant/status", f"{BASE}/{DEVICE}/state"):
        house.ha.publish(topic, "{}")
    house.ha.publish("sensor/1", "last")
    assert everything.get() == (topics.app_event(APP, "all"), b"last")
    assert everything.is_empty


def test_the_answer_of_a_trigger_reaches_the_house(house: House) -> None:
    house.start_bridge()
    device = house.start_device()
    house.ha.wait_for(AVAILABILITY, b"online")
    device.reply((APP, "too-warm-1f-7"), Reply(seq=0, text="Open the"))
    device.reply((APP, "too-warm-1f-7"), last_reply("Open the window."))
    device.reply((APP, "0123456789abcdef"), last_reply("of no prompt"))
    device.reply((APP, "too-warm-1f-8"), last_reply("Close it."))
    first, second = house.ha.answers(2)
    assert (first["trigger"], first["text"]) == ("too-warm", "Open the window.")
    assert second["text"] == "Close it."


def test_a_payload_of_a_megabyte_is_not_read(house: House) -> None:
    house.start_bridge(*MAPS[:1])
    device = house.start_device()
    house.ha.wait_for(AVAILABILITY, b"online")
    house.ha.publish(PROMPT, b"x" * 1_000_000)
    house.ha.publish("zigbee2mqtt/hall", b"x" * 1_000_000)
    house.ha.publish(PROMPT, b"y" * (256 * 1024 + 1))
    (answer,) = house.ha.answers(1)
    assert "at most 262144 bytes" in answer["error"]
    house.ha.publish(PROMPT, "small")
    device.reply(device.next_prompt(), last_reply("fine"))
    assert house.ha.answers(2)[1]["text"] == "fine"
    assert house.ha.payloads(BRIDGE_AVAILABILITY) == [b"online"]


def test_a_broker_that_was_away_gets_everything_again(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    bridge = house.start_bridge()
    device = house.start_device()
    house.ha.wait_for(AVAILABILITY, b"online")
    house.ha.publish(PROMPT, "Hello")
    prompt = device.next_prompt()
    house.house_broker.stop()
    wait_until(lambda: not bridge.house.is_up, "the link is down")
    house.ha.newest.clear()
    house.house_broker.start()
    wait_until(lambda: bridge.house.is_up, "the link is up")
    house.ha.wait_for(BRIDGE_AVAILABILITY, b"online")
    house.ha.wait_for(AVAILABILITY, b"online")
    assert json.loads(house.ha.newest[CONFIG])["dev"]["name"] == DEVICE
    device.reply(prompt, last_reply("of a prompt from before"))
    assert house.ha.answers(1)[0]["text"] == "of a prompt from before"
    house.ha.publish(PROMPT, "Again")
    device.reply(device.next_prompt(), last_reply("back"))
    assert house.ha.answers(2)[1]["text"] == "back"
    assert "lost its link" in caplog.text


def test_a_fleet_that_is_away_makes_the_bridge_offline(house: House) -> None:
    house.start_bridge()
    house.start_device()
    house.ha.wait_for(AVAILABILITY, b"online")
    house.link.drop()
    house.ha.wait_for(BRIDGE_AVAILABILITY, b"offline")
    house.ha.publish(PROMPT, "Hello")
    assert "offline" in house.ha.answers(1)[0]["error"]
    house.link.restore()
    house.ha.wait_for(BRIDGE_AVAILABILITY, b"online")


def test_a_bridge_that_ends_is_offline(house: House) -> None:
    house.start_bridge()
    house.stop_bridge()
    house.ha.wait_for(BRIDGE_AVAILABILITY, b"offline")


def test_the_house_sees_the_devices_of_the_app_as_its_rights_change(house: House) -> None:
    house.start_bridge()
    house.start_device()
    house.ha.wait_for(AVAILABILITY, b"online")
    house.registry.identities.allow(APP, ["attic"])
    attic = CONFIG.replace(DEVICE, "attic")
    wait_until(lambda: bool(house.ha.newest.get(attic)), "the description of the attic")
    house.registry.identities.disallow(APP, [DEVICE])
    for topic in (CONFIG, AVAILABILITY, STATE):
        house.ha.wait_for(topic, b"")
    house.ha.publish(PROMPT, "Hello")
    house.ha.publish(f"{BASE}/{DEVICE}/mode/set", "verified")
    house.ha.publish(f"{BASE}/attic/mode/set", "verified")
    target = Target(Scope.DEVICE, "attic")
    settings = house.registry.desired_state.settings
    wait_until(lambda: settings(target).mode is Mode.VERIFIED, "the setting of the attic")
    assert stored_mode(house) is None
    assert house.ha.payloads(ANSWER) == []


def test_many_devices_are_shown(house: House) -> None:
    names = [f"device-{number}" for number in range(60)]
    for name in names:
        add(house.registry, name)
    house.registry.identities.allow(APP, names)
    house.start_bridge()
    topics_of_all = [f"{BASE}/{name}/availability" for name in names]
    wait_until(lambda: house.ha.newest.keys() >= set(topics_of_all), "all devices")
    assert {house.ha.newest[topic] for topic in topics_of_all} == {b"offline"}


def test_a_revoked_bridge_shows_no_device(house: House) -> None:
    house.start_bridge()
    device = house.start_device()
    house.ha.wait_for(AVAILABILITY, b"online")
    house.ha.publish(PROMPT, "Hello")
    _, request = device.next_prompt()
    house.registry.identities.revoke(APP)
    house.ha.wait_for(CONFIG, b"")
    assert device.cancelled.get(timeout=10) == request
    house.ha.publish(PROMPT, "Hello")
    house.ha.publish(f"{BASE}/{DEVICE}/mode/set", "verified")
    house.ha.wait_for(AVAILABILITY, b"")
    assert device.prompts.empty()
    assert stored_mode(house) is None


def test_descriptions_of_an_earlier_run_are_cleared(house: House) -> None:
    stale = CONFIG.replace(DEVICE, "cellar")
    foreign = "homeassistant/device/other/cellar/config"
    for topic in (stale, foreign):
        house.ha.publish(topic, '{"old": true}', retain=True)
    house.start_bridge()
    house.ha.wait_for(stale, b"")
    assert house.ha.newest[foreign] == b'{"old": true}'
    assert house.ha.newest[CONFIG] != b""


def test_retained_prompts_are_not_sent_again(house: House) -> None:
    house.ha.publish(PROMPT, "old", retain=True)
    house.ha.publish(f"{BASE}/{DEVICE}/mode/set", "verified", retain=True)
    device = house.start_device()
    house.start_bridge()
    house.ha.wait_for(AVAILABILITY, b"online")
    house.ha.publish(PROMPT, "new")
    device.reply(device.next_prompt(), last_reply("one"))
    house.ha.answers(1)
    assert device.prompts.empty()
    assert stored_mode(house) is None


def test_the_state_has_the_statistics_of_the_last_hour(house: House) -> None:
    house.registry.rollouts.add_bundle("b1", "tiny", 1)
    house.registry.stats.record_report(DEVICE, report(started_at=time.time(), tpot_ms=50.0))
    house.start_bridge()
    set_mode(house, "collaborative")
    wait_until(lambda: house.ha.state().get("mode") == "collaborative", "the mode")
    wait_until(lambda: house.ha.state()["offload_rate"] is not None, "the statistics")
    state = house.ha.state()
    assert state["offload_rate"] == 20.0
    assert state["tokens_per_second"] == pytest.approx(20.0, rel=0.2)


@pytest.fixture
def closed_broker(tmp_path: Path) -> Iterator[HouseBroker]:
    """A broker that knows one user."""
    passwords = write_password(tmp_path, "fleet", SECRET)
    access = ("allow_anonymous false", f"password_file {passwords}")
    broker = HouseBroker(tmp_path / "house", access)
    broker.start()
    yield broker
    broker.stop()


@contextmanager
def linked(address: HouseAddress) -> Iterator[HouseLink]:
    address.check()
    link = HouseLink(
        address, APP, {}, lambda: None, will_topic=BRIDGE_AVAILABILITY, will=b"offline"
    )
    with link:
        yield link


def address_with(broker: HouseBroker, password_file: Path, password: str) -> HouseAddress:
    password_file.write_text(password + "\n", encoding="utf-8")
    return HouseAddress(host=HOST, port=broker.port, user="fleet", password_file=password_file)


def test_a_wrong_password_is_reported_once_and_shown_nowhere(
    closed_broker: HouseBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    address = address_with(closed_broker, tmp_path / "password", "wr0ng")
    with linked(address) as link:
        wait_until(lambda: "Not authorized" in caplog.text, "a refusal")
        assert not link.is_up
    assert "wr0ng" not in repr(address) + caplog.text + " ".join(address.arguments())
    assert caplog.text.count("Not authorized") == 1


def test_a_password_of_a_file_opens_the_link(
    closed_broker: HouseBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    address = address_with(closed_broker, tmp_path / "password", SECRET)
    with linked(address) as link, HomeAssistant(closed_broker.port, "fleet", SECRET) as ha:
        wait_until(lambda: link.is_up, "the link")
        link.publish_state("room", b"1")
        ha.wait_for("room", b"1")
    assert SECRET not in caplog.text + repr(link.__dict__)


def test_a_certificate_opens_the_link(tmp_path: Path) -> None:
    authority = CertificateAuthority.create(tmp_path / "ca")
    tls = authority.server_tls(tmp_path / "server", HOST)
    files = f"cafile {tls.ca_file}", f"certfile {tls.cert_file}", f"keyfile {tls.key_file}"
    access = (*files, "require_certificate true", "use_identity_as_username true")
    broker = HouseBroker(tmp_path / "house", (*access, "allow_anonymous true"))
    identity = issue_identity(
        authority, "bridge", Role.APP, tmp_path / "id", host=HOST, port=broker.port
    )
    broker.start()
    address = HouseAddress(
        host=HOST,
        port=broker.port,
        ca_file=tls.ca_file,
        cert_file=identity.folder / CERT_FILE,
        key_file=identity.folder / KEY_FILE,
    )
    try:
        with linked(address) as link:
            wait_until(lambda: link.is_up, "the link")
    finally:
        broker.stop()


def test_missing_rights_at_the_broker_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rights = tmp_path / "acl"
    rights.write_text("topic read other\n", encoding="utf-8")
    broker = HouseBroker(tmp_path / "house", ("allow_anonymous true", f"acl_file {rights}"))
    broker.start()
    address = HouseAddress(host=HOST, port=broker.port)
    try:
        with linked(address) as link:
            wait_until(lambda: link.is_up, "the link")
            link.publish_state("room", b"1")
            wait_until(lambda: "broker refuses a message" in caplog.text, "a refusal")
    finally:
        broker.stop()
