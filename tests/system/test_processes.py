"""The commands as a person runs them: separate processes, the real broker, TLS, SQLite."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from benchmarks.whole_model import WholeModel
from fleet.cli.processes import Child
from fleet.cli.serve import free_port
from fleet.manifest import Bundle

TIMEOUT_S = 180
COLORS = {"NO_COLOR": "1"}


def fleet(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fleet.cli", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        env=os.environ | COLORS,
    )  # fmt: skip


def fleet_json(*arguments: str) -> object:
    result = fleet(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def wait_for(what: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.1)


@contextmanager
def started(title: str, *arguments: str) -> Iterator[Child]:
    child = Child(title, arguments)
    try:
        child.wait_ready()
        yield child
    finally:
        child.stop()


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Iterator[Path]:
    """A running fleet with one device, `gateway`."""
    folder = tmp_path_factory.mktemp("fleet")
    where = str(folder / "state")
    port = str(free_port("127.0.0.1"))
    with ExitStack() as stack:
        bundle = str(tiny_bundle.folder)
        stack.enter_context(
            started("fleet up", "fleet.cli", "up", "--state", where, "--port", port, "--bundle", bundle)
        )
        assert (
            fleet("enroll", "gateway", "--group", "lab", "--state", where, "--out", str(folder / "gw")).returncode == 0
        )
        stack.enter_context(started("gateway", "edge_agent", "run", str(folder / "gw"), "--threads", "1"))
        rows = lambda: fleet_json("devices", "--state", where)  # noqa: E731
        wait_for(lambda: bool(rows()[0]["online"]))  # type: ignore[index]
        yield Path(where)


def test_the_demo_equals_the_whole_model_and_the_registry_counts_what_was_printed(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    prompts = ["How warm is it?", "Tell me about rivers.", "Count to ten."]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": text, "input": ""}) for text in prompts))
    whole = WholeModel(tiny_bundle, num_threads=1)
    out = fleet_json(
        "demo",
        "--bundle",
        str(tiny_bundle.folder),
        "--prompts",
        str(path),
        "--threshold",
        "1.0",
        "--max-new-tokens",
        "16",
    )
    assert isinstance(out, dict)
    assert out["bundle_id"] == tiny_bundle.manifest.bundle_id
    assert [r["token_ids"] for r in out["results"]] == [whole.generate(text, 16) for text in prompts]
    (row,) = out["stats"]
    tokens = sum(len(r["token_ids"]) for r in out["results"])
    assert set(row) == {"device", "generations", "tokens", "sources", "offload_rate", "bytes_up", "bytes_down"}
    assert (row["generations"], row["tokens"], row["sources"]) == (3, tokens, {"cloud": tokens})
    assert row["bytes_up"] == sum(r["bytes_up"] for r in out["results"])


def test_the_demo_is_plain_text_in_a_pipe(tiny_bundle: Bundle) -> None:
    result = fleet("demo", "--bundle", str(tiny_bundle.folder), "--prompt", "hello", "--max-new-tokens", "4")
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
    assert "what the registry counted" in result.stdout


def test_an_operator_prompts_and_sees_the_counts(state: Path) -> None:
    where = ("--state", str(state))
    before = fleet_json("stats", "gateway", *where)
    out = fleet_json("prompt", "gateway", "hello", "--threshold", "1", "--max-new-tokens", "5", *where)
    assert isinstance(out, dict)
    assert isinstance(before, list)
    (result,) = out["results"]
    assert set(result["sources"]) == {"cloud"}
    assert set(result) == {
        "prompt", "text", "token_ids", "finish_reason", "sources", "offload_rate", "bytes_up", "bytes_down", "ttft_ms",
        "tpot_ms",
    }  # fmt: skip

    def counted() -> bool:
        (row,) = fleet_json("stats", "gateway", *where)  # type: ignore[misc]
        return bool(row["tokens"] == before[0]["tokens"] + len(result["token_ids"]))

    wait_for(counted)
    sessions = fleet_json("sessions", *where)
    assert isinstance(sessions, list)
    assert sessions[0]["device"] == "gateway"
    assert fleet_json("stats", "gateway", "--since", "2999-01-01", *where)[0]["tokens"] == 0  # type: ignore[index]


def test_a_conversation_in_the_terminal(state: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fleet.cli", "chat", "gateway", "--max-new-tokens", "4", "--state", str(state)],
        input="hello\nand again\n\n", capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        env=os.environ | COLORS,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("tokens:") == 2


def test_a_mode_that_a_device_does_not_know_never_reaches_it(state: Path) -> None:
    result = fleet("prompt", "gateway", "hello", "--mode", "psychic", "--state", str(state))
    assert result.returncode == 1
    assert "psychic" in result.stderr


def test_a_worker_killed_with_9_and_started_again(state: Path, tiny_bundle: Bundle) -> None:
    where = ("--state", str(state))
    other = state.parent / "worker-2"
    assert fleet("enroll", "worker-2", "--role", "worker", "--out", str(other), *where).returncode == 0
    # The fleet's own worker stays; a device of another bundle can only be served by this one.
    with ExitStack() as stack:
        worker = stack.enter_context(started("worker-2", "cloud_broker_worker", "run", str(other)))
        worker.process.send_signal(signal.SIGKILL)
        worker.process.wait(TIMEOUT_S)
    ask = ("prompt", "gateway", "hello", "--threshold", "1", "--max-new-tokens", "5", *where)
    out = fleet_json(*ask)
    assert isinstance(out, dict)
    assert set(out["results"][0]["sources"]) <= {"cloud", "fallback"}
    with started("worker-2", "cloud_broker_worker", "run", str(other)):
        again = fleet_json(*ask)
        assert isinstance(again, dict)
        assert set(again["results"][0]["sources"]) == {"cloud"}
