"""A session that uploads its prompt as token ids, message by message."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import pytest

from edge_agent.measurements import Measurements
from edge_agent.session.session_machine import SessionMachine
from fleet.protocol.codec import unpack_tokens
from fleet.protocol.messages import Continuation, Gap, Opened, Verify
from tests.edge_agent.session.test_session_machine import HIDDEN, OPENED, REFUSED, Driver, rows

PROMPT = tuple(range(100, 150))
ACCEPTS: Opened = msgspec.structs.replace(OPENED, dtypes=("float16", "int8", "tokens"))
CONTINUES = Continuation(session="s0", branch=0, num_positions=20)


def driver(prompt_ids: Iterable[int] = PROMPT, continues: Continuation | None = None) -> Driver:
    """A machine that has sent its `Open`."""
    made = Driver()
    opening = made.machine._opening
    if continues:
        opening = msgspec.structs.replace(opening, continues=continues)
    made.machine = SessionMachine(
        opening, "d1", HIDDEN, made.measurements, lambda: 1.0, prompt_ids=tuple(prompt_ids)
    )
    made.observe()
    assert len(made.sent()) == 1
    return made


def chunks(bodies: Iterable[object]) -> list[tuple[str, int, int]]:
    """Return dtype, start and stop of the chunks, and check their ids."""
    found = []
    for body in bodies:
        chunk = getattr(body, "chunk", None)
        if chunk is None:
            continue
        stop = chunk.start + chunk.count
        if chunk.dtype == "tokens":
            assert unpack_tokens(chunk, 1000) == list(PROMPT[chunk.start : stop])
        found.append((chunk.dtype, chunk.start, stop))
    return found


def test_the_ids_go_up_before_the_device_has_run_the_prompt_and_hidden_states_after_them() -> None:
    device = driver()
    device.receive(ACCEPTS)
    assert chunks(device.bodies()) == [("tokens", 0, 50)]
    device.machine.offer(rows(0, 50))
    assert device.bodies() == []
    device.machine.offer(rows(50, 5))
    assert chunks(device.bodies()) == [("float16", 50, 55)]


def test_a_worker_that_does_not_accept_ids_gets_hidden_states() -> None:
    device = driver()
    device.receive(OPENED)
    assert device.bodies() == []
    device.machine.offer(rows(0, 50))
    assert chunks(device.bodies()) == [("float16", 0, 50)]


@pytest.mark.parametrize(
    ("second", "expected"),
    [(ACCEPTS, ("tokens", 0, 50)), (OPENED, ("float16", 0, 52))],
    ids=["accepts ids", "hidden states only"],
)
def test_another_worker_gets_the_prompt_in_the_way_that_it_accepts(
    second: Opened, expected: tuple[str, int, int]
) -> None:
    device = driver()
    device.receive(ACCEPTS)
    device.sent()
    device.machine.offer(rows(0, 52))
    device.receive(msgspec.structs.replace(REFUSED, code="unknown_session", retry_after_ms=0))
    device.wait()
    device.sent()
    device.receive(msgspec.structs.replace(second, worker="w2"))
    assert chunks(device.bodies())[0] == expected


def test_lost_ids_are_sent_again_from_the_first_missing_one() -> None:
    device = driver()
    device.receive(ACCEPTS)
    device.sent()
    device.receive(Gap("s1", 0, 20))
    assert chunks(device.bodies()) == [("tokens", 20, 50)]


def test_a_long_prompt_goes_in_chunks_of_the_workers_size_without_receipts() -> None:
    device = driver(range(128))
    device.receive(msgspec.structs.replace(ACCEPTS, max_chunk_bytes=1024, window_bytes=1024))
    sizes = [stop - start for _, start, stop in chunks_of_any(device.bodies())]
    assert sizes == [128]


def test_ids_fill_at_most_half_a_window_and_the_rest_are_hidden_states() -> None:
    device = driver(range(150))
    device.receive(ACCEPTS)
    device.machine.offer(rows(0, 150))
    assert chunks_of_any(device.bodies()) == [("tokens", 0, 128), ("float16", 128, 150)]


def chunks_of_any(bodies: Iterable[object]) -> list[tuple[str, int, int]]:
    found = [getattr(body, "chunk", None) for body in bodies]
    return [(chunk.dtype, chunk.start, chunk.start + chunk.count) for chunk in found if chunk]


@pytest.mark.parametrize(
    ("received", "expected"), [(20, ("float16", 20, 50)), (0, ("tokens", 0, 50))]
)
def test_a_continued_session_uploads_what_is_new_as_hidden_states(
    received: int, expected: tuple[str, int, int]
) -> None:
    device = driver(continues=CONTINUES)
    device.receive(msgspec.structs.replace(ACCEPTS, received=received))
    device.machine.offer(rows(0, 50))
    assert chunks(device.bodies()) == [expected]


def test_a_prompt_is_kept_with_the_positions_that_were_sent() -> None:
    device = driver()
    device.receive(ACCEPTS)
    device.sent()
    end = device.machine.keep()
    assert end is not None
    assert end.num_positions == 50


@pytest.mark.parametrize("opened", [ACCEPTS, OPENED])
def test_the_wait_for_the_first_verdict_is_measured_by_the_way_of_the_prompt(
    opened: Opened,
) -> None:
    prompt = tuple(range(80))
    waits: list[tuple[int, float, bool]] = []

    class Recorder(Measurements):
        def prompt_judged(self, num_positions: int, seconds: float, *, has_ids: bool) -> None:
            waits.append((num_positions, seconds, has_ids))

    device = driver(prompt)
    device.machine._measurements = Recorder()
    device.receive(opened)
    device.machine.offer(rows(0, 60))
    device.sent()
    device.ask(59, (7,))
    (request,) = [body for body in device.bodies() if isinstance(body, Verify)]
    device.now += 0.5
    for _ in range(2):
        device.receive(device.response(request, 1))
    assert waits == [(60, 0.5, opened is ACCEPTS)]


def test_a_refusal_before_any_worker_accepts_leaves_the_prompt_whole() -> None:
    device = driver()
    device.receive(REFUSED)
    device.wait()
    device.sent()
    device.receive(ACCEPTS)
    assert chunks(device.bodies()) == [("tokens", 0, 50)]
