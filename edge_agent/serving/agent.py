"""The agent: accept prompts over MQTT, generate several responses at a time, and report each."""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final, Self

import msgspec

from edge_agent.config import AgentConfig
from edge_agent.engine.fair_lock import FairLock
from edge_agent.engine.prefix_tree import KeptCaches
from edge_agent.engine.tokenizer import ChatTokenizer
from edge_agent.generation.suffix_tables import SuffixTables
from edge_agent.reporting.report_outbox import ReportOutbox
from edge_agent.reporting.reporter import Reporter
from edge_agent.serving.answerer import Answerer, error_reply
from edge_agent.serving.app_turns import AppTurns
from edge_agent.serving.event_triggers import EventTriggers
from edge_agent.serving.job_queue import Job, JobQueue
from edge_agent.serving.load_publisher import LoadPublisher
from edge_agent.serving.reply_resender import ReplyResender
from edge_agent.serving.request_defaults import with_defaults
from edge_agent.serving.request_planner import MB, RequestPlan, RequestPlanner, answer_deadline_s
from edge_agent.serving.self_test import check_step
from edge_agent.session.cloud_session import CloudSession
from edge_agent.session.kept_sessions import KeptSessions
from edge_agent.session.worker_directory import WorkerDirectory
from fleet.bundles.manifest import Bundle, Manifest
from fleet.errors import BusyError, CloudError, FleetError, PromptError, ProtocolError
from fleet.graphs.ort_runtime import check_instruction_set, is_out_of_memory
from fleet.graphs.partition import Partition, WorkCounter
from fleet.protocol import topics
from fleet.protocol.access import is_operator
from fleet.protocol.codec import decode_to_device, encode
from fleet.protocol.messages import Close, Opened
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest, parse_prompt
from fleet.protocol.report import ConfigProblem, DeviceStatus, encode_status
from fleet.transport.base import Handler, Transport, publish_or_log
from fleet.utils.memory_release import release_unused_memory, return_large_blocks
from fleet.utils.rate_limited_log import RateLimitedLog
from fleet.utils.validation import validated
from fleet.version import __version__

log = logging.getLogger(__name__)
drop_log = RateLimitedLog(log, 10.0)

STOP_TIMEOUT_S: Final = 5.0
MAX_FINISHED: Final = 32  # responses kept for an app that has missed some of its replies
OUT_OF_MEMORY: Final = (
    "this device ran out of memory on this request; "
    "ask for fewer tokens, or lower its cache_budget_mb or max_concurrent_requests"
)


