"""Requests that were accepted: how each goes, and which is next."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from edge_agent.generation.mode_controller import ModeController
from edge_agent.generation.speculative import SpeculativeDecoder
from edge_agent.serving.request_planner import RequestPlan
from edge_agent.session.cloud_session import CloudSession
from fleet.protocol.prompt import PromptRequest


@dataclass(eq=False, kw_only=True)
class Job:
    """One accepted request of an app, and how its answer has gone so far."""

    app: str
    request: str
    prompt: PromptRequest
    generation: str = field(default_factory=lambda: uuid.uuid4().hex)
    received_at: float = field(default_factory=time.time)
    arrived: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)
    uplink: CloudSession | None = None
    drafts: SpeculativeDecoder | None = None
    modes: ModeController | None = None
    replies: list[bytes] = field(default_factory=list)
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


class JobQueue:
    """Jobs with their plans, first come, first served; a job is given out when its caches fit what is free.

    A later and smaller job does not overtake one that waits for memory. A cancelled one needs none and goes at once.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._changed = threading.Condition()
        self._waiting: list[tuple[Job, RequestPlan]] = []
        self._leased: dict[Job, int] = {}
        self._closed = False

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - sum(self._leased.values())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def put(self, job: Job, plan: RequestPlan) -> None:
        """Queues a job whose plan fits the whole budget."""
        with self._changed:
            self._waiting.append((job, plan))
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Marks a job, wherever it is, and lets it out when it waits here."""
        with self._changed:
            job.cancelled.set()
            self._changed.notify_all()

    def close(self) -> None:
        """Lets everybody go who waits for a job, once the queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @contextmanager
    def take(self) -> Iterator[tuple[Job, RequestPlan] | None]:
        """The next job, which holds its memory until the block ends; None when the queue is closed and empty."""
        with self._changed:
            while (index := self._next()) is None and not (self._closed and not self._waiting):
                self._changed.wait()
            taken = None if index is None else self._waiting.pop(index)
            if taken:
                job, plan = taken
                self._leased[job] = 0 if job.cancelled.is_set() else plan.num_bytes
        try:
            yield taken
        finally:
            if taken:
                with self._changed:
                    del self._leased[taken[0]]
                    self._changed.notify_all()

    def _next(self) -> int | None:
        for index, (job, plan) in enumerate(self._waiting):
            if job.cancelled.is_set() or (index == 0 and plan.num_bytes <= self.free_bytes):
                return index
        return None
