"""An engine in a separate process answers, fails and ends with clear messages."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest

from benchmarks import engines
from benchmarks.edge import driver
from benchmarks.engines import EngineProcess
from benchmarks.graphs import EdgeGraphs
from fleet.errors import FleetError

PROMPT = list(range(100, 120))
READY = 'print(\'{"ready": "1"}\', flush=True); '


@pytest.fixture(scope="module")
def engine(tiny_graphs: EdgeGraphs) -> Iterator[EngineProcess]:
    with EngineProcess("ours", driver(tiny_graphs.bundle(4, "fp32"), 1)) as running:
        yield running


def program(code: str) -> list[str]:
    return [sys.executable, "-c", READY + code]


def test_our_engine_reports_its_version_and_speed(engine: EngineProcess) -> None:
    assert engine.version.startswith("onnxruntime ")
    assert engine.ask("speed", prompt=PROMPT, new_tokens=8)["tokens_per_s"] > 0
    assert engine.ask("step_ms", prompt=PROMPT, steps=8)["ms"] > 0
    assert set(engine.ask("growth", prompt=PROMPT, answers=2, new_tokens=8)) == {"own", "mapped"}


def test_the_candidates_along_an_answer_begin_with_the_best_tokens(engine: EngineProcess) -> None:
    text = {"prompt": PROMPT, "answer": PROMPT[:6]}
    candidates = engine.ask("candidates", **text)["candidates"]
    assert [row[0][0] for row in candidates] == engine.ask("best", **text)["best"]
    for row in candidates:
        logprobs = [logprob for _, logprob in row]
        assert len(row) == 3
        assert logprobs == sorted(logprobs, reverse=True)


def test_the_best_token_of_each_position_does_not_depend_on_what_follows(
    engine: EngineProcess,
) -> None:
    whole = engine.ask("best", prompt=PROMPT, answer=[7, 9, 300, 5])["best"]
    assert engine.ask("best", prompt=[*PROMPT, 7, 9], answer=[300])["best"] == whole[2:3]
    assert engine.ask("best", prompt=PROMPT, answer=[7, 9])["best"] == whole[:2]


def test_a_request_that_fails_leaves_the_engine_alive(engine: EngineProcess) -> None:
    with pytest.raises(FleetError, match=r"ours failed: AttributeError: .*nonsense"):
        engine.ask("nonsense")
    assert len(engine.ask("best", prompt=PROMPT, answer=[7])["best"]) == 1


def test_an_engine_that_was_killed_is_reported_with_its_status(tiny_graphs: EdgeGraphs) -> None:
    with EngineProcess("ours", driver(tiny_graphs.bundle(4, "fp32"), 1)) as engine:
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(FleetError, match="ours ended with status -9"):
            engine.ask("speed", prompt=PROMPT, new_tokens=8)


def test_an_engine_that_ends_is_reported_with_its_last_words() -> None:
    with (
        EngineProcess("peer", program("import sys; input(); sys.exit('no model')")) as engine,
        pytest.raises(FleetError, match="peer ended with status 1: no model"),
    ):
        engine.ask("speed", prompt=PROMPT, new_tokens=8)


def test_an_engine_that_does_not_load_is_reported_with_its_last_words(
    tmp_path: os.PathLike[str],
) -> None:
    with pytest.raises(FleetError, match=r"ours ended with status 1: .*no usable bundle in"):
        EngineProcess(
            "ours",
            [
                sys.executable,
                "-m",
                "benchmarks.drivers.ours",
                "--model",
                str(tmp_path),
                "--threads",
                "1",
            ],
        )


def test_an_engine_that_does_not_answer_meets_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ANSWER_TIMEOUT_S", 0.1)
    with (
        EngineProcess("peer", program("input(); input()")) as engine,
        pytest.raises(FleetError, match=r"peer gave no answer within 0\.1 s"),
    ):
        engine.ask("speed", prompt=PROMPT, new_tokens=8)


def test_an_engine_streams_and_accepts_the_next_request() -> None:
    stream = (
        "import json, sys\n"
        "from benchmarks.drivers.protocol import serve_lines\n"
        "class Counter:\n"
        "    version = '1'\n"
        "    def count(self, to): yield from ({'n': i} for i in range(to))\n"
        "serve_lines(Counter)\n"
    )
    with EngineProcess("counter", [sys.executable, "-c", stream], wait=False) as engine:
        engine.wait_ready()
        assert [line["n"] for line in engine.stream("count", to=3)] == [0, 1, 2]
        assert list(engine.stream("count", to=0)) == []
        assert engine.status is None
