"""The agent: takes prompts over MQTT, answers some of them at once, and reports each answer."""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from edge_agent.config import AgentConfig
from edge_agent.engine.fair_lock import FairLock
from edge_agent.engine.ort_runtime import check_instruction_set, is_out_of_memory
from edge_agent.engine.partition import Partition, WorkCounter
from edge_agent.engine.tokenizer import ChatTokenizer
from edge_agent.reporting.report_outbox import ReportOutbox
from edge_agent.reporting.reporter import Reporter
from edge_agent.serving.answerer import Answerer, refusal
from edge_agent.serving.event_triggers import EventTriggers
from edge_agent.serving.job_queue import Job, JobQueue
from edge_agent.serving.request_planner import MB, RequestPlanner
from edge_agent.serving.self_test import check_step
from edge_agent.session.cloud_session import CloudSession
from edge_agent.session.worker_directory import WorkerDirectory
from fleet import __version__
from fleet.bundles.manifest import Bundle
from fleet.errors import BusyError, FleetError, PromptError, ProtocolError
from fleet.protocol import topics
from fleet.protocol.codec import decode_to_device, encode
from fleet.protocol.messages import Close, Opened
from fleet.protocol.prompt import parse_prompt
from fleet.protocol.report import MAX_LABEL_LENGTH, DeviceStatus, encode_status
from fleet.transport.base import Transport, publish_or_log

log = logging.getLogger(__name__)

STOP_TIMEOUT_S: Final = 5.0
MAX_FINISHED: Final = 32  # answers kept for an app that has missed some of its replies


