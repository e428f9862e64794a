"""The supervisor with a real model and real downloads, on a broker in memory."""

from __future__ import annotations

import gc
import queue
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import pytest

from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent, refuse_prompts
from edge_agent.state.bundle_slots import Slots, SlotStore, begin_trial
from edge_agent.update.download import fetch_bundle
from edge_agent.update.supervisor import CHECK_S, Supervisor
from fleet.bundles.manifest import Bundle, Manifest, hash_file, read_manifest, write_manifest
from fleet.errors import ConfigError, PromptError
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.protocol.desired_config import DesiredConfig, Settings, encode_desired
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest, Reply
from fleet.protocol.report import DeviceStatus, decode_status
from fleet.transport.base import Will
from fleet.transport.in_memory import InMemoryBroker, InMemoryTransport
from fleet.transport.prompt_client import PromptClient
from tests.conftest import MakeTinyBundle
from tests.edge_agent.fleet_service import FleetService

NAME: Final = "kitchen"
WAIT_S: Final = 30.0
OWN: Final = AgentConfig(mode=Mode.STANDALONE, num_threads=1, max_new_tokens=5)
ASKED: Final = PromptRequest(prompt="How warm is it?")


def problem_of(status: DeviceStatus) -> str:
    """Return the message of a status with a problem."""
    assert status.config_error is not None
    return status.config_error.message


class Device:
    """One device that a test starts and stops; the broker keeps retained messages only."""

    def __init__(self, identity: Identity, base: Path | None, own: AgentConfig = OWN) -> None:
        self.broker = InMemoryBroker()
        self.folder = identity.folder
        self.link: InMemoryTransport
        self.supervisor: Supervisor
        self._identity = identity
        self._base = base
        self._own = own
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._statuses: queue.Queue[DeviceStatus] = queue.Queue()
        self._watcher = self.broker.connect("watcher")
        self._watcher.subscribe(topics.device_status(NAME), self._on_status, qos=1)
        self.client = PromptClient(self.broker.connect("app"))

    def _on_status(self, topic: str, payload: bytes) -> None:
        self._statuses.put(decode_status(payload, DeviceStatus))

    def start(self) -> DeviceStatus:
        """Start the device; return its first status."""
        self._stop = threading.Event()
        will = Will(topics.device_status(NAME), Agent.will())
        self.link = self.broker.connect(NAME, will)
        self.supervisor = Supervisor(
            self.folder, self._own, self._base, partial(fetch_bundle, self._identity)
        )
        self.supervisor.prepare(self._stop)
        self._thread = threading.Thread(target=self.supervisor.run, args=(self.link,), daemon=True)
        self._thread.start()
        return self.status(lambda status: status.online)

    def end(self) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join(WAIT_S)
            assert not self._thread.is_alive()
            self.link.close()
            self._thread = None

    def close(self) -> None:
        self.end()
        self._watcher.close()

    def want(self, version: int, **settings: object) -> None:
        self.say(encode_desired(DesiredConfig(version, Settings(**settings))))  # type: ignore[arg-type]

    def say(self, payload: bytes) -> None:
        self._watcher.publish(topics.device_config(NAME), payload, qos=1, retain=True)

    def forget_wishes(self) -> None:
        self.say(b"")

    def status(self, is_it: Callable[[DeviceStatus], bool]) -> DeviceStatus:
        """Return the next status that satisfies a condition."""
        while not is_it(status := self._statuses.get(timeout=WAIT_S)):
            pass
        return status

    def ask(self, request: PromptRequest = ASKED) -> list[Reply]:
        return list(self.client.ask(NAME, request, timeout_s=WAIT_S))


@pytest.fixture
def identity(service: FleetService, tmp_path: Path) -> Identity:
    return service.identity(tmp_path / "identity")


@pytest.fixture
def device(identity: Identity, tiny_bundle: Bundle) -> Iterator[Device]:
    """A device that was enrolled with a bundle in its own folder."""
    device = Device(identity, tiny_bundle.folder)
    yield device
    device.close()


@pytest.fixture
def other(service: FleetService, make_tiny_bundle: MakeTinyBundle, tmp_path: Path) -> Manifest:
    """A bundle with three exits that the service offers."""
    return service.publish(make_tiny_bundle((1, 2, 3)).folder)


def publish_broken(service: FleetService, folder: Path, tmp_path: Path) -> Manifest:
    """Publish a bundle that matches its manifest, and has no usable model."""
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    (copy / "edge/block_0.onnx").write_bytes(b"no graph")
    manifest = read_manifest(copy)
    files = tuple(
        type(entry)(entry.path, (copy / entry.path).stat().st_size, hash_file(copy / entry.path))
        for entry in manifest.files
    )
    write_manifest(copy, msgspec.structs.replace(manifest, files=files))
    return service.publish(copy)


def test_settings_apply_from_the_next_answer_on_without_a_restart(device: Device) -> None:
    epoch = device.start().epoch
    device.want(3, max_new_tokens=2, mode=Mode.COLLABORATIVE, threshold=0.0)
    status = device.status(lambda status: status.config_version == 3)
    assert (status.epoch, status.mode, status.config_error) == (epoch, "collaborative", None)
    replies = device.ask()
    assert replies[-1].usage
    assert (replies[-1].usage.tokens, replies[-1].usage.sources) == (2, {"exit:1": 2})


