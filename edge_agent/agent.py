"""The agent: takes prompts over MQTT, answers some of them at once, and reports each answer."""

from __future__ import annotations

import logging
import queue
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from edge_agent.acceptance import Acceptance
from edge_agent.config import AgentConfig
from edge_agent.decoder import Decoder
from edge_agent.draft_run import DraftRun
from edge_agent.generator import Generator
from edge_agent.jobs import Job, JobQueue
from edge_agent.measurements import Measurements
from edge_agent.modes import Modes
from edge_agent.partition import Partition, Work
from edge_agent.plan import MB, Plan, Planner
from edge_agent.reporter import Reporter
from edge_agent.reports import ReportOutbox
from edge_agent.runtime import check_instruction_set, is_out_of_memory
from edge_agent.self_test import check_step
from edge_agent.tokenizer import ChatTokenizer, TextStream
from edge_agent.triggers import EventTriggers
from edge_agent.turns import Turns
from edge_agent.uplink import Uplink
from edge_agent.workers import Workers
from fleet import __version__, topics
from fleet.codec import decode_to_device, encode
from fleet.errors import BusyError, FleetError, LinkError, PromptError, ProtocolError
from fleet.manifest import Bundle
from fleet.messages import PROTOCOL, Close, Open, Opened
from fleet.policy import Mode, offload_rate
from fleet.prompt import ErrorInfo, Reply, Usage, parse_prompt
from fleet.report import MAX_LABEL_LENGTH, DeviceStatus, GenerationReport, encode_status
from fleet.transport import Transport

log = logging.getLogger(__name__)

