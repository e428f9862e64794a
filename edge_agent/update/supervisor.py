"""One agent at a time, on the bundle and by the settings that the fleet wants, on one connection to the broker."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import Final

from edge_agent.config import AgentConfig
from edge_agent.engine.ort_runtime import release_freed_memory
from edge_agent.reporting.report_outbox import REPORTS_FILE
from edge_agent.service_client import persistently
from edge_agent.serving.agent import Agent, refuse_prompts
from edge_agent.state.bundle_slots import Slots, SlotStore, attempt, confirm, give_up, resume
from edge_agent.state.desired_state import (
    NOTHING_WANTED,
    ConfigStep,
    lay_over,
    load_desired,
    next_step,
    save_desired,
)
from edge_agent.update.background_download import BackgroundDownload
from fleet.bundles.manifest import Bundle, Manifest, read_manifest
from fleet.errors import BundleError, ConfigError, FleetError, PromptError, ProtocolError
from fleet.protocol import topics
from fleet.protocol.desired_config import DesiredConfig, decode_desired
from fleet.protocol.report import NOT_YET
from fleet.transport.base import Transport

DRAIN_S: Final = 60.0  # what is under way may take so long before a device changes its bundle
CHECK_S: Final = 0.25
FETCH_S: Final = 3600.0  # before a device starts that has no bundle
SIDES: Final = ("edge", "tokenizer")

Fetch = Callable[[str, threading.Event], Path]

log = logging.getLogger(__name__)


class Supervisor:
    """What `edge-agent run` does. `folder` is the identity's; `base` the bundle that it, or the command line, names.

    `fetch` brings a bundle into its slot (`fetch_bundle`); `on_serving` is told each bundle that is served from now on.
    `prepare` first, then `run`, both on one thread.
    """

    def __init__(
        self,
        folder: Path,
        own: AgentConfig,
        base: Path | None,
        fetch: Fetch,
        on_serving: Callable[[Manifest], None] = lambda _: None,
        *,
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
        self._followed = self._wanted = NOTHING_WANTED
        self._config = own
        self._error = ""
        self._agent: Agent | None = None
        self._events: Queue[Callable[[], None]] = (
            Queue()
        )  # a SimpleQueue may wait for ever after a signal
        self._stop = threading.Event()
        self._fetcher = BackgroundDownload(
            fetch,
            lambda bundle, path: self._events.put(partial(self._fetched, bundle, path)),
            lambda bundle, error: self._events.put(partial(self._not_fetched, bundle, error)),
        )

    def prepare(self, stop: threading.Event) -> None:
        """Loads what was served last, and fetches it where it is missing. A trial that ended a process is given up.

        Raises:
            ConfigError: there is no bundle to serve, or `agent.json` does not fit it.
            BundleError, ServiceError: the bundle is damaged, and cannot be fetched.
        """
        self._stop = stop
        self._base_id = self._read_base()
        self._slots = self._store.load()
        self._record(resume(self._slots))
        if self._slots.given_up:
            self._error = str(self._slots.given_up)
            log.warning("%s", self._error)
        self._bundle = self._load(self._slots.current)
        self._followed = self._wanted = load_desired(self._folder)
        exits = self._bundle.manifest.exits
        try:
            self._config = lay_over(self._own, self._followed.settings, exits)
        except ConfigError as error:
            self._followed = NOTHING_WANTED
            self._error = str(error)
            self._config = lay_over(self._own, self._followed.settings, exits)

    def run(self, transport: Transport) -> None:
        """Serves until the event that `prepare` was given is set. Raises FleetError when the agent does not start."""
        self._transport = transport
        self._start(self._bundle, self._config, self._followed.version, self._error)
        topic = topics.device_config(transport.name)
        try:
            transport.subscribe(topic, self._on_config, qos=1)
            while not self._stop.is_set():
                try:
                    self._events.get(timeout=CHECK_S)()
                except Empty:
                    continue
        finally:
            transport.unsubscribe(topic)
            self._fetcher.cancel()
            if self._agent:
                self._agent.__exit__(None, None, None)

    # What arrives: on other threads.

    def _on_config(self, topic: str, payload: bytes) -> None:
        if not payload:  # retained no more: nothing new is wanted
            return
        try:
            desired = decode_desired(payload)
        except ProtocolError as error:
            log.warning("message on %s dropped: %s", topic, error)
            self._events.put(partial(self._tell, f"the configuration is not readable: {error}"))
        else:
            self._events.put(partial(self._want, desired))

    # What is done about it: on the thread of `run`.

    def _want(self, wanted: DesiredConfig) -> None:
        self._wanted = wanted
        step = next_step(wanted, self._followed, self._slots, self._serving)
        if step is not ConfigStep.CHANGE:
            self._fetcher.cancel()
        match step:
            case ConfigStep.STAY:
                self._tell("")
            case ConfigStep.ADOPT:
                self._adopt(wanted)
            case ConfigStep.REFUSE:
                self._tell(str(self._slots.given_up))
            case ConfigStep.CHANGE:
                self._change(wanted)

    def _adopt(self, wanted: DesiredConfig) -> None:
        """Goes by settings that need no other bundle."""
        try:
            config = lay_over(self._own, wanted.settings, self._bundle.manifest.exits)
            if self._agent:
                self._agent.follow(config, wanted.version)
        except (ConfigError, PromptError) as error:
            self._tell(str(error))
            return
        self._config = config
        self._error = ""
        self._keep(wanted)

    def _change(self, wanted: DesiredConfig) -> None:
        """Goes to another bundle, as soon as it is here."""
        bundle = wanted.settings.bundle or ""
        self._tell("")
        if self._base and bundle == self._base_id:
            self._switch(wanted, self._base)
        else:
            self._store.remove_unneeded(self._slots, bundle)
            self._fetcher.want(bundle)

    def _fetched(self, bundle: str, path: Path) -> None:
        if bundle == self._wanted.settings.bundle and bundle != self._serving:
            self._switch(self._wanted, path)

    def _not_fetched(self, bundle: str, error: str) -> None:
        if bundle == self._wanted.settings.bundle:
            self._tell(error if error.startswith(NOT_YET) else f"bundle {bundle}: {error}")

    def _tell(self, error: str) -> None:
        """Says why the configuration that is wanted is not followed, or that there is nothing to say."""
        if error != self._error:
            if error:
                log.warning("configuration %d is not followed: %s", self._wanted.version, error)
            self._error = error
            if self._agent:
                self._agent.follow(self._config, self._followed.version, error)

    def _switch(self, wanted: DesiredConfig, folder: Path) -> None:
        """Puts the bundle that is wanted on trial; when it does not start, the one before it goes on."""
        if not self._drained():
            return
        before = self._slots
        if error := self._record(attempt(before, wanted.settings.bundle or "", wanted.version)):
            self._slots = before  # a trial that nobody would know of must not begin
            self._tell(error)
            self._hold(off=True)
            return
        self._leave()
        if reason := self._try(wanted, folder):
            self._record(give_up(self._slots, reason))
            self._error = str(self._slots.given_up)
            log.warning("%s; %s goes on", self._error, self._serving)
            self._start(self._bundle, self._config, self._followed.version, self._error)
        else:
            self._error = self._record(confirm(self._slots))
            self._keep(wanted)
            self._store.remove_unneeded(self._slots)
            if self._agent:  # now that it would survive the power
                self._agent.follow(self._config, wanted.version, self._error)

    def _try(self, wanted: DesiredConfig, folder: Path) -> str:
        """Starts on another bundle; why it does not start, empty if it does."""
        try:
            bundle = Bundle.load(folder, SIDES)
            config = lay_over(self._own, wanted.settings, bundle.manifest.exits)
            self._start(bundle, config, self._followed.version, is_trial=True)
        except FleetError as error:
            return str(error)
        except Exception as error:  # whatever it is, the device has to go back
            log.exception("bundle %s does not start", wanted.settings.bundle)
            return f"it does not start: {error}"
        self._bundle = bundle
        self._config = config
        return ""

    def _drained(self) -> bool:
        """Lets what is under way end, at most `drain_s` seconds; false when the device is to stop."""
        self._hold()
        deadline = time.monotonic() + self._drain_s
        while (
            self._agent
            and not self._agent.is_idle
            and time.monotonic() < deadline
            and not self._stop.is_set()
        ):
            time.sleep(CHECK_S / 5)
        return not self._stop.is_set()

    def _hold(self, *, off: bool = False) -> None:
        if self._agent:
            self._agent.hold(off=off)

    def _leave(self) -> None:
        """Ends the agent, and gives back its memory before another one takes as much."""
        if self._agent:
            self._agent.close()
        refuse_prompts(self._transport)
        self._agent = None
        gc.collect()
        release_freed_memory()

    def _start(
        self,
        bundle: Bundle,
        config: AgentConfig,
        version: int,
        error: str = "",
        *,
        is_trial: bool = False,
    ) -> None:
        """Starts an agent. Raises FleetError when it does not start, or on trial cannot run a step."""
        agent = Agent(
            self._transport, bundle, config, self._folder / REPORTS_FILE, is_trial=is_trial
        )
        agent.follow(config, version, error)
        self._agent = agent.__enter__()
        self._on_serving(bundle.manifest)

    @property
    def _serving(self) -> str:
        return self._bundle.manifest.bundle_id

    def _load(self, bundle: str | None) -> Bundle:
        """The base, or the bundle of a slot; one that is damaged or missing there is fetched again."""
        if bundle in (None, self._base_id):
            if self._base is None:
                raise ConfigError(f"{self._folder} names no bundle; pass one with --bundle DIR")
            return Bundle.load(self._base, SIDES)
        try:
            return Bundle.load(self._store.path(bundle), SIDES)
        except BundleError as error:
            log.warning("bundle %s is fetched: %s", bundle, error)
            folder = persistently(
                lambda: self._fetch(bundle, self._stop), timeout_s=FETCH_S, stop=self._stop
            )
            return Bundle.load(folder, SIDES)

    def _read_base(self) -> str | None:
        try:
            return read_manifest(self._base).bundle_id if self._base else None
        except BundleError:
            return None

    def _record(self, slots: Slots) -> str:
        """Goes by other slots; why they are not on disk, empty if they are."""
        is_new = slots != self._slots
        self._slots = slots
        try:
            if is_new:
                self._store.save(slots)
        except OSError as error:
            log.warning("slots of bundles are not kept in %s: %s", self._folder, error)
            return f"cannot write into {self._folder}: {error.strerror}; make room"
        return ""

    def _keep(self, desired: DesiredConfig) -> None:
        self._followed = desired
        try:
            save_desired(self._folder, desired)
        except OSError as error:
            log.warning("configuration %d is followed, not kept: %s", desired.version, error)
