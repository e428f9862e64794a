"""`fleet plan`: a table with advice, or JSON, and one clear line for invalid input."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import typer

from benchmarks.paper.fit import fit_cost_model
from cloud_broker_worker.worker.cli import app as worker_app
from edge_agent.cli import app as edge_agent
from fleet.bundles.manifest import Bundle
from fleet.cli import app
from fleet.errors import ConfigError
from fleet.planning.cost_model import write_fits
from fleet.planning.machine_speeds import MachineSpeeds
from tests.benchmarks.paper_rows import RUN, linear_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A fit to rows of a known model."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    write_fits([fit_cost_model(linear_rows(samples=2), RUN)[0]], path)
    return str(path)


def plan(*arguments: str) -> None:
    app(args=["plan", *arguments], standalone_mode=False)


def test_json_holds_expectations_advice_and_crossings(
    data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    link = ("--rtt", "20", "--bandwidth", "31", "--edge-step", "19", "--cloud-step", "37")
    text = ("--prompt-tokens", "50", "--tokens", "100", "--min-agreement", "0.99")
    plan(*link, *text, "--data", data, "--json")
    shown = json.loads(capsys.readouterr().out)
    assert set(shown) == {
        "load",
        "best",
        "advice",
        "expectations",
        "by_rtt_ms",
        "by_mbit_s",
        "fits",
    }
    assert shown["load"] == {
        "rtt_ms": 20.0,
        "mbit_s": 31.0,
        "edge_step_ms": 19.0,
        "cloud_step_ms": 37.0,
        "prompt_tokens": 50,
        "tokens": 100,
        "min_agreement": 0.99,
        "device_memory_mb": None,
    }
    assert shown["best"] == shown["expectations"][0]["name"]
    assert set(shown["expectations"][0]) == {
        "name", "mode", "threshold", "exits", "split_layer",
        "ttft_ms", "token_ms", "total_ms", "edge_ms", "cloud_ms",
        "num_bytes", "messages", "round_trips", "offload_rate", "agreement", "agrees", "basis",
    }  # fmt: skip
    assert all(
        set(one) == {"at", "below", "above"} for one in (*shown["by_rtt_ms"], *shown["by_mbit_s"])
    )


def test_the_table_is_followed_by_advice_and_its_source(
    data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan("--rtt", "20", "--bandwidth", "31", "--data", data)
    words = " ".join(capsys.readouterr().out.split())
    assert "is the fastest: " in words
    assert "verified" in words
    assert "exits 24 of tiny, measured on a test's with steps of" in words


def test_two_machines_measure_themselves_and_every_split_is_compared(
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("edge_agent.engine.speed.ROUNDS", 1)
    monkeypatch.setattr("cloud_broker_worker.worker.speed.ROUNDS", 1)
    monkeypatch.setattr("os.getloadavg", lambda: (3.0, 0.0, 0.0))
    machine = str(tmp_path / "device.json")
    worker = str(tmp_path / "worker.json")
    bundle = str(tiny_bundle.folder)
    measure = ("measure", bundle, "--threads", "1", "--out")
    edge_agent(args=[*measure, machine], standalone_mode=False)
    worker_app(args=[*measure, worker], standalone_mode=False)
    output = capsys.readouterr()
    assert output.err.count("the machine is busy (load 3.0): times will be too long") == 2
    assert output.err.count("round 1 of 1") == 2
    assert "for 'fleet plan --machine'" in output.out
    link = ("--rtt", "20", "--bandwidth", "31", "--bundle", bundle)
    plan(*link, "--machine", machine, "--worker", worker, "--json")
    shown = json.loads(capsys.readouterr().out)
    assert {(one["name"], one["split_layer"]) for one in shown["expectations"]} == {
        ("standalone", 2), ("verified", 2), ("cloud_only", 2), ("on_device", 4),
    }  # fmt: skip
    assert shown["best"] == "on_device"  # a round trip takes longer than this model
    plan(*link, "--machine", machine, "--worker", worker, "--device-memory", "100")
    words = " ".join(capsys.readouterr().out.split())
    assert "≤ holds if no draft is accepted" in words
    assert "a split is the wrong choice here" in words
    with pytest.raises(ConfigError, match="no worker was measured with tiny"):
        plan(*link, "--machine", machine)


@pytest.mark.parametrize("command", [edge_agent, worker_app])
def test_speeds_are_printed_as_json(
    command: typer.Typer,
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("edge_agent.engine.speed.ROUNDS", 1)
    monkeypatch.setattr("cloud_broker_worker.worker.speed.ROUNDS", 1)
    monkeypatch.chdir(tmp_path)
    command(args=["measure", str(tiny_bundle.folder), "--json"], standalone_mode=False)
    speeds = msgspec.json.decode(capsys.readouterr().out, type=MachineSpeeds)
    assert speeds.model == tiny_bundle.manifest.model.name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rtt", "20", "--bandwidth", "31", "--bundle", "/no"), "need the device's speeds"),
        (("--rtt", "20", "--bandwidth", "0"), "mbit_s 0.0: expected a number from 0.000001"),
        (
            ("--rtt", "20", "--bandwidth", "31", "--min-agreement", "95"),
            "agreement 95.0: expected a number from 0",
        ),
        (
            ("--rtt", "20", "--bandwidth", "31", "--data", "/no/plan.json"),
            "cannot read /no/plan.json",
        ),
    ],
)
def test_invalid_input_is_refused(data: str, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan("--data", data, *arguments)