class Agent:
    """The agent of one device: a context manager that announces itself and serves until closed."""

    def __init__(
        self,
        transport: Transport,
        bundle: Bundle,
        config: AgentConfig,
        reports_file: Path | None = None,
        *,
        tables_folder: Path | None = None,
        draw: Callable[[], float] = random.random,
        is_trial: bool = False,
        is_alone: bool = False,
    ) -> None:
        """Load the model.

        Args:
            transport: the device's link to the broker.
            bundle: the model.
            config: the settings.
            reports_file: the file of the reports that wait for the collector; None keeps them in
                memory.
            tables_folder: the folder of the suffix tables; None keeps them in memory.
            draw: returns numbers from [0, 1), which choose the responses that the cloud verifies
                as a sample.
            is_trial: run one step of the model first.
            is_alone: the link to the broker never comes up; refuse prompts that need a worker.

        Raises:
            FleetError: the model does not load, the thresholds do not fit its exits, or a setting
                is out of its range.
        """
        config = validated(config)
        check_instruction_set(bundle.manifest)
        self.name = transport.name
        self._transport = transport
        self._is_alone = is_alone
        self._manifest = bundle.manifest
        self._config = config
        self._config_version = 0
        self._config_error: ConfigProblem | None = None
        self._software_error: ConfigProblem | None = None
        self._event_error: ConfigProblem | None = None
        self._epoch = time.time_ns() // 1_000_000
        return_large_blocks()
        # The tokenizer comes first: the partition returns the memory that loading has freed.
        self._tokenizer = ChatTokenizer(bundle)
        split = self._manifest.split_of(config.split)
        partition = Partition(bundle, config.num_threads, config.provider, split)
        self.work: WorkCounter = partition.work  # since it was loaded
        if is_trial:
            check_step(partition, self._tokenizer)
        self._planner = RequestPlanner(partition, self._tokenizer, config, draw)
        self._model_lock = FairLock()
        self._new_jobs: AppTurns[Job] = AppTurns()
        self._resender = ReplyResender(transport)
        self._jobs = JobQueue(config.cache_budget_mb * MB, config.max_concurrent_requests)
        self._kept_caches = KeptCaches(self._free_bytes)
        self._active: dict[tuple[str, str], Job] = {}
        self._finished: dict[tuple[str, str], Job] = {}
        self._load = LoadPublisher(
            transport, config.max_concurrent_requests, lambda: len(self._active)
        )
        self._is_paused = False
        self._lock = threading.Lock()
        self._triggers = EventTriggers(
            transport,
            self._epoch,
            self._on_prompt,
            self._is_active,
            on_problem=self._report_event,
        )
        self._workers = WorkerDirectory(transport, self._worker_changed)
        self._kept_sessions = KeptSessions(transport, self._workers, continued_layer(partition))
        self._reporter = Reporter(transport, ReportOutbox(reports_file, config.max_kept_reports))
        self._tables = SuffixTables.for_bundle(self._manifest, tables_folder, config.suffix_tables)
        self._answerer = Answerer(
            transport,
            workers=self._workers,
            reporter=self._reporter,
            manifest=self._manifest,
            tokenizer=self._tokenizer,
            model_lock=self._model_lock,
            kept_caches=self._kept_caches,
            kept_sessions=self._kept_sessions,
            tables=self._tables,
            epoch=self._epoch,
        )
        self._planning_thread = threading.Thread(
            target=self._plan_jobs, name=f"plan-{self.name}", daemon=True
        )
        self._answer_threads = [
            threading.Thread(target=self._answer_jobs, name=f"answer-{self.name}-{i}", daemon=True)
            for i in range(config.max_concurrent_requests)
        ]
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._workers)
            stack.enter_context(self._reporter)
            self._subscribe(stack, topics.sessions_of_device(self.name), self._on_session)
            self._subscribe(stack, topics.cancels_to(self.name), self._on_cancel, qos=1)
            stack.callback(self._kept_sessions.close)
            stack.callback(self._tables.save, is_last=True)
            stack.callback(self._stop_jobs)
            self._resender.start()
            for thread in (self._planning_thread, *self._answer_threads):
                thread.start()
            # This subscription stays when the agent closes, so that prompts are refused, not lost.
            self._transport.subscribe(
                topics.prompts_to(self.name), self._on_prompt, qos=1, live_only=True
            )
            stack.callback(self._triggers.set, ())
            self._triggers.set(self._config.triggers)
            stack.callback(self._transport.off_up, self._announce)
            self._transport.on_up(self._announce)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Close, and publish that the device is offline."""
        self.close()
        publish_or_log(
            self._transport, topics.device_status(self.name), self.will(), qos=1, retain=True
        )

    def close(self) -> None:
        """Cancel the active requests, accept no more, and wait at most `STOP_TIMEOUT_S` seconds.

        Until the next agent subscribes to prompts, or the transport closes, each prompt gets the
        reply `busy`.
        """
        self._stack.close()

    def pause(self) -> None:
        """Accept no more prompts; active requests continue."""
        with self._lock:
            self._is_paused = True

    def resume(self) -> None:
        """Accept prompts again after `pause`."""
        with self._lock:
            self._is_paused = False

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle that it serves."""
        return self._manifest

    @property
    def started_at(self) -> float:
        """The time at which it was made, in seconds since 1970."""
        return self._epoch / 1000

    @property
    def max_positions(self) -> int:
        """The number of positions of prompt and answer together."""
        return self._planner.max_positions

    @property
    def is_idle(self) -> bool:
        """Whether no request is active."""
        with self._lock:
            return not self._active

    @property
    def late_s(self) -> float:
        """The time since the earliest deadline of the active requests; 0 if none has passed."""
        with self._lock:
            deadlines = [self._deadline(job) for job in self._active.values()]
        return max(0.0, time.monotonic() - min(deadlines, default=float("inf")))

    def _deadline(self, job: Job) -> float:
        return job.arrived_at + answer_deadline_s(job.prompt, self._config)

    def follow(
        self, config: AgentConfig, version: int, problem: ConfigProblem | None = None
    ) -> None:
        """Apply `config` from the next prompt on, and publish its `version` to the fleet.

        Only settings that :class:`fleet.protocol.desired_config.Settings` has may differ from the
        previous configuration. `problem` is the reason why no newer version is in use.

        Raises:
            ConfigError, PromptError: the split or the thresholds do not fit the bundle's exits.
            BundleError: a block of the new split cannot be loaded. In each case nothing has
                changed.
        """
        split = self._planner.partition.split
        self._planner.follow(config)
        if self._planner.partition.split != split:
            self._kept_caches.clear()
            self._kept_sessions.move(continued_layer(self._planner.partition))
            release_unused_memory()
        self._config = config
        self._config_version = version
        self._config_error = problem
        self._event_error = None
        if self._planning_thread.is_alive():
            self._triggers.set(config.triggers)
            self._announce()

    def report_software(self, problem: ConfigProblem | None) -> None:
        """Publish why the device does not run the desired version of its software."""
        self._software_error = problem
        if self._planning_thread.is_alive():
            self._announce()

    def _report_event(self, problem: ConfigProblem) -> None:
        """Publish why an event was dropped."""
        self._event_error = problem
        self._announce()

    @staticmethod
    def will() -> bytes:
        """The status payload of an offline device."""
        return encode_status(DeviceStatus(online=False, epoch=0))

    def _subscribe(self, stack: ExitStack, topic: str, handler: Handler, *, qos: int = 0) -> None:
        stack.callback(self._transport.unsubscribe, topic)
        self._transport.subscribe(topic, handler, qos=qos, live_only=True)

    def _stop_jobs(self) -> None:
        deadline = time.monotonic() + STOP_TIMEOUT_S
        self.pause()
        with self._lock:
            jobs = list(self._active.values())
        for job in jobs:
            self.cancel(job)
        self._new_jobs.close()
        self._resender.close(STOP_TIMEOUT_S)
        self._planning_thread.join(STOP_TIMEOUT_S)
        self._jobs.close()
        for thread in self._answer_threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _announce(self) -> None:
        status = DeviceStatus(
            online=True,
            epoch=self._epoch,
            bundle_id=self._manifest.bundle_id,
            version=__version__,
            mode=self._config.mode,
            config_version=self._config_version,
            config_error=self._config_error,
            software_error=self._software_error,
            event_error=self._event_error,
        )
        publish_or_log(
            self._transport,
            topics.device_status(self.name),
            encode_status(status),
            qos=1,
            retain=True,
        )
        self._load.publish()

    def _free_bytes(self) -> int:
        """Return the memory that kept caches may have now."""
        max_bytes = int(self._jobs.budget_bytes * self._config.reuse_share)
        return min(self._jobs.free_bytes, max_bytes)

    # Handlers run on the transport's thread and must not block.

    def _on_prompt(self, topic: str, payload: bytes) -> None:
        request_key = _prompt_key(self._transport, topic, payload)
        if request_key is None:
            return
        app, request = request_key
        try:
            reply_topic = topics.device_reply(self.name, app, request)
            job = Job(
                app=app,
                request=request,
                prompt=with_defaults(parse_prompt(payload), self._config),
                send=partial(publish_or_log, self._transport, reply_topic, qos=1),
                digest=hashlib.sha256(payload).digest(),
            )
            self._accept(job)
        except PromptError as error:
            refuse_prompt(self._transport, app, request, error)

    def submit(self, app: str, prompt: PromptRequest, send: Callable[[bytes], None]) -> Job:
        """Accept the prompt of an app on this machine. Any thread may call; it does not wait.

        `send` gets each reply, encoded, on another thread.

        Raises:
            BusyError: the device accepts no more requests of this app now.
        """
        job = Job(
            app=app,
            request=uuid.uuid4().hex,
            prompt=with_defaults(prompt, self._config),
            send=send,
        )
        self._accept(job)
        return job

    def cancel(self, job: Job) -> None:
        """End an answer early, or remove it from the queue."""
        self._jobs.cancel(job)
        if cloud_session := job.cloud_session:
            cloud_session.abandon("the request was cancelled")

    def _accept(self, job: Job) -> None:
        """Queue a job.

        When the same request comes again, its replies were lost, and are sent again. A different
        prompt with the id of a finished request is a new request.

        Raises:
            BusyError: the device accepts no more requests of this app now.
            PromptError: a different prompt with this id is being answered.
        """
        with self._lock:
            active = self._active.get(job.key)
            earlier = active or self._finished.get(job.key)
            is_repeated = earlier is not None and earlier.digest == job.digest
            if not is_repeated:
                if active:
                    raise PromptError(
                        f"request id {job.request} belongs to a different prompt, which is being "
                        "answered; send this prompt with an id of its own"
                    )
                self._check_capacity(job.app)
                self._finished.pop(job.key, None)
                self._active[job.key] = job
        if earlier and is_repeated:
            self._resender.add(earlier)
        else:
            self._new_jobs.put(job.app, job)
            self._load.publish()

    def _check_capacity(self, app: str) -> None:
        """Check that one more request of `app` is accepted now. Raises BusyError.

        Apps share the `max_queued_requests` places equally. If an app filled all places while it
        was alone, other apps still get their shares, up to twice the number of places. An operator
        gets a share even beyond that.
        """
        max_requests = self._config.max_queued_requests
        if self._is_paused:
            raise BusyError("this device is stopping; try again when it is back")
        owners = [owner for owner, _ in self._active]
        share = max(1, max_requests // len({*owners, app}))
        is_full = len(owners) >= 2 * max_requests and not is_operator(app)
        if owners.count(app) >= share or is_full:
            raise BusyError(
                f"this device accepts {max_requests} requests at once, {share} of them from "
                f"{app} now, and has {len(owners)}; try again later"
            )

    def _is_active(self, app: str, request: str) -> bool:
        return (app, request) in self._active

    def _on_cancel(self, topic: str, payload: bytes) -> None:
        del payload
        request_key = _request_key(topic, topics.CANCEL_FILTER)
        if request_key is None:
            return
        with self._lock:
            job = self._active.get(request_key)
        if job:
            self.cancel(job)

    def _on_session(self, topic: str, payload: bytes) -> None:
        try:
            _, session = topics.parse_topic(topic, topics.TO_DEVICE_FILTER)
            for cloud_session in self._cloud_sessions():
                if cloud_session.session == session:
                    cloud_session.receive(payload)
                    return
            self._close_late_session(session, payload)
        except ProtocolError as error:
            drop_log.warning("message on %r dropped: %s", topic[:200], error)

    def _close_late_session(self, session: str, payload: bytes) -> None:
        """Close a session that a worker opened after its request had ended."""
        message = decode_to_device(payload)
        if not isinstance(message, Opened) or message.session != session:
            return
        if not self._kept_sessions.is_kept(session, message.worker):
            topic = topics.to_worker(message.worker, self.name, session)
            publish_or_log(self._transport, topic, encode(Close(session)))

    def _worker_changed(self, worker: str) -> None:
        self._kept_sessions.worker_changed(worker)
        for cloud_session in self._cloud_sessions():
            cloud_session.worker_changed(worker)

    def _cloud_sessions(self) -> list[CloudSession]:
        with self._lock:
            return [job.cloud_session for job in self._active.values() if job.cloud_session]

    # One thread plans, apps in turn; then several threads answer, one job each.

    def _plan_jobs(self) -> None:
        while job := self._new_jobs.get():
            with self._errors_as_replies(job):
                self._jobs.put(job, self._plan(job.prompt))

    def _plan(self, prompt: PromptRequest) -> RequestPlan:
        plan = self._planner.plan(prompt)
        if self._is_alone and plan.applied_mode is Mode.VERIFIED:
            raise CloudError(
                f"mode '{plan.mode}' needs a worker for this request, and this device is alone; "
                "use the mode 'standalone', or a fleet"
            )
        return plan

    def _answer_jobs(self) -> None:
        while partition := self._answer_job():
            partition.release_tables()
            self._tables.save()  # after the job's end, for which its app may wait
            is_moved = partition is not self._planner.partition
            del partition
            if is_moved:
                release_unused_memory()

    def _answer_job(self) -> Partition | None:
        """Answer the next job; return the partition that it used, or None when there is no job."""
        with self._jobs.lease() as lease:
            if lease is None:
                return None
            job, plan = lease
            with self._errors_as_replies(job):
                self._answerer.answer(job, plan)
                self._finish(job)
            return plan.partition

    @contextmanager
    def _errors_as_replies(self, job: Job) -> Iterator[None]:
        """Make an error the job's last reply: one bad request must not end the device."""
        try:
            yield
        except FleetError as error:
            self._fail(job, error.code, str(error))
        except Exception as error:  # the thread must go on
            if is_out_of_memory(error):
                self._fail(job, "memory", OUT_OF_MEMORY)
            else:
                log.exception("request %s of %s failed", job.request, job.app)
                self._fail(job, "internal", f"the device failed on this request: {error}")

    def _fail(self, job: Job, code: str, message: str) -> None:
        self._answerer.reply(job, error_reply(len(job.replies), code, message))
        self._finish(job)

    def _finish(self, job: Job) -> None:
        """Keep only the replies of a job that has ended, if its app can ask for them again."""
        with self._lock:
            del self._active[job.key]
            job.release()
            if job.digest:
                self._finished[job.key] = job
            while len(self._finished) > MAX_FINISHED:
                del self._finished[next(iter(self._finished))]
        self._load.publish()


def continued_layer(partition: Partition) -> int | None:
    """Return the layer of sessions that may be continued; None if the device uploads nothing."""
    return None if partition.is_whole else partition.upload_layer


def refuse_prompt(transport: Transport, app: str, request: str, error: PromptError) -> None:
    """Reply to a request that is not accepted with the reason."""
    payload = msgspec.json.encode(error_reply(0, error.code, str(error)))
    topic = topics.device_reply(transport.name, app, request)
    publish_or_log(transport, topic, payload, qos=1)


def refuse_prompts(transport: Transport) -> None:
    """Reply `busy` to every prompt until the next agent subscribes to prompts."""

    def on_prompt(topic: str, payload: bytes) -> None:
        if request_key := _prompt_key(transport, topic, payload):
            error = BusyError("this device is changing its model; try again in a moment")
            refuse_prompt(transport, *request_key, error)

    transport.subscribe(topics.prompts_to(transport.name), on_prompt, qos=1, live_only=True)


def _prompt_key(transport: Transport, topic: str, payload: bytes) -> tuple[str, str] | None:
    """Return the app and the request id of a prompt; None if there is no prompt to answer.

    A prompt with a malformed request id is refused here.
    """
    if not payload:  # as when a client clears a retained message
        return None
    request_key = _request_key(topic, topics.PROMPT_FILTER)
    if request_key is None and (unchecked := topics.unchecked_request(topic)):
        app, request = unchecked
        error = PromptError(
            f"request id {request!r}: expected 1 to 63 characters of a-z, 0-9, '-' and '_'; "
            "choose such an id"
        )
        refuse_prompt(transport, app, request, error)
    return request_key


def _request_key(topic: str, topic_filter: str) -> tuple[str, str] | None:
    """Return the app and the request of a topic; None, with a line in the log, if it is bad."""
    try:
        _, app, request = topics.parse_topic(topic, topic_filter)
    except ProtocolError as error:
        drop_log.warning("message on %r dropped: %s", topic[:200], error)
        return None
    return app, request
