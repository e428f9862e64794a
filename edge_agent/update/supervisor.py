"""The supervisor of a device: one agent at a time, with the bundle and settings that are desired.

All agents use one connection to the broker.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import Final

from edge_agent.config import AgentConfig
from edge_agent.generation.suffix_tables import TABLES_FOLDER
from edge_agent.reporting.report_outbox import REPORTS_FILE
from edge_agent.serving.agent import Agent, refuse_prompts
from edge_agent.state.bundle_slots import (
    Slots,
    SlotStore,
    abandon_trial,
    after_restart,
    begin_trial,
    confirm_trial,
)
from edge_agent.state.desired_state import (
    NO_DESIRED_CONFIG,
    ConfigStep,
    load_desired,
    merge_settings,
    next_step,
    save_desired,
)
from edge_agent.update.background_download import BackgroundDownload, Fetch
from edge_agent.update.launcher import software_store
from edge_agent.update.software_updater import Install, SoftwareUpdater
from fleet.bundles.manifest import EDGE_SIDES, Bundle, Manifest, read_manifest
from fleet.errors import BundleError, ConfigError, FleetError, ProtocolError
from fleet.identity.service_client import log_wait, retry_while_away
from fleet.protocol import topics
from fleet.protocol.desired_config import DesiredConfig, decode_desired
from fleet.protocol.report import ConfigProblem
from fleet.protocol.types import MAX_LABEL_LENGTH
from fleet.transport.base import Transport
from fleet.utils.memory_release import release_unused_memory

DRAIN_S: Final = 60.0  # for active requests, before a device changes its bundle
CHECK_S: Final = 0.25
MAX_LATE_S: Final = 60.0  # longer than one step of the model; deadlines are checked after each
STORAGE_CODE: Final = "storage"

log = logging.getLogger(__name__)


class Supervisor:
    """The supervisor of `edge-agent run`.

    `folder` is the identity folder. `base` is the bundle that the identity or the command line
    names. `fetch` downloads a bundle into its slot (`fetch_bundle`). `install` installs a version
    of the software into its slot (`install_software`); it is None for a device that does not
    update. `on_serving` is called with the manifest of each bundle when its serving begins. Call
    `prepare` first, then `run`, both on one thread. If `is_replaced` is true after `run`, the
    caller has to start another version of the software.
    `on_cycle` is called several times a second while the device makes progress.
    """

    def __init__(
        self,
        folder: Path,
        own: AgentConfig,
        base: Path | None,
        fetch: Fetch,
        on_serving: Callable[[Manifest], None] = lambda _: None,
        *,
        install: Install | None = None,
        drain_s: float = DRAIN_S,
    ) -> None:
        self._folder = folder
        self._own = own
        self._base = base
        self._fetch = fetch
        self._on_serving = on_serving
        self._drain_s = drain_s
        self._store = SlotStore(folder)
        self._slots = Slots()
        self._followed = NO_DESIRED_CONFIG
        self._desired = NO_DESIRED_CONFIG
        self._config = own
        self._problem: ConfigProblem | None = None
        self._agent: Agent | None = None
        # Not a SimpleQueue, which can block forever after a signal.
        self._events: Queue[Callable[[], None]] = Queue()
        self._stop = threading.Event()
        self.is_replaced = False
        self._software = SoftwareUpdater(
            software_store(folder),
            install,
            lambda version: self._events.put(partial(self._on_installed, version)),
            lambda version, problem: self._events.put(
                partial(self._on_not_installed, version, problem)
            ),
            timeout_s=own.update_timeout_s,
        )
        self.on_cycle: Callable[[], None] = lambda: None
        self._download = BackgroundDownload(
            fetch,
            lambda bundle, path: self._events.put(partial(self._on_downloaded, bundle, path)),
            lambda bundle, problem: self._events.put(
                partial(self._on_not_downloaded, bundle, problem)
            ),
        )

    def prepare(self, stop: threading.Event) -> None:
        """Load the bundle that was served last, or download it where it is missing.

        A trial during which the last process died is abandoned.

        Raises:
            ConfigError: no bundle is named, or `agent.json` does not fit the bundle.
            BundleError, ServiceError: the bundle is damaged, and cannot be downloaded.
        """
        self._stop = stop
        self._base_id = self._read_base()
        self._slots = self._store.load()
        self._save_slots(after_restart(self._slots))
        if self._slots.given_up:
            self._problem = self._slots.given_up.problem
            log.warning("%s", self._problem.message)
        self._bundle = self._load(self._slots.current)
        self._desired = load_desired(self._folder)
        self._followed = self._desired
        manifest = self._bundle.manifest
        try:
            self._config = merge_settings(self._own, self._followed.settings, manifest)
        except ConfigError as error:
            self._follow_none(error)

    def _follow_none(self, error: ConfigError) -> None:
        """Use the device's own settings alone, because the fleet's do not fit the bundle."""
        self._followed = NO_DESIRED_CONFIG
        self._problem = ConfigProblem.of(error)
        settings = self._followed.settings
        self._config = merge_settings(self._own, settings, self._bundle.manifest)

    def run(self, transport: Transport) -> None:
        """Serve until the event of `prepare` is set; raise FleetError if the agent cannot start."""
        self._transport = transport
        self._start_followed()
        topic = topics.device_config(transport.name)
        try:
            transport.subscribe(topic, self._on_config, qos=1)
            while not self._stop.is_set():
                self._report_progress()
                try:
                    self._events.get(timeout=CHECK_S)()
                except Empty:
                    continue
        finally:
            transport.unsubscribe(topic)
            self._download.cancel()
            self._software.close()
            if self._agent:
                self._agent.__exit__(None, None, None)

    def _start_followed(self) -> None:
        """Start with the settings that were followed last, or without those of the fleet.

        The model's chat template decides on a system prompt, and is not known before.
        """
        try:
            self._start(self._bundle, self._config, self._followed.version, self._problem)
        except ConfigError as error:
            if self._followed is NO_DESIRED_CONFIG:
                raise
            self._follow_none(error)
            self._start(self._bundle, self._config, self._followed.version, self._problem)

    def _report_progress(self) -> None:
        """Call `on_cycle`, unless an answer is so late that its thread must hang."""
        if self._agent is None or self._agent.late_s < MAX_LATE_S:
            self.on_cycle()

    # Messages arrive on other threads.

    def _on_config(self, topic: str, payload: bytes) -> None:
        if not payload:  # the retained message was cleared; keep the configuration
            return
        try:
            desired = decode_desired(payload)
        except ProtocolError as error:
            log.warning("message on %s dropped: %s", topic, error)
            reason = f"the configuration cannot be read: {error}"
            self._events.put(partial(self._publish_problem, _problem(error.code, reason)))
        else:
            self._events.put(partial(self._on_desired, desired))

    # Messages are processed on the thread of `run`.

    def _on_desired(self, desired: DesiredConfig) -> None:
        self._desired = desired
        self._follow_software(desired)
        if self.is_replaced:
            return
        step = next_step(desired, self._followed, self._slots, self._serving)
        if step is not ConfigStep.CHANGE:
            self._download.cancel()
        match step:
            case ConfigStep.STAY:
                self._publish_problem(None)
            case ConfigStep.ADOPT:
                self._adopt(desired)
            case ConfigStep.REFUSE:
                given_up = self._slots.given_up
                self._publish_problem(given_up.problem if given_up else None)
            case ConfigStep.CHANGE:
                self._change_bundle(desired)

    def _follow_software(self, desired: DesiredConfig) -> None:
        problem = self._software.problem
        if self._software.follow(desired):
            self._replace_software()
        elif self._agent and self._software.problem != problem:
            self._agent.report_software(self._software.problem)

    def _on_installed(self, version: str) -> None:
        if self._software.is_desired(version):
            self._replace_software()

    def _on_not_installed(self, version: str, problem: ConfigProblem) -> None:
        if self._software.is_desired(version):
            self._report_software(problem)

    def _report_software(self, problem: ConfigProblem) -> None:
        log.warning("%s", problem.message)
        self._software.problem = problem
        if self._agent:
            self._agent.report_software(problem)

    def _replace_software(self) -> None:
        """Stop, so that the caller can start the desired version on trial."""
        if not self._drained():
            return
        if problem := self._software.place():  # a trial that is not on disk must not begin
            self._report_software(problem)
            if self._agent:
                self._agent.resume()
            return
        self.is_replaced = True
        self._stop.set()

    def _adopt(self, desired: DesiredConfig) -> None:
        """Apply settings that need no other bundle."""
        try:
            config = merge_settings(self._own, desired.settings, self._bundle.manifest)
            if self._agent:
                self._agent.follow(config, desired.version)
        except FleetError as error:
            self._publish_problem(ConfigProblem.of(error))
            return
        self._config = config
        self._problem = None
        self._save_desired(desired)

    def _change_bundle(self, desired: DesiredConfig) -> None:
        """Switch to the base bundle, or download the desired one first."""
        bundle = desired.settings.bundle or ""
        self._publish_problem(None)
        if self._base and bundle == self._base_id:
            self._switch(desired, self._base)
        else:
            self._store.remove_unneeded(self._slots, bundle)
            self._download.start(bundle)

    def _on_downloaded(self, bundle: str, path: Path) -> None:
        if bundle == self._desired.settings.bundle and bundle != self._serving:
            self._switch(self._desired, path)

    def _on_not_downloaded(self, bundle: str, problem: ConfigProblem) -> None:
        if bundle == self._desired.settings.bundle:
            self._publish_problem(problem)

    def _publish_problem(self, problem: ConfigProblem | None) -> None:
        """Publish a new reason why the desired configuration is not applied, or None."""
        if problem == self._problem:
            return
        if problem:
            version = self._desired.version
            log.warning("configuration %d is not applied: %s", version, problem.message)
        self._problem = problem
        if self._agent:
            self._agent.follow(self._config, self._followed.version, problem)

    def _switch(self, desired: DesiredConfig, folder: Path) -> None:
        """Start the trial of the desired bundle; continue with the previous one when it fails."""
        if not self._drained():
            return
        previous = self._slots
        trial = begin_trial(previous, desired.settings.bundle or "", desired.version)
        if problem := self._save_slots(trial):
            self._slots = previous  # a trial that is not on disk must not begin
            self._publish_problem(problem)
            if self._agent:
                self._agent.resume()
            return
        self._close_agent()
        if reason := self._try(desired, folder):
            self._return_to_previous(reason)
            return
        self._problem = self._save_slots(confirm_trial(self._slots))
        self._save_desired(desired)
        self._store.remove_unneeded(self._slots)
        if self._agent:  # after the bundle is confirmed on disk
            self._agent.follow(self._config, desired.version, self._problem)

    def _return_to_previous(self, reason: str) -> None:
        slots = abandon_trial(self._slots, reason)
        self._save_slots(slots)
        self._problem = slots.given_up.problem if slots.given_up else None
        text = "%s; bundle %s is served again"
        log.warning(text, self._problem and self._problem.message, self._serving)
        self._start(self._bundle, self._config, self._followed.version, self._problem)

    def _try(self, desired: DesiredConfig, folder: Path) -> str:
        """Start with another bundle; return why it does not start, or ""."""
        try:
            bundle = Bundle.load(folder, EDGE_SIDES)
            config = merge_settings(self._own, desired.settings, bundle.manifest)
            self._start(bundle, config, self._followed.version, is_trial=True)
        except FleetError as error:
            return str(error)
        except Exception as error:  # the device has to return to its bundle after any error
            log.exception("bundle %s does not start", desired.settings.bundle)
            return f"it does not start: {error}"
        self._bundle = bundle
        self._config = config
        return ""

    def _drained(self) -> bool:
        """Wait for active requests, at most `drain_s` seconds; False when the device stops."""
        if self._agent:
            self._agent.pause()
        deadline = time.monotonic() + self._drain_s
        while (
            self._agent
            and not self._agent.is_idle
            and time.monotonic() < deadline
            and not self._stop.is_set()
        ):
            self._report_progress()
            time.sleep(CHECK_S / 5)
        return not self._stop.is_set()

    def _close_agent(self) -> None:
        """Close the agent and release its memory, before another agent allocates as much."""
        if self._agent:
            self._agent.close()
        refuse_prompts(self._transport)
        self._agent = None
        release_unused_memory()

    def _start(
        self,
        bundle: Bundle,
        config: AgentConfig,
        version: int,
        problem: ConfigProblem | None = None,
        *,
        is_trial: bool = False,
    ) -> None:
        """Start an agent.

        Raises:
            FleetError: the agent does not start, or cannot run a step on trial.
        """
        reports = self._folder / REPORTS_FILE
        is_checked = is_trial or self._software.is_trial
        agent = Agent(
            self._transport,
            bundle,
            config,
            reports,
            tables_folder=self._folder / TABLES_FOLDER,
            is_trial=is_checked,
        )
        agent.follow(config, version, problem)
        agent.report_software(self._software.problem)
        self._agent = agent.__enter__()
        self._on_serving(bundle.manifest)

    @property
    def agent(self) -> Agent | None:
        """The agent that serves now; None while the device changes its bundle."""
        return self._agent

    @property
    def _serving(self) -> str:
        return self._bundle.manifest.bundle_id

    def _load(self, bundle: str | None) -> Bundle:
        """Load the base, or the bundle of a slot. Download a bundle that is damaged or missing."""
        if bundle in (None, self._base_id):
            if self._base is None:
                raise ConfigError(f"{self._folder} names no bundle; pass one with --bundle DIR")
            return Bundle.load(self._base, EDGE_SIDES)
        try:
            return Bundle.load(self._store.path(bundle), EDGE_SIDES)
        except BundleError as error:
            log.warning("bundle %s is downloaded: %s", bundle, error)
            folder = retry_while_away(
                lambda: self._fetch(bundle, self._stop),
                timeout_s=math.inf,
                stop=self._stop,
                on_wait=log_wait,
            )
            return Bundle.load(folder, EDGE_SIDES)

    def _read_base(self) -> str | None:
        try:
            return read_manifest(self._base).bundle_id if self._base else None
        except BundleError:
            return None

    def _save_slots(self, slots: Slots) -> ConfigProblem | None:
        """Use other slots and save them. Return the problem if they cannot be saved."""
        is_new = slots != self._slots
        self._slots = slots
        try:
            if is_new:
                self._store.save(slots)
        except OSError as error:
            log.warning("slots of bundles are not saved in %s: %s", self._folder, error)
            reason = f"cannot write into {self._folder}: {error.strerror}; make room"
            return _problem(STORAGE_CODE, reason)
        return None

    def _save_desired(self, desired: DesiredConfig) -> None:
        self._followed = desired
        try:
            save_desired(self._folder, desired)
        except OSError as error:
            log.warning("configuration %d is applied, but not saved: %s", desired.version, error)


def _problem(code: str, message: str) -> ConfigProblem:
    return ConfigProblem(code, message[:MAX_LABEL_LENGTH], is_final=True)
