"""The queue of accepted requests: order, memory, cancelling, the end."""

from __future__ import annotations

import queue
import threading

from edge_agent.config import AgentConfig
from edge_agent.generation.mode_policy import Targets
from edge_agent.serving.job_queue import Job, JobQueue
from edge_agent.serving.request_planner import RequestPlan
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest

WAIT_S = 30.0
BUDGET = 100


def put(jobs: JobQueue, request: str, num_bytes: int) -> Job:
    job = Job(app="app", request=request, prompt=PromptRequest(prompt="x"))
    jobs.put(
        job,
        RequestPlan(
            prompt_ids=[1],
            max_new_tokens=1,
            thresholds=(1.0,),
            mode=Mode.STANDALONE,
            targets=Targets(),
            deadline_s=60.0,
            num_bytes=num_bytes,
            config=AgentConfig(),
            eos_token_ids=(),
        ),
    )
    return job


def take_one(jobs: JobQueue) -> queue.Queue[str | None]:
    """Takes the next job on another thread and gives it back; its name, or None at the end, comes through the queue."""
    taken: queue.Queue[str | None] = queue.Queue()

    def take() -> None:
        with jobs.take() as item:
            taken.put(item[0].request if item else None)

    threading.Thread(target=take, daemon=True).start()
    return taken


def test_jobs_that_fit_together_are_out_together_and_their_memory_comes_back() -> None:
    jobs = JobQueue(BUDGET)
    put(jobs, "a", 60)
    put(jobs, "b", 40)
    with jobs.take() as first, jobs.take() as second:
        assert first is not None
        assert second is not None
        assert (first[0].request, second[0].request) == ("a", "b")
        assert jobs.free_bytes == 0
    assert jobs.free_bytes == BUDGET


def test_a_job_waits_for_memory_and_a_smaller_one_does_not_overtake_it() -> None:
    jobs = JobQueue(BUDGET)
    put(jobs, "running", 80)
    with jobs.take():
        put(jobs, "large", 90)
        put(jobs, "small", 10)
        assert jobs._next() is None
        taken = take_one(jobs)
        assert jobs.num_waiting == 2
    assert taken.get(timeout=WAIT_S) == "large"
    assert take_one(jobs).get(timeout=WAIT_S) == "small"


def test_a_cancelled_job_comes_out_at_once_without_memory() -> None:
    jobs = JobQueue(BUDGET)
    put(jobs, "running", 80)
    with jobs.take():
        put(jobs, "large", 90)
        cancelled = put(jobs, "cancelled", 90)
        taken = take_one(jobs)
        jobs.cancel(cancelled)
        assert taken.get(timeout=WAIT_S) == "cancelled"
        assert jobs.num_waiting == 1


def test_a_failed_job_gives_its_memory_back() -> None:
    jobs = JobQueue(BUDGET)
    put(jobs, "a", 60)
    try:
        with jobs.take():
            raise MemoryError
    except MemoryError:
        assert jobs.free_bytes == BUDGET


def test_a_closed_queue_gives_out_what_it_has_and_then_says_that_it_is_the_end() -> None:
    jobs = JobQueue(BUDGET)
    put(jobs, "last", 60)
    jobs.close()
    assert take_one(jobs).get(timeout=WAIT_S) == "last"
    assert take_one(jobs).get(timeout=WAIT_S) is None