def test_a_removed_setting_is_the_devices_own_again(device: Device) -> None:
    device.start()
    device.want(3, max_new_tokens=2)
    device.want(4)
    device.status(lambda status: status.config_version == 4)
    assert len(device.ask()) == OWN.max_new_tokens + 1


def test_settings_are_kept_for_a_start_without_the_fleet(device: Device) -> None:
    device.start()
    device.want(3, max_new_tokens=2)
    device.status(lambda status: status.config_version == 3)
    device.end()
    device.forget_wishes()
    assert device.start().config_version == 3
    assert len(device.ask()) == 3


def test_thresholds_that_do_not_fit_change_nothing_and_are_reported(device: Device) -> None:
    device.start()
    device.want(3, max_new_tokens=2)
    device.want(4, max_new_tokens=1, thresholds=(0.5,))
    status = device.status(lambda status: bool(status.config_error))
    assert status.config_version == 3
    assert "1 thresholds, expected 2" in problem_of(status)
    assert len(device.ask()) == 3


def test_an_error_is_over_with_the_next_configuration(device: Device) -> None:
    device.start()
    device.want(4, thresholds=(0.5,))
    device.status(lambda status: bool(status.config_error))
    device.want(5, max_new_tokens=2)
    assert device.status(lambda status: status.config_version == 5).config_error is None


def test_an_unreadable_configuration_is_reported(device: Device) -> None:
    device.start()
    device.say(b'{"version": 3, "settings": {"colour": "red"}}')
    status = device.status(lambda status: bool(status.config_error))
    assert "cannot be read" in problem_of(status)
    assert status.config_version == 0


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (Settings(thresholds=(0.1,)), "thresholds"),
        (Settings(system_prompt="x" * 8000), "system_prompt"),
    ],
)
def test_saved_settings_that_do_not_fit_the_bundle_are_not_applied(
    settings: Settings, field: str, device: Device, identity: Identity
) -> None:
    (identity.folder / "desired.json").write_bytes(encode_desired(DesiredConfig(3, settings)))
    status = device.start()
    assert status.config_version == 0
    assert field in problem_of(status)
    assert len(device.ask()) == 6


def test_defaults_for_prompts_apply_from_the_next_answer_on(device: Device) -> None:
    device.start()
    before = device.ask()[-1].usage
    device.want(1, system_prompt="Be short.", temperature=0.5)
    device.status(lambda status: status.config_version == 1)
    after = device.ask()[-1].usage
    device.want(2, system_prompt="x" * 8000)
    status = device.status(lambda status: bool(status.config_error))
    assert before
    assert after
    assert after.prompt_tokens > before.prompt_tokens
    assert after.sampling
    assert after.sampling.temperature == 0.5
    assert "system_prompt" in problem_of(status)
    assert status.config_version == 1


def test_another_bundle_is_fetched_and_served_in_the_same_process(
    device: Device, other: Manifest
) -> None:
    before = device.start()
    device.want(3, bundle=other.bundle_id, thresholds=(0.0, 1.0, 1.0))
    status = device.status(lambda status: status.config_version == 3)
    assert (status.bundle_id, status.config_error) == (other.bundle_id, None)
    assert before.bundle_id != other.bundle_id
    assert device.ask()[-1].bundle_id == other.bundle_id
    assert SlotStore(device.folder).load() == Slots(current=other.bundle_id)


def test_the_old_agent_leaves_nothing_behind(device: Device, other: Manifest) -> None:
    device.start()
    old = weakref.ref(device.supervisor._agent)
    device.ask()
    device.want(3, bundle=other.bundle_id)
    device.status(lambda status: status.config_version == 3)
    gc.collect()
    assert old() is None


def test_a_bundle_that_is_served_survives_the_process(device: Device, other: Manifest) -> None:
    device.start()
    device.want(3, bundle=other.bundle_id)
    device.status(lambda status: status.config_version == 3)
    device.end()
    device.forget_wishes()
    assert device.start().bundle_id == other.bundle_id


def test_the_bundle_of_the_identity_is_served_again_without_a_download(
    device: Device, other: Manifest, service: FleetService, tiny_bundle: Bundle
) -> None:
    device.start()
    device.want(3, bundle=other.bundle_id)
    device.status(lambda status: status.config_version == 3)
    num_requests = len(service.requests)
    device.want(4, bundle=tiny_bundle.manifest.bundle_id)
    status = device.status(lambda status: status.config_version == 4)
    assert status.bundle_id == tiny_bundle.manifest.bundle_id
    assert len(service.requests) == num_requests


def test_an_active_answer_ends_on_the_old_bundle(
    device: Device, other: Manifest, tiny_bundle: Bundle
) -> None:
    device.start()
    answer = device.client.ask(
        NAME, PromptRequest(prompt="x", max_new_tokens=400), timeout_s=WAIT_S
    )
    next(answer)
    device.want(3, bundle=other.bundle_id)
    last = list(answer)[-1]
    assert (last.bundle_id, last.finish_reason) == (tiny_bundle.manifest.bundle_id, "length")
    assert device.status(lambda status: status.config_version == 3).bundle_id == other.bundle_id


