"""The arithmetic of docs/scaling.md follows from the measurements, and the page shows it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks.scaling import (
    BROKER_SOURCES,
    DATA,
    Inputs,
    answer_of,
    capacity_of,
    need,
    reports_per_s,
    tables,
)

PAGE = (Path(__file__).parents[2] / "docs/scaling.md").read_text()
INPUTS = msgspec.json.decode(DATA.read_bytes(), type=Inputs)


def test_the_page_shows_what_the_command_prints() -> None:
    assert tables(INPUTS, answers_per_hour=4.0, utilisation=0.6) in PAGE


def test_the_page_names_where_the_brokers_figures_are_from() -> None:
    assert [source for source in BROKER_SOURCES.values() if source not in PAGE] == []


def test_needs_grow_with_the_devices_and_with_what_they_are_asked() -> None:
    one = need(1000, INPUTS, 4.0, 0.6)
    ten = need(10_000, INPUTS, 4.0, 0.6)
    assert ten.messages_per_s == pytest.approx(10 * one.messages_per_s)
    assert need(1000, INPUTS, 40.0, 0.6).workers == ten.workers > one.workers
    assert need(10_000, INPUTS, 4.0, 0.3).workers >= 2 * ten.workers - 1


def test_a_device_that_asks_nothing_needs_a_connection_only() -> None:
    idle = need(10_000_000, INPUTS, 0.0, 1.0)
    assert (idle.workers, idle.broker_nodes, idle.messages_per_s) == (0, 5, 0)


def test_an_answer_is_the_mean_of_the_demos() -> None:
    result = {
        "token_ids": [1, 2],
        "round_trips": 1,
        "bytes_up": 10,
        "bytes_down": 4,
        "ttft_ms": 500.0,
        "tpot_ms": 250.0,
    }
    more = result | {"round_trips": 3, "bytes_up": 30}
    answer = answer_of({"results": [result, more], "stats": [{"prompt_tokens": 8, "tokens": 4}]})
    assert (answer.prompt_tokens, answer.tokens, answer.positions) == (4, 2, 6)
    assert (answer.round_trips, answer.bytes_up, answer.bytes_down, answer.seconds) == (2, 20, 4, 1)


def test_a_worker_is_measured_with_as_many_sessions_as_the_bench_had() -> None:
    sessions = {"4": {"tokens_per_s": 40.0}, "16": {"tokens_per_s": 80.0}}
    bench = {
        "sessions": sessions,
        "threads": 2,
        "bytes_per_position": {"cache": 9216, "hidden_states": 1152},
    }
    worker = capacity_of(bench)
    assert (worker.sessions, worker.positions_per_s, worker.bytes_per_position) == (
        16,
        80.0,
        10_368,
    )


def test_the_registry_is_measured_by_what_it_has_stored() -> None:
    assert reports_per_s() > 0