STOP_TIMEOUT_S: Final = 5.0
SESSION_BYTES: Final = 5  # of a name that is in every message, and need only differ from others of this device
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
        self._config_version, self._config_error = 0, ""
        self._epoch = time.time_ns() // 1_000_000
        self._tokenizer = ChatTokenizer(bundle)  # first: the partition gives back what loading has freed
        self._partition = Partition(bundle, config.num_threads, config.provider)
        if is_trial:
            check_step(self._partition, self._tokenizer)
        self._planner = Planner(self._partition, self._tokenizer, config, draw)
        self._turns = Turns()
        self._measurements = Measurements()
        self._acceptance = Acceptance()
        self._arrived: queue.Queue[Job | None] = queue.Queue()
        self._jobs = JobQueue(config.cache_budget_mb * MB)
        self._active: dict[tuple[str, str], Job] = {}
        self._finished: dict[tuple[str, str], Job] = {}
        self._stopping = False
        self._lock = threading.Lock()
        self._triggers = EventTriggers(transport, self._epoch, self._on_prompt, self._is_active)
        self._workers = Workers(transport, self._worker_changed)
        self._reporter = Reporter(transport, ReportOutbox(reports_file, config.max_kept_reports))
        self._planning = threading.Thread(target=self._plan_all, name=f"plan-{self.name}", daemon=True)
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
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes, and says that the device has gone."""
        self.close()
        self._publish(topics.device_status(self.name), self.will(), qos=1, retain=True)

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
    def work(self) -> Work:
        """What its model has run so far."""
        return self._partition.work

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        with self._lock:
            return not self._active

    def follow(self, config: AgentConfig, version: int, error: str = "") -> None:
        """Goes by `config` from the next prompt on, and tells the fleet which `version` of its configuration that is.

        Only what :class:`fleet.desired.Settings` may say differs from the config before. `error` says why it is not a
        newer version.

        Raises:
            PromptError: the thresholds do not fit the bundle's exits; everything stays as it was.
        """
        self._planner.follow(config)
        self._config = config
        self._config_version, self._config_error = version, error[:MAX_LABEL_LENGTH]
        if self._planning.is_alive():
            self._triggers.set(config.triggers)
            self._announce()

    @staticmethod
    def will() -> bytes:
        """The status payload of a device that has gone."""
        return encode_status(DeviceStatus(online=False, epoch=0))

    def _announce(self) -> None:
        status = DeviceStatus(
            True, self._epoch, self._manifest.bundle_id, __version__, self._config.mode, self._config_version,
            self._config_error,
        )  # fmt: skip
        self._publish(topics.device_status(self.name), encode_status(status), qos=1, retain=True)

    # What arrives: decided on the transport's thread, quickly.

    def _on_prompt(self, topic: str, payload: bytes) -> None:
        try:
            _, app, request = topics.parse(topic, "d", "+", "prompt", "+", "+")
        except ProtocolError as error:
            log.warning("prompt dropped: %s", error)
            return
        try:
            job = Job(app, request, parse_prompt(payload))
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
            refusal = msgspec.json.encode(_refusal(0, error.code, str(error)))
            self._publish(topics.reply(self.name, app, request), refusal, qos=1)

    def _is_active(self, app: str, request: str) -> bool:
        return (app, request) in self._active

    def _repeat(self, job: Job) -> None:
        """Sends again what has been said: a request that comes twice is one whose replies were lost."""
        for payload in list(job.replies):
            self._publish(topics.reply(self.name, job.app, job.request), payload, qos=1)

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
            if uplink := next((uplink for uplink in self._uplinks() if uplink.session == session), None):
                uplink.receive(payload)
            elif isinstance(message := decode_to_device(payload), Opened) and message.session == session:
                late = topics.to_worker(message.worker, self.name, session)
                self._publish(late, encode(Close(session)))
        except ProtocolError as error:
            log.warning("message on %s dropped: %s", topic, error)

    def _worker_changed(self, worker: str) -> None:
        for uplink in self._uplinks():
            uplink.worker_changed(worker)

    def _uplinks(self) -> list[Uplink]:
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
                    self._answer(job, plan)
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
                    job, "memory", "this device ran out of memory on this request; ask for fewer tokens, or lower its "
                    "cache_budget_mb or max_concurrent_requests",
                )  # fmt: skip
            else:
                log.exception("request %s of %s failed", job.request, job.app)
                self._fail(job, "internal", f"the device failed on this request: {error}")

    def _fail(self, job: Job, code: str, message: str) -> None:
        self._stream(job, _refusal(len(job.replies), code, message))
        self._forget(job)

    def _forget(self, job: Job) -> None:
        with self._lock:
            del self._active[job.app, job.request]
            job.uplink = job.drafts = job.modes = None  # of what has ended only the replies are kept
            self._finished[job.app, job.request] = job
            while len(self._finished) > MAX_FINISHED:
                del self._finished[next(iter(self._finished))]

    def _answer(self, job: Job, plan: Plan) -> None:
        wants_cloud = plan.mode is not Mode.STANDALONE and not job.cancelled.is_set()
        uplink = self._connect(job, plan) if wants_cloud else None
        text = self._tokenizer.stream()
        try:
            with uplink or nullcontext():
                finish_reason = self._generate(job, plan, text)
        except PromptError:  # late, or without the cloud: what was emitted until then counts all the same
            self._reporter.add(self._report(job, plan, "error"))
            raise
        report = self._report(job, plan, finish_reason)
        self._reporter.add(report)
        self._stream(job, Reply(
            len(job.replies), text.flush(), done=True, finish_reason=finish_reason, usage=_usage(report),
            bundle_id=report.bundle_id, note=uplink.note if uplink else None,
        ))  # fmt: skip

    def _generate(self, job: Job, plan: Plan, text: TextStream) -> str:
        """Streams the answer's tokens; gives the reason why it ended."""
        if job.cancelled.is_set():
            return "cancelled"
        generator = self._generator(job, plan)
        tokens = generator.generate(
            plan.prompt_ids, plan.max_new_tokens,
            deadline=job.arrived + plan.deadline_s, is_cancelled=job.cancelled.is_set,
        )  # fmt: skip
        for token in tokens:
            job.count(token.source)
            self._stream(job, Reply(len(job.replies), text.push(token.token_id), token.token_id, token.source))
            if token.token_id in plan.eos_token_ids:
                return "stop"
        return "cancelled" if job.cancelled.is_set() else "length"

    def _generator(self, job: Job, plan: Plan) -> Generator:
        decoder = Decoder(
            self._partition, plan.capacity, plan.thresholds, job.prompt.sampling, job.uplink, self._turns,
            self._measurements, one_by_one_from=len(plan.prompt_ids) if plan.is_exact else None,
        )  # fmt: skip
        eos = plan.eos_token_ids
        if job.uplink:
            job.drafts = DraftRun(
                decoder, job.uplink, self._acceptance, self._measurements, eos, plan.config.max_draft
            )  # fmt: skip
        job.modes = Modes(
            plan.mode, plan.targets, self._measurements, plan.config.assist_deadline_ms, is_sample=plan.is_sample
        )
        return Generator(decoder, job.modes, eos, job.uplink, job.drafts)

    def _connect(self, job: Job, plan: Plan) -> Uplink:
        note = self._workers.why_none(self._manifest.bundle_id)
        opening = Open(
            secrets.token_hex(SESSION_BYTES), self._epoch, self._manifest.bundle_id, PROTOCOL, job.prompt.sampling,
            plan.capacity, plan.config.assist_deadline_ms,
        )  # fmt: skip
        job.uplink = Uplink(
            self._transport, self._workers, opening, self._manifest.model.hidden_size, self._measurements,
            upload_dtype=plan.config.upload_dtype,
        )  # fmt: skip
        job.uplink.note = note
        return job.uplink

    def _report(self, job: Job, plan: Plan, finish_reason: str) -> GenerationReport:
        uplink = job.uplink
        return GenerationReport(
            generation=job.generation,
            app=job.app,
            request=job.request,
            session=uplink.session if uplink else None,
            worker=uplink.worker if uplink else None,
            bundle_id=self._manifest.bundle_id,
            mode=plan.mode,
            started_at=job.received_at,
            prompt_tokens=len(plan.prompt_ids),
            tokens=job.num_tokens,
            sources=job.sources,
            assists=uplink.num_assists if uplink else 0,
            bytes_up=uplink.bytes_up if uplink else 0,
            bytes_down=uplink.bytes_down if uplink else 0,
            ttft_ms=job.ttft_ms,
            tpot_ms=job.tpot_ms,
            finish_reason=finish_reason,
            verifies=uplink.num_verifies if uplink else 0,
            drafted=job.drafts.num_drafted if job.drafts else 0,
            switches=job.modes.switches if job.modes else (),
            judged=job.drafts.num_judged if job.drafts else 0,
            agreed=job.drafts.num_agreed if job.drafts else 0,
        )

    def _stream(self, job: Job, reply: Reply) -> None:
        if not job.replies:
            reply = msgspec.structs.replace(reply, generation=job.generation)
        payload = msgspec.json.encode(reply)
        job.replies.append(payload)
        self._publish(topics.reply(self.name, job.app, job.request), payload, qos=1)

    def _publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        try:
            self._transport.publish(topic, payload, qos=qos, retain=retain)
        except LinkError as error:
            log.warning("not sent on %s: %s", topic, error)


