"""The agent: takes prompts over MQTT, answers them one after the other, and reports each answer."""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

import msgspec

from edge_agent.config import AgentConfig
from edge_agent.generator import Generator
from edge_agent.partition import Partition
from edge_agent.tokenizer import ChatTokenizer
from edge_agent.uplink import Uplink
from edge_agent.workers import Workers
from fleet import __version__, topics
from fleet.codec import decode_to_device, encode
from fleet.errors import BusyError, FleetError, LinkError, PromptError, ProtocolError
from fleet.manifest import Bundle
from fleet.messages import Close, Opened
from fleet.policy import Mode, offload_rate
from fleet.prompt import ErrorInfo, PromptRequest, Reply, Usage, parse_prompt
from fleet.report import DeviceStatus, GenerationReport, encode_report, encode_status
from fleet.transport import Transport

log = logging.getLogger(__name__)

STOP_TIMEOUT_S: Final = 5.0


@dataclass
class Job:
    """One accepted request of an app, and how its answer has gone so far."""

    app: str
    request: str
    prompt: PromptRequest
    received_at: float = field(default_factory=time.time)
    arrived: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)
    seq: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    first_token: float = 0.0
    last_token: float = 0.0

    def count(self, source: str) -> None:
        """Counts one token from `source`, now."""
        self.last_token = time.monotonic()
        self.first_token = self.first_token or self.last_token
        self.sources[source] = self.sources.get(source, 0) + 1

    @property
    def num_tokens(self) -> int:
        return sum(self.sources.values())

    @property
    def ttft_ms(self) -> float:
        """From the prompt's arrival, time in the queue included, to the first token."""
        return max(0.0, self.first_token - self.arrived) * 1000

    @property
    def tpot_ms(self) -> float:
        """Mean time per token after the first."""
        return (self.last_token - self.first_token) * 1000 / max(1, self.num_tokens - 1)


