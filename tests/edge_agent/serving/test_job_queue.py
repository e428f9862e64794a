"""The queue of accepted requests: order, memory, cancellation, closing."""

from __future__ import annotations

import queue
import threading
from typing import cast

import pytest

from edge_agent.config import AgentConfig
from edge_agent.generation.mode_policy import Targets
from edge_agent.serving import job_queue
from edge_agent.serving.job_queue import Job, JobQueue
from edge_agent.serving.request_planner import RequestPlan
from fleet.graphs.partition import Partition
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest

WAIT_S = 30.0
BUDGET = 100
MAX_LEASES = 8


def put(jobs: JobQueue, request: str, num_bytes: int, app: str = "app") -> Job:
    prompt = PromptRequest(prompt="x")
    job = Job(app=app, request=request, prompt=prompt, send=lambda _: None)
    plan = RequestPlan(
        partition=cast(Partition, None),  # a queue runs no model
        prompt_ids=[1],
        max_new_tokens=1,
        thresholds=(1.0,),
        mode=Mode.STANDALONE,
        targets=Targets(),
        deadline_s=60.0,
        num_bytes=num_bytes,
        config=AgentConfig(),
        eos_token_ids=(),
    )
    jobs.put(job, plan)
    return job


def lease_in_thread(jobs: JobQueue) -> queue.Queue[str | None]:
    """Lease the next job on another thread, and release it.

    The queue receives its request, or None at the end.
    """
    requests: queue.Queue[str | None] = queue.Queue()

    def lease() -> None:
        with jobs.lease() as entry:
            requests.put(entry[0].request if entry else None)

    threading.Thread(target=lease, daemon=True).start()
    return requests


def test_jobs_that_fit_together_are_leased_together_and_their_memory_is_freed() -> None:
    jobs = JobQueue(BUDGET, MAX_LEASES)
    put(jobs, "a", 60)
    put(jobs, "b", 40)
    with jobs.lease() as first, jobs.lease() as second:
        assert first is not None
        assert second is not None
        assert (first[0].request, second[0].request) == ("a", "b")
        assert jobs.free_bytes == 0
    assert jobs.free_bytes == BUDGET


def test_a_job_waits_for_memory_and_a_smaller_one_does_not_overtake_it() -> None:
    jobs = JobQueue(BUDGET, MAX_LEASES)
    put(jobs, "running", 80)
    with jobs.lease():
        put(jobs, "large", 90)
        put(jobs, "small", 10)
        assert jobs._next_index() is None
        requests = lease_in_thread(jobs)
        assert jobs.num_waiting == 2
    assert requests.get(timeout=WAIT_S) == "large"
    assert lease_in_thread(jobs).get(timeout=WAIT_S) == "small"


def test_apps_take_turns_however_many_jobs_each_has() -> None:
    jobs = JobQueue(BUDGET, MAX_LEASES)
    for request in ("a1", "a2", "a3", "a4"):
        put(jobs, request, 1, "a")
    order = []
    with jobs.lease() as first, jobs.lease() as second:
        for request in ("b1", "b2"):
            put(jobs, request, 1, "b")
        put(jobs, "c1", 1, "c")
        with jobs.lease() as third, jobs.lease() as fourth, jobs.lease() as fifth:
            order = [entry[0].request for entry in (first, second, third, fourth, fifth) if entry]
    assert order == ["a1", "a2", "b1", "c1", "b2"]
    for expected in ("a3", "a4"):
        assert lease_in_thread(jobs).get(timeout=WAIT_S) == expected


def flooded_queue() -> JobQueue:
    """A queue of two leases: app a waits with two jobs, and one of app b has just ended."""
    jobs = JobQueue(BUDGET, max_leases=2)
    put(jobs, "b1", 1, "b")
    with jobs.lease():
        pass
    for request in ("a1", "a2"):
        put(jobs, request, 1, "a")
    return jobs


def test_an_app_with_all_leases_but_one_leaves_the_last_to_an_app_that_was_just_served() -> None:
    jobs = flooded_queue()
    with jobs.lease():
        requests = lease_in_thread(jobs)
        put(jobs, "b2", 1, "b")
        assert requests.get(timeout=WAIT_S) == "b2"


def test_an_app_leases_all_while_no_other_app_was_just_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_queue, "RESERVED_S", 0.05)
    jobs = flooded_queue()
    with jobs.lease():
        assert lease_in_thread(jobs).get(timeout=WAIT_S) == "a2"


def test_a_job_that_waits_for_memory_is_not_overtaken_by_another_app() -> None:
    jobs = JobQueue(BUDGET, MAX_LEASES)
    put(jobs, "running", 80, "a")
    with jobs.lease():
        put(jobs, "large", 90, "b")
        put(jobs, "small", 10, "a")
        assert jobs._next_index() is None
        requests = lease_in_thread(jobs)
    assert requests.get(timeout=WAIT_S) == "large"


def test_a_cancelled_job_is_leased_at_once_without_memory() -> None:
    jobs = JobQueue(BUDGET, MAX_LEASES)
    put(jobs, "running", 80)
    with jobs.lease():
        put(jobs, "large", 90)
        cancelled = put(jobs, "cancelled", 90)
        requests = lease_in_thread(jobs)
        jobs.cancel(cancelled)
        assert requests.get(timeout=WAIT_S) == "cancelled"
        assert jobs.num_waiting == 1


def test_a_failed_job_frees_its_memory() -> None:
    jobs = JobQueue(BUDGET, MAX_LEASES)
    put(jobs, "a", 60)
    try:
        with jobs.lease():
            raise MemoryError
    except MemoryError:
        assert jobs.free_bytes == BUDGET


def test_a_closed_queue_leases_its_last_jobs_and_then_ends() -> None:
    jobs = JobQueue(BUDGET, MAX_LEASES)
    put(jobs, "last", 60)
    jobs.close()
    assert lease_in_thread(jobs).get(timeout=WAIT_S) == "last"
    assert lease_in_thread(jobs).get(timeout=WAIT_S) is None
