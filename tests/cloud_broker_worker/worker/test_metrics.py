"""The metrics of a worker: counts of its engine, and its health and readiness."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from msgspec import UNSET

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.counters import BOUNDS_S, Durations
from cloud_broker_worker.worker.metrics import WorkerMonitor
from cloud_broker_worker.worker.worker import Worker
from fleet.bundles.manifest import Bundle
from fleet.errors import ConfigError
from fleet.monitoring.http_endpoint import HttpEndpoint
from fleet.protocol import topics
from fleet.protocol.codec import decode_to_device, encode
from fleet.protocol.messages import PROTOCOL, Close, Continuation, Open, Opened, Sampling
from fleet.transport.in_memory import InMemoryBroker
from tests.brokers import HOST, Inbox, free_port, running_site, wait_until
from tests.cloud_broker_worker.worker.conftest import Bench, TinyModel
from tests.cloud_broker_worker.worker.test_cli import RunningWorker
from tests.cloud_broker_worker.worker.test_worker import Site
from tests.scrape import get, scrape

WAIT_S = 120.0


# Counts of the engine.


def test_a_duration_is_counted_below_its_bound_and_in_the_sum() -> None:
    durations = Durations()
    for duration_s in (0.0, BOUNDS_S[0], BOUNDS_S[0] * 1.01, 99.0):
        durations.add(duration_s)
    assert durations.cumulative() == [2, 3, *[3] * (len(BOUNDS_S) - 2), 4]
    assert durations.sum_s == pytest.approx(99.0 + BOUNDS_S[0] * 2.01)


def test_every_position_that_runs_is_counted(bench: Bench) -> None:
    bench.open()
    bench.context(bench.upload(6))
    bench.ask(5)
    bench.token()
    bench.ask(5, request=1)  # asked anew: its last position runs again
    bench.token()
    assert bench.engine.counters.num_positions == 7


def test_a_response_is_counted_with_the_time_since_its_request_arrived(bench: Bench) -> None:
    bench.open()
    bench.context(bench.upload(6))
    bench.ask(5)
    bench.now += 0.3
    bench.token()
    counters = bench.engine.counters
    assert counters.queued.sum_s == pytest.approx(0.3)
    assert counters.answered.sum_s == pytest.approx(0.3)


def test_a_verify_is_counted_as_one(bench: Bench) -> None:
    rows = bench.upload(6)
    bench.open()
    bench.context(rows)
    bench.verify(3, bench.expected_tokens(rows, 3)[:2])
    bench.verdict()
    assert bench.engine.counters.answered.cumulative()[-1] == 1


def test_a_request_that_takes_many_steps_is_queued_until_the_first(bench: Bench) -> None:
    bench.start(max_batch_positions=2)
    bench.open()
    bench.context(bench.upload(6))
    bench.ask(5)
    for _ in range(3):
        bench.now += 0.1
        bench.step()
    counters = bench.engine.counters
    assert counters.queued.cumulative()[-1] == counters.answered.cumulative()[-1] == 1
    assert counters.queued.sum_s == pytest.approx(0.1)
    assert counters.answered.sum_s == pytest.approx(0.3)


def test_a_request_whose_deadline_has_passed_is_counted(bench: Bench) -> None:
    bench.open()
    bench.ask(5, deadline_ms=100)
    bench.now += 1
    bench.step()
    assert bench.engine.counters.num_expired == 1


def test_a_refusal_is_counted_by_its_code(bench: Bench) -> None:
    bench.open(bundle_id="other")
    bench.open(bundle_id="other")
    bench.ask(0, session="unknown")
    assert dict(bench.engine.counters.refusals) == {"bundle_mismatch": 2, "unknown_session": 1}


def test_an_evicted_cache_is_counted_and_one_that_ends_with_its_session_is_not(
    bench: Bench,
) -> None:
    shape = bench.engine.pool.shape
    bench.start(kv_budget_bytes=64 * (shape.cache_bytes + 2 * shape.hidden_bytes), idle_after_s=0.0)
    for session in ("s1", "s2"):
        assert isinstance(bench.open(session)[0], Opened)
        bench.context(bench.upload(6), session=session)
        bench.ask(5, session=session)
        bench.token(session)
    assert bench.engine.session_store.num_evictions == 1
    bench.engine.dismiss()
    assert bench.engine.session_store.num_evictions == 1


# The endpoint.


@contextmanager
def monitored(worker: Worker, stall_s: float = WAIT_S) -> Iterator[str]:
    """Yield the URL of an endpoint of `worker`."""
    with HttpEndpoint(HOST, 0) as endpoint:
        endpoint.show(WorkerMonitor(worker, stall_s))
        yield endpoint.url


@pytest.fixture
def site(cloud_bundle: Callable[[int], Bundle]) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(stack, cloud_bundle(2))


def test_the_metrics_are_those_of_what_a_worker_did(site: Site, whole: TinyModel) -> None:
    device = site.device()
    device.ask("s1", whole, num_positions=6)
    with monitored(site.worker) as url:
        samples = scrape(url)
    pool = site.worker.engine.pool
    assert samples["fleet_worker_sessions"] == 1
    assert samples['fleet_worker_weights{kind="float32"}'] == 1
    assert samples["fleet_worker_positions_total"] >= 6
    assert samples['fleet_worker_answer_seconds_count{kind="verify"}'] == 1
    assert samples['fleet_worker_answer_seconds_bucket{kind="verify",le="+Inf"}'] == 1
    assert samples["fleet_worker_queue_seconds_count"] == 1
    assert samples["fleet_worker_kv_used_bytes"] == pool.used_bytes > 0
    assert samples["fleet_worker_kv_budget_bytes"] == pool.budget_bytes
    assert samples["fleet_worker_connected"] == 1
    assert samples["fleet_worker_kept_sessions"] == 0
    assert samples["process_resident_memory_bytes"] > 0


def test_kept_and_continued_sessions_are_in_the_metrics(site: Site, whole: TinyModel) -> None:
    device = site.device()
    for session, continues in (
        ("s1", UNSET),
        ("s2", Continuation(session="s1", branch=1, num_positions=5)),
    ):
        device.send(device.opening(session, continues))
        assert isinstance(device.next_answer(), Opened)
        device.upload_and_ask(session, whole)
        device.send(Close(session, keep=True))
    wait_until(lambda: site.worker.engine.num_in_use == 0, "both have ended", WAIT_S)
    with monitored(site.worker) as url:
        samples = scrape(url)
    assert samples["fleet_worker_sessions"] == samples["fleet_worker_kept_sessions"] == 1
    assert samples["fleet_worker_continued_sessions_total"] == 1
    assert samples["fleet_worker_reused_positions_total"] == 5


def test_a_request_that_could_be_answered_is_in_the_queue(
    bench: Bench, cloud_bundle: Callable[[int], Bundle]
) -> None:
    worker = Worker(
        InMemoryBroker().connect("worker-1"), cloud_bundle(2), WorkerConfig(num_threads=1)
    )
    bench.engine = worker.engine  # its thread has not been started: no step runs
    bench.open()
    bench.context(bench.upload(6))
    bench.ask(9)  # its context is not here: nothing that more workers could do
    bench.open("s2")
    bench.context(bench.upload(6), session="s2")
    bench.ask(5, session="s2")
    values = {s.name: s.value for family in WorkerMonitor(worker).collect() for s in family.samples}
    assert values["fleet_worker_sessions"] == 2
    assert values["fleet_worker_waiting_questions"] == 1
    assert values["fleet_worker_oldest_question_seconds"] > 0


def test_a_worker_is_ready_until_it_drains(site: Site, whole: TinyModel) -> None:
    site.device().ask("s1", whole)
    hurry = threading.Event()
    with monitored(site.worker) as url:
        assert get(f"{url}/readyz") == get(f"{url}/healthz") == (200, "ok\n")
        draining = threading.Thread(target=site.worker.drain, args=(hurry,))
        draining.start()
        wait_until(lambda: scrape(url)["fleet_worker_draining"] == 1, "it drains", WAIT_S)
        assert get(f"{url}/readyz") == (503, "the worker is draining\n")
        assert get(f"{url}/healthz") == (200, "ok\n")
        hurry.set()
        draining.join(WAIT_S)


def test_a_worker_without_a_broker_is_alive_and_not_ready(site: Site) -> None:
    with monitored(site.worker) as url:
        site.link.drop()
        assert get(f"{url}/readyz") == (503, "the worker has no connection to the broker\n")
        assert get(f"{url}/healthz") == (200, "ok\n")
        site.link.restore()
        assert get(f"{url}/readyz") == (200, "ok\n")


def test_a_worker_that_is_stuck_in_a_step_is_unhealthy_until_it_goes_on(site: Site) -> None:
    go_on = threading.Event()
    turn = site.worker.engine.step

    def stuck() -> None:
        go_on.wait(WAIT_S)
        site.worker.engine.step = turn  # type: ignore[method-assign]

    with monitored(site.worker, stall_s=1.0) as url:
        site.worker.engine.step = stuck  # type: ignore[method-assign]
        wait_until(lambda: get(f"{url}/healthz")[0] == 503, "it is unhealthy", WAIT_S)
        assert "has been in one step" in get(f"{url}/healthz")[1]
        go_on.set()
        wait_until(lambda: get(f"{url}/healthz") == (200, "ok\n"), "it is healthy again", WAIT_S)


def test_a_worker_whose_thread_has_ended_is_unhealthy(
    cloud_bundle: Callable[[int], Bundle],
) -> None:
    with InMemoryBroker().connect("worker-1") as link:
        with Worker(link, cloud_bundle(2), WorkerConfig(num_threads=1)) as worker:
            pass
        with monitored(worker) as url:
            assert get(f"{url}/healthz") == (503, "the worker's thread has ended\n")


def test_a_process_that_still_starts_is_alive_and_not_ready() -> None:
    with HttpEndpoint(HOST, 0) as endpoint:
        assert get(f"{endpoint.url}/healthz") == (200, "ok\n")
        assert get(f"{endpoint.url}/readyz") == (503, "it is starting\n")
        assert get(f"{endpoint.url}/")[0] == 404


def test_a_port_that_is_taken_is_named() -> None:
    port = free_port()
    with (
        HttpEndpoint(HOST, port),
        pytest.raises(ConfigError, match=f"{HOST}:{port}.*--metrics-port"),
    ):
        HttpEndpoint(HOST, port)


def test_a_worker_process_tells_of_itself_and_leaves_after_its_drain_timeout(
    tmp_path: Path, cloud_bundle: Callable[[int], Bundle]
) -> None:
    with (
        running_site("embedded", tmp_path) as site,
        site.connect("s1") as server,
        site.connect("d1") as link,
    ):
        options = ("--metrics-port", "0", "--drain-timeout", "0")
        with RunningWorker(site, server, cloud_bundle(2), *options) as worker:
            url = worker.ready_line().split("metrics on ")[1].strip()
            assert get(f"{url}/readyz") == (200, "ok\n")
            opening = Open(
                session="a1",
                epoch=1,
                bundle_id=worker.bundle.manifest.bundle_id,
                protocol=PROTOCOL,
                sampling=Sampling(),
                max_positions=64,
                deadline_ms=60_000,
            )
            answers = Inbox()
            link.subscribe(topics.to_device("d1", "+"), answers)
            link.publish(topics.open_session("d1"), encode(opening), qos=1)
            assert isinstance(decode_to_device(answers.get()[1]), Opened)
            assert scrape(url)["fleet_worker_sessions"] == 1
            worker.process.send_signal(signal.SIGTERM)
            assert worker.end() == (0, "")


@pytest.mark.parametrize(("error", "num_lines"), [(ConnectionResetError, 0), (ValueError, 1)])
def test_a_client_that_resets_its_connection_adds_no_line_to_the_log(
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    error: type[Exception],
    num_lines: int,
) -> None:
    with HttpEndpoint(HOST, 0) as endpoint:
        try:
            raise error
        except error:
            endpoint._server.handle_error(None, (HOST, 1))
    assert len(caplog.records) == num_lines
    assert "Traceback" not in capfd.readouterr().err
