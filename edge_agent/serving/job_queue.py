"""Accepted requests: the progress of each, and the queue that chooses the next one."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from edge_agent.answer_tracer import AnswerTracer
from edge_agent.generation.mode_controller import ModeController
from edge_agent.generation.speculative import SpeculativeDecoder
from edge_agent.serving.request_planner import RequestPlan
from edge_agent.session.cloud_session import CloudSession
from edge_agent.session.kept_sessions import KeptSession
from fleet.protocol.prompt import PromptRequest, TokenLogprob

RESERVED_S: Final = 10.0
"""The time after an app's last job for which other apps leave a lease free for its next one."""


@dataclass(eq=False, kw_only=True)
class Job:
    """An accepted request of an app, and the progress of the present choice of its response.

    `send` delivers an encoded reply to the app. `digest` is a hash of the request's payload; it is
    empty for an app that cannot send the same request again. `is_resend_due` tells that its app has
    repeated the request, and waits for the replies. `received_at` is in seconds since 1970; the
    other times are those of the monotonic clock.
    """

    app: str
    request: str
    prompt: PromptRequest
    send: Callable[[bytes], None]
    digest: bytes = b""
    generation: str = field(default_factory=lambda: uuid.uuid4().hex)
    received_at: float = field(default_factory=time.time)
    arrived_at: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)
    cloud_session: CloudSession | None = None
    kept_session: KeptSession | None = None
    speculative: SpeculativeDecoder | None = None
    mode_controller: ModeController | None = None
    tracer: AnswerTracer | None = None
    replies: list[bytes] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    is_resend_due: bool = False
    sources: dict[str, int] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    choice: int = 0
    reused_tokens: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """The app and the request, which together are unique."""
        return self.app, self.request

    @property
    def report_name(self) -> str:
        """The unique name of the present choice for reports."""
        return f"{self.generation}-{self.choice}" if self.choice else self.generation

    def begin(self, choice: int) -> None:
        """Begin a choice of the response; each after the first has the next seed."""
        if choice == 0:
            return
        seed = ((self.prompt.seed or 0) + 1) % (1 << 63)
        self.prompt = replace(self.prompt, seed=seed)
        self.choice = choice
        self.sources = {}
        self.logprobs = []
        self.first_token_at = 0.0
        self.last_token_at = 0.0
        self.release()

    def count(self, source: str) -> None:
        """Count one token from `source`, generated now."""
        self.last_token_at = time.monotonic()
        self.first_token_at = self.first_token_at or self.last_token_at
        self.sources[source] = self.sources.get(source, 0) + 1

    def release(self) -> None:
        """Drop the references that hold memory once the response is complete."""
        self.cloud_session = None
        self.kept_session = None
        self.speculative = None
        self.mode_controller = None
        self.tracer = None
        self.token_ids = []
        self.logprobs = []

    @property
    def num_tokens(self) -> int:
        return sum(self.sources.values())

    @property
    def ttft_ms(self) -> float:
        """Time from the prompt's arrival to the first token, including the time in the queue."""
        return max(0.0, self.first_token_at - self.arrived_at) * 1000

    @property
    def tpot_ms(self) -> float:
        """Mean time per token after the first."""
        return (self.last_token_at - self.first_token_at) * 1000 / max(1, self.num_tokens - 1)


class JobQueue:
    """Jobs with their plans, served app by app in turn, within a budget of memory.

    The next job is the oldest one of the app with the fewest leased jobs; among several such apps,
    of the one whose last lease is the oldest. It is leased as soon as its caches fit the free
    memory, and no smaller job overtakes it then. A cancelled job needs no memory and is leased at
    once.

    At most `max_leases` jobs are leased at once. An app with all other leases does not get the last
    one for `RESERVED_S` after a job of another app, so that an app that sends its next prompt after
    each answer need not wait for the answers to an app that sends many.
    """

    def __init__(self, budget_bytes: int, max_leases: int) -> None:
        self.budget_bytes = budget_bytes
        self.max_leases = max_leases
        self._changed = threading.Condition()
        self._waiting: list[tuple[Job, RequestPlan]] = []
        self._leased: dict[Job, int] = {}
        self._num_leases = 0
        self._last_lease: dict[str, int] = {}
        self._last_end: dict[str, float] = {}  # monotonic time
        self._closed = False

    @property
    def free_bytes(self) -> int:
        """The memory that no leased job has."""
        with self._changed:
            return self.budget_bytes - sum(self._leased.values())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def put(self, job: Job, plan: RequestPlan) -> None:
        """Queue a job whose plan fits the whole budget."""
        with self._changed:
            self._waiting.append((job, plan))
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Mark a job as cancelled, in the queue or leased."""
        with self._changed:
            job.cancelled.set()
            self._changed.notify_all()

    def close(self) -> None:
        """Make `lease` give None once the queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @contextmanager
    def lease(self) -> Iterator[tuple[Job, RequestPlan] | None]:
        """Wait for the next job, and hold its memory until the block ends.

        None when the queue is closed and empty.
        """
        with self._changed:
            entry = self._wait_for_next()
        try:
            yield entry
        finally:
            if entry:
                with self._changed:
                    del self._leased[entry[0]]
                    self._last_end[entry[0].app] = time.monotonic()
                    self._changed.notify_all()

    def _wait_for_next(self) -> tuple[Job, RequestPlan] | None:
        while (index := self._next_index()) is None:
            if self._closed and not self._waiting:
                return None
            self._changed.wait(RESERVED_S if self._waiting else None)
        job, plan = self._waiting.pop(index)
        self._leased[job] = 0 if job.cancelled.is_set() else plan.num_bytes
        self._num_leases += 1
        self._last_lease[job.app] = self._num_leases
        return job, plan

    def _next_index(self) -> int | None:
        for index, (job, _) in enumerate(self._waiting):
            if job.cancelled.is_set():
                return index
        ready = [index for index, (job, _) in enumerate(self._waiting) if self._may_lease(job.app)]
        if not ready:
            return None
        index = min(ready, key=lambda index: self._turn(self._waiting[index][0].app))
        has_room = self._waiting[index][1].num_bytes <= self.free_bytes
        return index if has_room else None

    def _may_lease(self, app: str) -> bool:
        """Return whether an app may lease one more, or leaves the last lease to another app."""
        apps = {job.app for job in self._leased}
        if apps != {app} or len(self._leased) < self.max_leases - 1:
            return True
        began = time.monotonic() - RESERVED_S
        return not any(end > began for other, end in self._last_end.items() if other != app)

    def _turn(self, app: str) -> tuple[int, int]:
        """Return the rank of an app's next job; the lowest is next."""
        num_leased = sum(job.app == app for job in self._leased)
        return num_leased, self._last_lease.get(app, 0)
