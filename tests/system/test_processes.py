"""The commands as a person runs them: separate processes, the real broker, TLS, SQLite."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.whole_model import WholeModel
from fleet.bundles.manifest import Bundle
from fleet.protocol.access import Role
from fleet.server.child_process import Child
from fleet.server.console_address import console_url
from fleet.server.home import FleetHome
from tests.brokers import free_port, wait_until

TIMEOUT_S = 180
COLORS = {"NO_COLOR": "1"}
PICTURE_WIDTH = 1238.0  # of 100 columns


def fleet(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fleet.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env=os.environ | COLORS,
    )


def fleet_json(*arguments: str) -> Any:
    result = fleet(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@contextmanager
def started(title: str, *arguments: str) -> Iterator[Child]:
    child = Child(title, arguments)
    try:
        child.wait_ready()
        yield child
    finally:
        child.stop()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Iterator[Path]:
    """A running fleet with one device, `gateway`."""
    folder = tmp_path_factory.mktemp("fleet")
    where = str(folder / "state")
    ports = ("--port", str(free_port()), "--service-port", str(free_port()))
    console = ("--console", "127.0.0.1:0")
    with ExitStack() as stack:
        bundle = str(tiny_bundle.folder)
        stack.enter_context(
            started(
                "fleet up", "fleet.cli", "up", "--home", where, *ports, *console, "--bundle", bundle
            )
        )
        assert (
            fleet(
                "enroll", "gateway", "--group", "lab", "--home", where, "--out", str(folder / "gw")
            ).returncode
            == 0
        )
        stack.enter_context(
            started("gateway", "edge_agent", "run", str(folder / "gw"), "--threads", "1")
        )
        wait_until(lambda: fleet_json("devices", "--home", where)[0]["online"], "it is online")
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
    assert out["bundle_id"] == tiny_bundle.manifest.bundle_id
    assert [r["token_ids"] for r in out["results"]] == [
        whole.generate(text, 16) for text in prompts
    ]
    (row,) = out["stats"]
    tokens = sum(len(r["token_ids"]) for r in out["results"])
    assert set(row) >= {
        "device",
        "generations",
        "tokens",
        "sources",
        "offload_rate",
        "bytes_up",
        "bytes_down",
    }
    assert (row["generations"], row["tokens"], row["sources"]) == (3, tokens, {"cloud": tokens})
    assert row["bytes_up"] == sum(r["bytes_up"] for r in out["results"])


def test_the_demo_is_plain_text_in_a_pipe_and_its_picture_an_svg_of_fixed_width(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    path = tmp_path / "demo.svg"
    bundle = ("--bundle", str(tiny_bundle.folder))
    prompt = ("--prompt", "hello", "--max-new-tokens", "40")
    result = fleet("demo", *bundle, *prompt, "--picture", str(path))
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
    assert result.stdout.startswith("starting the broker")  # before anything that takes time
    assert "what the registry counted" in result.stdout
    svg = path.read_text()
    text = " ".join(svg.replace("&#160;", " ").split())
    assert "fleet demo" in text
    assert "&gt; hello" in text
    assert "what the registry counted" in text
    assert 'class="fleet-demo-matrix"' in svg
    assert "the device" not in text
    width = float(svg.split('viewBox="0 0 ')[1].split()[0])
    assert width == PICTURE_WIDTH


def test_a_prompt_needs_no_database(home: Path) -> None:
    program = "import sys; sys.modules['sqlalchemy'] = None; from fleet.cli import main; main()"
    arguments = ("prompt", "gateway", "hello", "--max-new-tokens", "3", "--home", str(home))
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    out = json.loads(result.stdout)
    assert set(out) == {"bundle_id", "results"}
    assert len(out["results"][0]["token_ids"]) == 3


def test_a_prompt_to_an_unknown_device_says_how_to_enrol_it(home: Path) -> None:
    result = fleet("prompt", "ghost", "hello", "--home", str(home))
    assert result.returncode == 1
    assert "unknown device 'ghost'" in result.stderr
    assert "fleet enroll ghost" in result.stderr


def test_an_operator_prompts_and_sees_the_counts(home: Path) -> None:
    where = ("--home", str(home))
    before = fleet_json("stats", "gateway", *where)
    out = fleet_json(
        "prompt", "gateway", "hello", "--threshold", "1", "--max-new-tokens", "5", "--trace", *where
    )
    (result,) = out["results"]
    events = [event for trace in result.pop("trace") for event in trace["events"]]
    assert sum(each["kind"] == "verdict" for each in events) == result["round_trips"]
    assert set(result["sources"]) == {"cloud"}
    assert set(result) == {
        "prompt",
        "text",
        "token_ids",
        "finish_reason",
        "sources",
        "offload_rate",
        "bytes_up",
        "bytes_down",
        "prompt_tokens",
        "reused_tokens",
        "ttft_ms",
        "tpot_ms",
        "round_trips",
        "drafted",
        "switches",
        "seed",
        "sampling",
    }

    counted = before[0]["tokens"] + len(result["token_ids"])
    wait_until(
        lambda: fleet_json("stats", "gateway", *where)[0]["tokens"] == counted, "it is counted"
    )
    sessions = fleet_json("sessions", *where)
    assert sessions[0]["device"] == "gateway"
    assert fleet_json("stats", "gateway", "--since", "2000-01-01", *where)[0]["tokens"] == counted


def test_a_prompt_through_the_server_prints_what_one_over_the_broker_prints(home: Path) -> None:
    fleet("operator", "add", "grace", "--role", "operator", "--home", str(home))
    key = fleet_json("operator", "key", "create", "grace", "--home", str(home))["key"]
    words = ("prompt", "gateway", "hello", "--threshold", "1", "--max-new-tokens", "5")
    here = fleet(*words, "--home", str(home))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEET_SERVER", str(console_url(home)))
        patch.setenv("FLEET_KEY", key)
        there = fleet(*words)
        (result,) = fleet_json(*words, "--trace")["results"]
        lost = fleet("prompt", "ghost", "hello")
    assert there.returncode == 0, there.stderr
    assert without_numbers(there.stdout) == without_numbers(here.stdout)
    verdicts = [e for trace in result["trace"] for e in trace["events"] if e["kind"] == "verdict"]
    assert len(verdicts) == result["round_trips"]
    assert "unknown device 'ghost'" in lost.stderr


def without_numbers(printed: str) -> str:
    """Return what was printed without its times, which differ between two answers."""
    return re.sub(r"[\d.,]+", "", printed)


def test_a_conversation_in_the_terminal(home: Path) -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "fleet.cli",
            "chat",
            "gateway",
            "--max-new-tokens",
            "4",
            "--home",
            str(home),
        ],
        input="hello\nand again\n\n",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env=os.environ | COLORS,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("tokens:") == 2


def test_a_mode_that_a_device_does_not_know_never_reaches_it(home: Path) -> None:
    result = fleet("prompt", "gateway", "hello", "--mode", "psychic", "--home", str(home))
    assert result.returncode == 1
    assert "psychic" in result.stderr


def test_the_server_fires_an_alarm_that_an_operator_acknowledges(home: Path) -> None:
    where = ("--home", str(home))
    fleet_json("alarms", "set", "certificate", "--all", "--for", "0s", *where)
    with FleetHome.load(home).registry() as registry:
        ends_soon = time.time() + 3600.0
        registry.identities.add_identity(
            "old-app", Role.APP, fingerprint="0" * 64, not_after=ends_soon
        )
        wait_until(lambda: bool(fleet_json("alarms", "list", *where)), "the alarm")
        (alarm,) = fleet_json("alarms", "list", *where)
        assert (alarm["kind"], alarm["subject"]) == ("certificate", "old-app")
        (row,) = fleet_json("alarms", "ack", str(alarm["id"]), *where)
        events = fleet_json("alarms", "history", *where)
        assert [(event["state"], event["by"]) for event in events] == [
            ("acknowledged", row["acknowledged_by"]),
            ("firing", "server"),
        ]
        registry.identities.revoke("old-app")
        registry.identities.delete("old-app")