def refuse_prompts(transport: Transport) -> None:
    """Answers every prompt with `busy`, in the place of an agent that is closed, until another one takes them."""

    def refuse(topic: str, payload: bytes) -> None:
        del payload
        try:
            _, app, request = topics.parse(topic, "d", "+", "prompt", "+", "+")
            error = BusyError("this device is changing its model; try again in a moment")
            refusal = msgspec.json.encode(_refusal(0, error.code, str(error)))
            transport.publish(topics.reply(transport.name, app, request), refusal, qos=1)
        except (ProtocolError, LinkError) as error:
            log.warning("prompt dropped: %s", error)

    transport.subscribe(prompts_of(transport.name), refuse, qos=1)


def prompts_of(device: str) -> str:
    """The filter of all prompts to a device."""
    return topics.prompt(device, "+", "+")


def _refusal(seq: int, code: str, message: str) -> Reply:
    return Reply(seq, done=True, finish_reason="error", error=ErrorInfo(code, message))


def _usage(report: GenerationReport) -> Usage:
    return Usage(
        report.prompt_tokens, report.tokens, report.sources, offload_rate(report.sources), report.bytes_up,
        report.bytes_down, report.ttft_ms, report.tpot_ms, report.assists + report.verifies, report.drafted,
        report.switches,
    )  # fmt: skip