class Agent:
    """Serves one device. Use as a context manager; it announces itself and serves until it is closed."""

    def __init__(
        self,
        transport: Transport,
        bundle: Bundle,
        config: AgentConfig,
        reports_file: Path | None = None,
        *,
        draw: Callable[[], float] = random.random,
        is_trial: bool = False,
    ) -> None:
        """Reports that wait for the collector are kept in `reports_file`, or else in memory.

        By `draw`, numbers from [0, 1), answers are chosen that the cloud judges as a sample. On trial a step is run.

        Raises BundleError or FleetError when the model does not load or the thresholds do not fit its exits.
        """
        check_instruction_set(bundle.manifest)
        self.name = transport.name
        self._transport = transport
        self._manifest = bundle.manifest
        self._config = config
        self._config_version = 0
        self._config_error = ""
        self._epoch = time.time_ns() // 1_000_000
        self._tokenizer = ChatTokenizer(
            bundle
        )  # first: the partition gives back what loading has freed
        self._partition = Partition(bundle, config.num_threads, config.provider)
        if is_trial:
            check_step(self._partition, self._tokenizer)
        self._planner = RequestPlanner(self._partition, self._tokenizer, config, draw)
        self._turns = FairLock()
        self._arrived: queue.Queue[Job | None] = queue.Queue()
        self._jobs = JobQueue(config.cache_budget_mb * MB)
        self._active: dict[tuple[str, str], Job] = {}
        self._finished: dict[tuple[str, str], Job] = {}
        self._stopping = False
        self._lock = threading.Lock()
        self._triggers = EventTriggers(transport, self._epoch, self._on_prompt, self._is_active)
        self._workers = WorkerDirectory(transport, self._worker_changed)
        self._reporter = Reporter(transport, ReportOutbox(reports_file, config.max_kept_reports))
        self._answerer = Answerer(
            transport,
            self._workers,
            reporter=self._reporter,
            manifest=self._manifest,
            partition=self._partition,
            tokenizer=self._tokenizer,
            turns=self._turns,
            epoch=self._epoch,
        )
        self._planning = threading.Thread(
            target=self._plan_all, name=f"plan-{self.name}", daemon=True
        )
        self._answering = [
            threading.Thread(target=self._answer_all, name=f"answer-{self.name}-{i}", daemon=True)
            for i in range(config.max_concurrent_requests)
        ]

    def __enter__(self) -> Self:
        for thread in (self._planning, *self._answering):
            thread.start()
        self._reporter.__enter__()
        own = topics.PREFIX, self.name
        self._transport.subscribe("{}/d/{}/s/+".format(*own), self._on_session)
        self._transport.subscribe("{}/d/{}/cancel/+/+".format(*own), self._on_cancel, qos=1)
        self._transport.subscribe(prompts_of(self.name), self._on_prompt, qos=1)
        self._triggers.set(self._config.triggers)
        self._transport.on_up(self._announce)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes, and says that the device has gone."""
        self.close()
        publish_or_log(
            self._transport, topics.device_status(self.name), self.will(), qos=1, retain=True
        )

    def close(self) -> None:
        """Cancels what is under way, takes no more, and waits for the end at most `STOP_TIMEOUT_S` seconds.

        Prompts are refused as by a device that is busy, until somebody else takes them or the transport closes.
        """
        deadline = time.monotonic() + STOP_TIMEOUT_S
        self._triggers.set(())
        self.hold()
        with self._lock:
            jobs = list(self._active.values())
        for job in jobs:
            self._cancel(job)
        self._arrived.put(None)
        self._planning.join(STOP_TIMEOUT_S)
        self._jobs.close()
        for thread in self._answering:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._reporter.__exit__(None, None, None)
        self._workers.close()
        self._transport.off_up(self._announce)
        for topic in ("{}/d/{}/s/+", "{}/d/{}/cancel/+/+"):
            self._transport.unsubscribe(topic.format(topics.PREFIX, self.name))

    def hold(self, *, off: bool = False) -> None:
        """Takes no more prompts, or with `off` takes them again; what is under way goes on."""
        with self._lock:
            self._stopping = not off

    @property
    def work(self) -> WorkCounter:
        """What its model has run so far."""
        return self._partition.work

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        with self._lock:
            return not self._active

    def follow(self, config: AgentConfig, version: int, error: str = "") -> None:
        """Goes by `config` from the next prompt on, and tells the fleet which `version` of its configuration that is.

        Only what :class:`fleet.protocol.desired_config.Settings` may say differs from the config before. `error` says why it is not a
        newer version.

        Raises:
            PromptError: the thresholds do not fit the bundle's exits; everything stays as it was.
        """
        self._planner.follow(config)
        self._config = config
        self._config_version = version
        self._config_error = error[:MAX_LABEL_LENGTH]
        if self._planning.is_alive():
            self._triggers.set(config.triggers)
            self._announce()

    @staticmethod
    def will() -> bytes:
        """The status payload of a device that has gone."""
        return encode_status(DeviceStatus(online=False, epoch=0))

    def _announce(self) -> None:
        status = DeviceStatus(
            online=True,
            epoch=self._epoch,
            bundle_id=self._manifest.bundle_id,
            version=__version__,
            mode=self._config.mode,
            config_version=self._config_version,
            config_error=self._config_error,
        )
        publish_or_log(
            self._transport,
            topics.device_status(self.name),
            encode_status(status),
            qos=1,
            retain=True,
        )

    # What arrives: decided on the transport's thread, quickly.

    def _on_prompt(self, topic: str, payload: bytes) -> None:
        try:
            _, app, request = topics.parse(topic, "d", "+", "prompt", "+", "+")
        except ProtocolError as error:
            log.warning("prompt dropped: %s", error)
            return
        try:
            job = Job(app=app, request=request, prompt=parse_prompt(payload))
            with self._lock:
                known = self._active.get((app, request)) or self._finished.get((app, request))
            if known:
                self._repeat(known)
                return
            with self._lock:
                if self._stopping:
                    raise BusyError("this device is stopping; try again when it is back")
                if len(self._active) >= self._config.max_queued_requests:
                    raise BusyError(
                        f"this device takes {self._config.max_queued_requests} requests at once and has as many; "
                        "try again later"
                    )
                self._active[app, request] = job
            self._arrived.put(job)
        except PromptError as error:
            refuse(self._transport, app, request, error)

    def _is_active(self, app: str, request: str) -> bool:
        return (app, request) in self._active

    def _repeat(self, job: Job) -> None:
        """Sends again what has been said: a request that comes twice is one whose replies were lost.

        At QoS 0, of which any number may be on its way; who misses some of them asks again.
        """
        for payload in list(job.replies):
            publish_or_log(self._transport, topics.reply(self.name, job.app, job.request), payload)

    def _on_cancel(self, topic: str, payload: bytes) -> None:
        del payload
        try:
            _, app, request = topics.parse(topic, "d", "+", "cancel", "+", "+")
        except ProtocolError as error:
            log.warning("cancel dropped: %s", error)
            return
        with self._lock:
            job = self._active.get((app, request))
        if job:
            self._cancel(job)

    def _cancel(self, job: Job) -> None:
        self._jobs.cancel(job)
        if job.uplink:
            job.uplink.abandon("the request was cancelled")

    def _on_session(self, topic: str, payload: bytes) -> None:
        try:
            _, session = topics.parse(topic, "d", "+", "s", "+")
            if uplink := next(
                (uplink for uplink in self._uplinks() if uplink.session == session), None
            ):
                uplink.receive(payload)
            elif (
                isinstance(message := decode_to_device(payload), Opened)
                and message.session == session
            ):
                late = topics.to_worker(message.worker, self.name, session)
                publish_or_log(self._transport, late, encode(Close(session)))
        except ProtocolError as error:
            log.warning("message on %s dropped: %s", topic, error)

    def _worker_changed(self, worker: str) -> None:
        for uplink in self._uplinks():
            uplink.worker_changed(worker)

    def _uplinks(self) -> list[CloudSession]:
        with self._lock:
            return [job.uplink for job in self._active.values() if job.uplink]

    # Plans, in the order of the prompts; then answers, some at once, each on a thread of its own.

    def _plan_all(self) -> None:
        while job := self._arrived.get():
            with self._failing(job):
                self._jobs.put(job, self._planner.plan(job.prompt))

    def _answer_all(self) -> None:
        while True:
            with self._jobs.take() as taken:
                if taken is None:
                    return
                job, plan = taken
                with self._failing(job):
                    self._answerer.answer(job, plan)
                    self._forget(job)

    @contextmanager
    def _failing(self, job: Job) -> Iterator[None]:
        """Makes an error the job's last reply: one bad request must not end the device."""
        try:
            yield
        except FleetError as error:
            self._fail(job, error.code, str(error))
        except Exception as error:  # the outermost boundary of a thread
            if is_out_of_memory(error):
                self._fail(
                    job,
                    "memory",
                    "this device ran out of memory on this request; ask for fewer tokens, or lower its "
                    "cache_budget_mb or max_concurrent_requests",
                )
            else:
                log.exception("request %s of %s failed", job.request, job.app)
                self._fail(job, "internal", f"the device failed on this request: {error}")

    def _fail(self, job: Job, code: str, message: str) -> None:
        self._answerer.reply(job, refusal(len(job.replies), code, message))
        self._forget(job)

    def _forget(self, job: Job) -> None:
        with self._lock:
            del self._active[job.app, job.request]
            job.uplink = job.drafts = job.modes = (
                None  # of what has ended only the replies are kept
            )
            self._finished[job.app, job.request] = job
            while len(self._finished) > MAX_FINISHED:
                del self._finished[next(iter(self._finished))]


def refuse(transport: Transport, app: str, request: str, error: PromptError) -> None:
    """Answers a request that is not taken with the reason."""
    payload = msgspec.json.encode(refusal(0, error.code, str(error)))
    publish_or_log(transport, topics.reply(transport.name, app, request), payload, qos=1)


def refuse_prompts(transport: Transport) -> None:
    """Answers every prompt with `busy`, in the place of an agent that is closed, until another one takes them."""

    def on_prompt(topic: str, payload: bytes) -> None:
        del payload
        try:
            _, app, request = topics.parse(topic, "d", "+", "prompt", "+", "+")
        except ProtocolError as error:
            log.warning("prompt dropped: %s", error)
            return
        refuse(
            transport,
            app,
            request,
            BusyError("this device is changing its model; try again in a moment"),
        )

    transport.subscribe(prompts_of(transport.name), on_prompt, qos=1)


def prompts_of(device: str) -> str:
    """The filter of all prompts to a device."""
    return topics.prompt(device, "+", "+")