class Agent:
    """Serves one device. Use as a context manager; it announces itself and serves until it is closed."""

    def __init__(self, transport: Transport, bundle: Bundle, config: AgentConfig) -> None:
        """Raises BundleError or FleetError when the model does not load or the thresholds do not fit its exits."""
        self.name = transport.name
        self._transport = transport
        self._manifest = bundle.manifest
        self._config = config
        self._epoch = time.time_ns() // 1_000_000
        self._partition = Partition(bundle, config.num_threads)
        self._tokenizer = ChatTokenizer(bundle)
        self._thresholds = self._fit(config.thresholds or bundle.manifest.thresholds)
        self._max_positions = min(config.max_positions, bundle.manifest.model.max_positions)
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._active: dict[tuple[str, str], Job] = {}
        self._lock = threading.Lock()
        self._uplink: Uplink | None = None
        self._workers = Workers(transport, self._worker_changed)
        self._thread = threading.Thread(target=self._serve, name=f"agent-{self.name}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        own = topics.PREFIX, self.name
        self._transport.subscribe("{}/d/{}/s/+".format(*own), self._on_session)
        self._transport.subscribe("{}/d/{}/cancel/+/+".format(*own), self._on_cancel, qos=1)
        self._transport.subscribe("{}/d/{}/prompt/+/+".format(*own), self._on_prompt, qos=1)
        self._transport.on_up(self._announce)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            for job in self._active.values():
                job.cancelled.set()
        self._jobs.put(None)
        self._thread.join(STOP_TIMEOUT_S)
        self._publish(topics.device_status(self.name), self.will(), qos=1, retain=True)

    @staticmethod
    def will() -> bytes:
        """The status payload of a device that has gone."""
        return encode_status(DeviceStatus(online=False, epoch=0))

    def _announce(self) -> None:
        status = DeviceStatus(True, self._epoch, self._manifest.bundle_id, __version__, self._config.mode)
        self._publish(topics.device_status(self.name), encode_status(status), qos=1, retain=True)

    def _fit(self, thresholds: tuple[float, ...]) -> tuple[float, ...]:
        exits = self._manifest.exits
        if len(thresholds) != len(exits):
            raise PromptError(
                f"expected {len(exits)} thresholds, one for each of the exits {exits}, got {len(thresholds)}"
            )
        return thresholds

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
                if (app, request) in self._active:
                    raise BusyError(f"request {request!r} of {app!r} is still being answered; use another request id")
                if len(self._active) >= self._config.max_queued_requests:
                    raise BusyError(
                        f"this device takes {self._config.max_queued_requests} requests at once and has as many; "
                        "try again later"
                    )
                self._active[app, request] = job
            self._jobs.put(job)
        except PromptError as error:
            self._reply(
                app, request, Reply(0, done=True, finish_reason="error", error=ErrorInfo(error.code, str(error)))
            )

    def _on_cancel(self, topic: str, payload: bytes) -> None:
        del payload
        try:
            _, app, request = topics.parse(topic, "d", "+", "cancel", "+", "+")
        except ProtocolError as error:
            log.warning("cancel dropped: %s", error)
            return
        with self._lock:
            if job := self._active.get((app, request)):
                job.cancelled.set()

    def _on_session(self, topic: str, payload: bytes) -> None:
        try:
            _, session = topics.parse(topic, "d", "+", "s", "+")
            uplink = self._uplink
            if uplink and uplink.session == session:
                uplink.receive(payload)
            elif isinstance(message := decode_to_device(payload), Opened) and message.session == session:
                late = topics.to_worker(message.worker, self.name, session)
                self._publish(late, encode(Close(session)))
        except ProtocolError as error:
            log.warning("message on %s dropped: %s", topic, error)

    def _worker_changed(self, worker: str) -> None:
        if uplink := self._uplink:
            uplink.worker_changed(worker)

    # Answers, one after the other, on the agent's own thread.

    def _serve(self) -> None:
        while job := self._jobs.get():
            try:
                self._answer(job)
            except FleetError as error:
                self._fail(job, error.code, str(error))
            except Exception as error:  # the outermost boundary: one bad request must not end the device
                log.exception("request %s of %s failed", job.request, job.app)
                self._fail(job, "internal", f"the device failed on this request: {error}")
            finally:
                self._uplink = None
                with self._lock:
                    del self._active[job.app, job.request]

    def _fail(self, job: Job, code: str, message: str) -> None:
        done = Reply(job.seq, done=True, finish_reason="error", error=ErrorInfo(code, message))
        self._reply(job.app, job.request, done)

    def _answer(self, job: Job) -> None:
        prompt_ids = self._tokenizer.encode_chat(job.prompt.chat)
        max_new_tokens = self._room(len(prompt_ids), job.prompt.max_new_tokens)
        thresholds = self._request_thresholds(job.prompt)
        mode = job.prompt.mode or self._config.mode
        capacity = len(prompt_ids) + max_new_tokens
        note = self._workers.why_none(self._manifest.bundle_id) if mode is Mode.COLLABORATIVE else None
        uplink = self._connect(job, capacity) if mode is Mode.COLLABORATIVE and note is None else None
        generator = Generator(
            self._partition, capacity, thresholds, job.prompt.sampling, uplink, ask_cloud=mode is Mode.COLLABORATIVE
        )
        text = self._tokenizer.stream()
        finish_reason = "length"
        with uplink or nullcontext():
            for token in generator.generate(prompt_ids, max_new_tokens):
                job.count(token.source)
                self._stream(job, Reply(job.seq, text.push(token.token_id), token.token_id, token.source))
                if token.token_id in self._manifest.model.eos_token_ids:
                    finish_reason = "stop"
                elif job.cancelled.is_set():
                    finish_reason = "cancelled"
                    break
        report = self._report(job, uplink, mode, len(prompt_ids), finish_reason)
        self._stream(job, Reply(
            job.seq, text.flush(), done=True, finish_reason=finish_reason, usage=_usage(report),
            bundle_id=report.bundle_id, note=uplink.note if uplink else note,
        ))  # fmt: skip
        self._publish(topics.device_stats(self.name), encode_report(report), qos=1)

    def _connect(self, job: Job, capacity: int) -> Uplink:
        self._uplink = Uplink(
            self._transport,
            self._workers,
            uuid.uuid4().hex,
            epoch=self._epoch,
            bundle_id=self._manifest.bundle_id,
            sampling=job.prompt.sampling,
            max_positions=capacity,
            hidden_size=self._manifest.model.hidden_size,
            deadline_ms=self._config.assist_deadline_ms,
        )
        return self._uplink

    def _room(self, num_prompt_tokens: int, wanted: int | None) -> int:
        limit = self._config.max_new_tokens
        max_new_tokens = min(wanted or limit, self._max_positions - 1)
        if num_prompt_tokens + max_new_tokens > self._max_positions:
            raise PromptError(
                f"the prompt has {num_prompt_tokens} tokens and {max_new_tokens} new ones were asked for; this device "
                f"holds {self._max_positions} positions; send a shorter prompt or ask for fewer tokens"
            )
        return max_new_tokens

    def _request_thresholds(self, prompt: PromptRequest) -> tuple[float, ...]:
        if prompt.thresholds is not None:
            return self._fit(prompt.thresholds)
        if prompt.threshold is not None:
            return (prompt.threshold,) * len(self._manifest.exits)
        return self._thresholds

    def _report(
        self, job: Job, uplink: Uplink | None, mode: Mode, prompt_tokens: int, finish_reason: str
    ) -> GenerationReport:
        return GenerationReport(
            generation=uuid.uuid4().hex,
            app=job.app,
            request=job.request,
            session=uplink.session if uplink else None,
            worker=uplink.worker if uplink else None,
            bundle_id=self._manifest.bundle_id,
            mode=mode,
            started_at=job.received_at,
            prompt_tokens=prompt_tokens,
            tokens=job.num_tokens,
            sources=job.sources,
            assists=uplink.num_assists if uplink else 0,
            bytes_up=uplink.bytes_up if uplink else 0,
            bytes_down=uplink.bytes_down if uplink else 0,
            ttft_ms=job.ttft_ms,
            tpot_ms=job.tpot_ms,
            finish_reason=finish_reason,
        )

    def _stream(self, job: Job, reply: Reply) -> None:
        self._reply(job.app, job.request, reply)
        job.seq += 1

    def _reply(self, app: str, request: str, reply: Reply) -> None:
        self._publish(topics.reply(self.name, app, request), msgspec.json.encode(reply), qos=1)

    def _publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        try:
            self._transport.publish(topic, payload, qos=qos, retain=retain)
        except LinkError as error:
            log.warning("not sent on %s: %s", topic, error)


def _usage(report: GenerationReport) -> Usage:
    return Usage(
        report.prompt_tokens, report.tokens, report.sources, offload_rate(report.sources), report.bytes_up,
        report.bytes_down, report.ttft_ms, report.tpot_ms,
    )  # fmt: skip
