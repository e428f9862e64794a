"""The metrics and the health of a worker, read from outside its thread while it works."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from cloud_broker_worker.worker.counters import BOUNDS_S, Durations
from cloud_broker_worker.worker.engine import WorkerEngine
from cloud_broker_worker.worker.worker import Worker

STALL_S: Final = 60.0


class WorkerMonitor:
    """The monitor of a worker, which is unhealthy when a step takes longer than `stall_s`
    seconds.
    """

    def __init__(self, worker: Worker, stall_s: float = STALL_S) -> None:
        self._worker = worker
        self._stall_s = stall_s

    def why_unhealthy(self) -> str | None:
        if not self._worker.is_serving:
            return "the worker's thread has ended"
        step_s = time.monotonic() - self._worker.last_cycle_at
        if step_s > self._stall_s:
            return (
                f"the worker's thread has been in one step for {step_s:.0f} s, "
                f"expected at most {self._stall_s:g}"
            )
        return None

    def why_unready(self) -> str | None:
        if self._worker.engine.is_draining:
            return "the worker is draining"
        if not self._worker.is_connected:
            return "the worker has no connection to the broker"
        return self.why_unhealthy()

    def collect(self) -> Iterable[Metric]:
        engine = self._worker.engine
        yield from self._gauges(engine)
        yield _weights(self._worker)
        yield from _counters(engine)
        yield histogram(
            "fleet_worker_queue_seconds",
            "Time from a request's arrival to its first step.",
            {"": engine.counters.queued},
        )
        yield histogram(
            "fleet_worker_answer_seconds",
            "Time from a request's arrival to its response.",
            {"verify": engine.counters.answered},
            "kind",
        )

    def _gauges(self, engine: WorkerEngine) -> Iterable[Metric]:
        sessions = list(engine.sessions.values())  # a copy: the worker's thread changes the dict
        jobs = [(job, session.received) for session in sessions if (job := session.job)]
        waiting = [job.arrived for job, received in jobs if job.stop <= received]
        now = time.monotonic()
        oldest_s = now - min(waiting, default=now)
        for name, text, value in (
            ("sessions", "Sessions on this worker.", len(sessions)),
            (
                "kept_sessions",
                "Of these, sessions that have ended and may be continued.",
                sum(session.is_kept for session in sessions),
            ),
            (
                "waiting_questions",
                "Verify requests that have their context and no response yet.",
                len(waiting),
            ),
            ("oldest_question_seconds", "Waiting time of the oldest of them.", oldest_s),
            (
                "inbox_messages",
                "Messages that have arrived and wait for the end of the step.",
                self._worker.num_queued,
            ),
            (
                "kv_used_bytes",
                "Bytes of KV caches and hidden states, of the budget.",
                engine.pool.used_bytes,
            ),
            (
                "kv_budget_bytes",
                "Limit for KV caches and hidden states.",
                engine.pool.budget_bytes,
            ),
            (
                "draining",
                "1 while the worker accepts no sessions because it is to stop.",
                int(engine.is_draining),
            ),
            (
                "connected",
                "1 while the worker is connected to the broker.",
                int(self._worker.is_connected),
            ),
        ):
            yield GaugeMetricFamily(f"fleet_worker_{name}", text, value)


def _weights(worker: Worker) -> Metric:
    """Return a gauge of value 1, whose label is the kind of the worker's weights."""
    text = "1 for the kind of the worker's weights."
    family = GaugeMetricFamily("fleet_worker_weights", text, labels=["kind"])
    family.add_metric([worker.weights], 1)
    return family


def _counters(engine: WorkerEngine) -> Iterable[Metric]:
    counters = engine.counters
    for name, text, value in (
        ("positions", "Positions run through the upper layers.", counters.num_positions),
        (
            "continued_sessions",
            "Sessions that began with positions of an earlier one.",
            counters.num_continued,
        ),
        ("reused_positions", "Positions with which these sessions began.", counters.num_reused),
        ("expired_questions", "Verify requests whose deadline has passed.", counters.num_expired),
        (
            "evictions",
            "KV caches taken from one session for another.",
            engine.session_store.num_evictions,
        ),
    ):
        yield CounterMetricFamily(f"fleet_worker_{name}", text, value)
    refusals = CounterMetricFamily(
        "fleet_worker_refusals", "Refusals of sessions and requests.", labels=["code"]
    )
    for code, count in dict(counters.refusals).items():
        refusals.add_metric([code], count)
    yield refusals


def histogram(
    name: str, text: str, durations: dict[str, Durations], label: str | None = None
) -> Metric:
    """Return a histogram with one set of buckets for each value of `label`, or with a single
    one.
    """
    family = HistogramMetricFamily(name, text, labels=[label] if label else None)
    bounds = [*map(str, BOUNDS_S), "+Inf"]
    for value, measured in durations.items():
        buckets = list(zip(bounds, measured.cumulative(), strict=True))
        family.add_metric([value] if label else [], buckets, measured.sum_s)
    return family
