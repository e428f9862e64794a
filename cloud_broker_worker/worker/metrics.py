"""A worker's metrics and whether it is well, read from outside its thread while it works."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from cloud_broker_worker.worker.counters import BOUNDS_S, Durations
from cloud_broker_worker.worker.worker import Worker

STALL_S: Final = 60.0


class WorkerMonitor:
    """What the endpoint tells of a worker. It is unhealthy when a step takes longer than `stall_s` seconds."""

    def __init__(self, worker: Worker, stall_s: float = STALL_S) -> None:
        self._worker = worker
        self._stall_s = stall_s

    def why_unhealthy(self) -> str | None:
        if not self._worker.is_serving:
            return "the worker's thread has ended"
        silent_s = time.monotonic() - self._worker.last_turn
        if silent_s > self._stall_s:
            return f"the worker's thread has been in one step for {silent_s:.0f} s, expected at most {self._stall_s:g}"
        return None

    def why_unready(self) -> str | None:
        if self._worker.engine.is_draining:
            return "the worker is draining"
        if not self._worker.is_connected:
            return "the worker has no connection to the broker"
        return self.why_unhealthy()

    def collect(self) -> Iterable[Metric]:
        engine = self._worker.engine
        tally = engine.tally
        memory = engine.memory
        pool = engine.pool
        sessions = list(
            engine.sessions.values()
        )  # a copy: the worker's thread changes the dict meanwhile
        questions = [(question, s.received) for s in sessions if (question := s.question)]
        waiting = [
            question.arrived for question, received in questions if question.stop <= received
        ]
        now = time.monotonic()
        gauges = {
            "sessions": ("Sessions that it holds.", len(sessions)),
            "waiting_questions": (
                "Assists and verifies that could be answered and are not yet.",
                len(waiting),
            ),
            "oldest_question_seconds": (
                "How long the first of them has waited.",
                now - min(waiting, default=now),
            ),
            "inbox_messages": (
                "Messages that have arrived and wait for the step's end.",
                self._worker.num_queued,
            ),
            "kv_used_bytes": ("KV caches and hidden states, of the budget.", pool.used_bytes),
            "kv_budget_bytes": ("What KV caches and hidden states may take.", pool.budget_bytes),
            "draining": (
                "1 while it takes no sessions because it is to stop.",
                int(engine.is_draining),
            ),
            "connected": ("1 while it is connected to the broker.", int(self._worker.is_connected)),
        }
        counters = {
            "positions": ("Positions run through the upper layers.", tally.num_positions),
            "expired_questions": (
                "Questions that were not answered within their deadline.",
                tally.num_expired,
            ),
            "evictions": ("KV caches taken from a session for another.", memory.num_evictions),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"fleet_worker_{name}", text, value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"fleet_worker_{name}", text, value)
        refusals = CounterMetricFamily(
            "fleet_worker_refusals", "Sessions and questions refused.", labels=["code"]
        )
        for code, count in dict(tally.refusals).items():
            refusals.add_metric([code], count)
        yield refusals
        yield histogram(
            "fleet_worker_queue_seconds",
            "From a question's arrival to its first step.",
            {"": tally.queued},
        )
        yield histogram(
            "fleet_worker_answer_seconds",
            "From a question's arrival to its answer.",
            tally.answered,
            "kind",
        )


def histogram(
    name: str, text: str, durations: dict[str, Durations], label: str | None = None
) -> Metric:
    """A histogram with one set of buckets for each value of `label`, or with one alone."""
    family = HistogramMetricFamily(name, text, labels=[label] if label else None)
    bounds = [*map(str, BOUNDS_S), "+Inf"]
    for value, measured in durations.items():
        buckets = list(zip(bounds, measured.cumulative(), strict=True))
        family.add_metric([value] if label else [], buckets, measured.sum_s)
    return family