def test_a_bundle_that_does_not_start_is_abandoned(
    device: Device, service: FleetService, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    broken = publish_broken(service, tiny_bundle.folder, tmp_path)
    device.start()
    device.want(3, max_new_tokens=2)
    device.want(4, bundle=broken.bundle_id, max_new_tokens=1)
    status = device.status(lambda status: bool(status.config_error))
    assert (status.bundle_id, status.config_version) == (tiny_bundle.manifest.bundle_id, 3)
    assert f"bundle {broken.bundle_id} is abandoned" in problem_of(status)
    assert len(device.ask()) == 3


def test_an_abandoned_bundle_is_not_tried_again_for_the_same_version(
    device: Device, service: FleetService, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    broken = publish_broken(service, tiny_bundle.folder, tmp_path)
    device.start()
    device.want(4, bundle=broken.bundle_id)
    device.status(lambda status: bool(status.config_error))
    device.end()
    num_requests = len(service.requests)
    assert "is abandoned" in problem_of(device.start())
    device.ask()
    assert len(service.requests) == num_requests


def test_a_device_that_died_in_a_trial_restarts_on_the_old_bundle(
    device: Device, other: Manifest, tiny_bundle: Bundle
) -> None:
    SlotStore(device.folder).save(begin_trial(Slots(), other.bundle_id, 3))
    device.want(3, bundle=other.bundle_id)
    status = device.start()
    assert status.bundle_id == tiny_bundle.manifest.bundle_id
    assert "died" in problem_of(status)
    device.want(5, bundle=other.bundle_id)
    assert device.status(lambda status: status.config_version == 5).bundle_id == other.bundle_id


def test_a_bundle_that_cannot_be_downloaded_is_reported_and_the_old_one_is_served(
    device: Device, other: Manifest
) -> None:
    device.start()
    device.want(3, bundle="b7", max_new_tokens=1)
    status = device.status(lambda status: bool(status.config_error))
    assert (status.config_version, "b7" in problem_of(status)) == (0, True)
    assert len(device.ask()) == OWN.max_new_tokens + 1


def test_thresholds_that_do_not_fit_the_new_bundle_keep_the_old_one(
    device: Device, other: Manifest, tiny_bundle: Bundle
) -> None:
    device.start()
    device.want(3, bundle=other.bundle_id, thresholds=(0.1, 0.2))
    status = device.status(lambda status: bool(status.config_error))
    assert status.bundle_id == tiny_bundle.manifest.bundle_id
    assert "2 thresholds, expected 3" in problem_of(status)


def test_a_device_that_joined_downloads_its_bundle_before_it_serves(
    identity: Identity, other: Manifest
) -> None:
    SlotStore(identity.folder).save(Slots(current=other.bundle_id))
    device = Device(identity, None)
    try:
        assert device.start().bundle_id == other.bundle_id
    finally:
        device.close()


def test_a_bundle_that_was_damaged_on_disk_is_repaired_at_the_start(
    identity: Identity, other: Manifest
) -> None:
    SlotStore(identity.folder).save(Slots(current=other.bundle_id))
    folder = fetch_bundle(identity, other.bundle_id, threading.Event())
    (folder / "edge/block_0.onnx").write_bytes(b"damaged")
    device = Device(identity, None)
    try:
        assert device.start().bundle_id == other.bundle_id
    finally:
        device.close()


def test_an_identity_without_a_bundle_gives_an_error_with_advice(identity: Identity) -> None:
    with pytest.raises(ConfigError, match="names no bundle; pass one with --bundle DIR"):
        Supervisor(identity.folder, OWN, None, partial(fetch_bundle, identity)).prepare(
            threading.Event()
        )


def test_between_two_agents_a_prompt_is_refused_as_busy(device: Device) -> None:
    link = device.broker.connect(NAME)
    refuse_prompts(link)
    with pytest.raises(PromptError, match="changing its model"):
        device.ask()
    link.close()


def test_a_signal_whose_handler_outlasts_the_wait_for_events_stops_the_device(
    device: Device, identity: Identity, tiny_bundle: Bundle
) -> None:
    """After such a signal a `SimpleQueue` of CPython 3.11 waits forever.

    Only the main thread receives signals.
    """
    stop = threading.Event()
    main = threading.main_thread().ident
    assert main == threading.get_ident()

    def on_signal(*_: object) -> None:
        time.sleep(2 * CHECK_S)
        stop.set()

    def send_signal() -> None:
        device.status(lambda status: status.online)
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, on_signal)
    try:
        with device.broker.connect(NAME) as link:
            supervisor = Supervisor(
                identity.folder, OWN, tiny_bundle.folder, partial(fetch_bundle, identity)
            )
            supervisor.prepare(stop)
            threading.Thread(target=send_signal, daemon=True).start()
            supervisor.run(link)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not device.status(lambda status: not status.online).online
