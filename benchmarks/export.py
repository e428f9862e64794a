"""The export of a large model, and the memory of its halves while they answer together.

    fleet bench export --shape 0.5b|1.1b|3b|7b [--exits 5,11] [--quantization balanced] [--seed 0]
        [--keep DIR] [--json]

The model has random weights, which are made one at a time, so the bundle is all that is on disk.
The export runs in a process of its own. A device, a worker (`--weights bfloat16`) and a broker then
answer one prompt of 16 tokens with 16 tokens, in `collaborative`, in `verified` and, for the
device's own time, in `standalone`. Figures in MB are of 10^6 bytes:

- ``peak_rss_mb``: the peak of the export's resident memory (VmHWM);
- ``seconds``, ``cpu_seconds``: the export's duration, and its CPU time on all cores;
- ``edge_mb``, ``cloud_mb``: the bytes of the bundle's halves;
- ``device_rss_mb``, ``worker_rss_mb``: the most resident memory (VmRSS) at any token of the answers
  in `collaborative` and `verified`; ``device_peak_rss_mb`` and ``worker_peak_rss_mb`` are the peaks
  since the processes were started (VmHWM);
- ``device_step_ms``: the time of a token in `standalone`; no exit emits a token before the last;
- ``worker_step_ms``: the mean time from the arrival of a verify request to its response in
  `collaborative`. The first request includes the prompt, others may include a draft.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Final, NamedTuple, get_args

import msgspec
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from benchmarks.drivers.export import export_config
from benchmarks.edge import machine
from benchmarks.processes import memory_mb
from benchmarks.random_model import SHAPES
from edge_agent.config import CONFIG_FILE, AgentConfig
from fleet.bundles.manifest import read_manifest
from fleet.errors import ConfigError, FleetError
from fleet.protocol.access import Role
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest, Reply, Usage
from fleet.server.child_process import child
from fleet.server.home import FleetConfig, FleetHome
from fleet.server.supervisor import fleet_processes
from fleet.server.worker_settings import WorkerSettings
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from fleet.utils.cli_runtime import check_free, run_command
from fleet.utils.console import new_console
from fleet.utils.host_address import free_port
from fleet.utils.path_options import path_option
from onnx_export.__main__ import parse_numbers
from onnx_export.architecture import check_exits
from onnx_export.config import ExportConfig, Quantization, format_layers

DEVICE: Final = "edge-1"
HOST: Final = "127.0.0.1"
PROMPT: Final = "Sixteen letters."  # as many tokens
NUM_TOKENS: Final = 16
READY_TIMEOUT_S: Final = 600.0
SCRAPE_TIMEOUT_S: Final = 60.0
DEADLINE_MS: Final = 600_000
DEVICE_CONFIG: Final = AgentConfig(
    assist_deadline_ms=DEADLINE_MS,
    answer_deadline_ms=DEADLINE_MS,
    max_draft=1,
    reuse_share=0.0,  # the same prompt is asked again
)
ANSWERED: Final = "fleet_worker_answer_seconds"

Progress = Callable[[str], None]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class VerifyTimes(NamedTuple):
    """The number of a worker's responses so far, and the sum of their times in s."""

    num_responses: float
    sum_s: float


@dataclass(frozen=True, kw_only=True)
class RunningHalves:
    """A device and a worker that answer prompts."""

    client: PromptClient
    device_pid: int
    worker_pid: int
    verify_times: Callable[[], VerifyTimes]


def export_in_child(config: ExportConfig, shape: str, seed: int) -> dict[str, float]:
    """Export a random model in a process of its own; return its time and memory."""
    command = [sys.executable, "-m", "benchmarks.drivers.export"]
    command += ["--shape", shape, "--seed", str(seed), "--exits", format_layers(config.exits)]
    command += ["--quantization", config.quantization, "--out", str(config.out)]
    command += ["--graphs", str(config.graph_cache)]
    start = time.monotonic()
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise FleetError(f"the export ended with exit status {result.returncode}; see above")
    figures: dict[str, float] = json.loads(result.stdout)
    return {"seconds": time.monotonic() - start, **figures}


def half_sizes(bundle: Path) -> dict[str, float]:
    """Return the bytes of a bundle's halves, in MB."""
    files = read_manifest(bundle).files
    return {
        f"{half}_mb": sum(file.num_bytes for file in files if file.path.startswith(f"{half}/"))
        / 1e6
        for half in ("edge", "cloud")
    }


@contextmanager
def running_halves(bundle: Path, folder: Path) -> Iterator[RunningHalves]:
    """Run a broker, a worker and a device, ready when the block begins.

    The device waits for the worker as long as it takes, and drafts one token ahead, so that a step
    of the worker is one of a few positions.
    """
    config = FleetConfig(host=HOST, port=free_port(HOST), bundle=str(bundle), service_port=0)
    home = FleetHome.create(folder, config)
    device = folder / "devices" / DEVICE
    home.enroll(DEVICE, Role.DEVICE, device)
    (device / CONFIG_FILE).write_bytes(msgspec.json.encode(DEVICE_CONFIG))
    identity = home.enroll("bench", Role.APP, folder / "apps" / "bench", allow=(DEVICE,))
    settings = WorkerSettings(weights="bfloat16")
    with (
        fleet_processes(home, metrics_port=0, settings=settings) as processes,
        child("the device", "edge_agent", "run", str(device)) as edge,
        MqttTransport.connect(identity) as transport,
    ):
        (worker,) = processes.workers
        url = worker.wait_ready(READY_TIMEOUT_S).rpartition(" ")[2]
        edge.wait_ready(READY_TIMEOUT_S)
        yield RunningHalves(
            client=PromptClient(transport),
            device_pid=edge.process.pid,
            worker_pid=worker.process.pid,
            verify_times=lambda: scrape_verify_times(url),
        )


def scrape_verify_times(url: str) -> VerifyTimes:
    """Return the times that a worker's metrics report."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=SCRAPE_TIMEOUT_S) as response:
        families = text_string_to_metric_families(response.read().decode())
    values = {sample.name: sample.value for family in families for sample in family.samples}
    return VerifyTimes(values[f"{ANSWERED}_count"], values[f"{ANSWERED}_sum"])


def measure_halves(halves: RunningHalves, progress: Progress) -> dict[str, float]:
    """Return the memory and the times of both halves while they answer.

    Raises:
        FleetError: the worker did not contribute to an answer that needs it.
    """
    device_mb = worker_mb = step_ms = 0.0
    before = halves.verify_times()
    for mode in (Mode.COLLABORATIVE, Mode.VERIFIED):
        for reply in ask(halves.client, mode, progress):
            device_mb = max(device_mb, memory_mb(halves.device_pid)["rss_mb"])
            worker_mb = max(worker_mb, memory_mb(halves.worker_pid)["rss_mb"])
            if reply.note:
                raise FleetError(f"the worker had no part in the answer in {mode}: {reply.note}")
        step_ms = step_ms or mean_ms(before, halves.verify_times())
    *_, last = ask(halves.client, Mode.STANDALONE, progress)
    return {
        "device_rss_mb": device_mb,
        "worker_rss_mb": worker_mb,
        "device_peak_rss_mb": memory_mb(halves.device_pid)["peak_rss_mb"],
        "worker_peak_rss_mb": memory_mb(halves.worker_pid)["peak_rss_mb"],
        "device_step_ms": usage_of(last).tpot_ms,
        "worker_step_ms": step_ms,
    }


def mean_ms(before: VerifyTimes, after: VerifyTimes) -> float:
    """Return the mean time of the worker's responses between two moments, in ms.

    Raises:
        FleetError: there were none.
    """
    if after.num_responses == before.num_responses:
        raise FleetError("the worker had no verify request; expected some for each answer")
    return 1e3 * (after.sum_s - before.sum_s) / (after.num_responses - before.num_responses)


def ask(client: PromptClient, mode: Mode, progress: Progress) -> Iterator[Reply]:
    """Yield the replies to the prompt."""
    progress(f"an answer of {NUM_TOKENS} tokens in {mode}")
    request = PromptRequest(prompt=PROMPT, max_new_tokens=NUM_TOKENS, mode=mode)
    yield from client.ask(DEVICE, request, DEADLINE_MS / 1e3)


def usage_of(last: Reply) -> Usage:
    """Return the counts in the last reply of an answer."""
    if last.usage is None:
        raise FleetError("the device ended its answer without counts; expected them at its end")
    return last.usage


def print_result(console: Console, result: dict[str, Any]) -> None:
    """Print the figures as a table, with each half's memory relative to its bytes."""
    title = (
        f"random weights in the shape {result['shape']}, exits {format_layers(result['exits'])}, "
        f"{result['quantization']}"
    )
    table = Table(title=title, title_justify="left")
    for header in ("", "export", "device", "worker"):
        table.add_column(header, justify="right" if header else "left")
    for row in table_rows(result):
        table.add_row(*row)
    console.print(table)


def table_rows(result: dict[str, Any]) -> Sequence[Sequence[str]]:
    """Return a label and the figures of export, device and worker for each row."""
    ratios = [
        f"{result[f'{program}_rss_mb'] / result[f'{half}_mb']:.2f}"
        for program, half in (("device", "edge"), ("worker", "cloud"))
    ]
    values = {key: f"{value:,.0f}" for key, value in result.items() if isinstance(value, float)}
    return (
        ("bytes of the half, MB", "", values["edge_mb"], values["cloud_mb"]),
        ("memory while answering, MB", "", values["device_rss_mb"], values["worker_rss_mb"]),
        ("relative to the bytes", "", *ratios),
        (
            "peak of the memory, MB",
            values["peak_rss_mb"],
            values["device_peak_rss_mb"],
            values["worker_peak_rss_mb"],
        ),
        ("a step, ms", "", values["device_step_ms"], values["worker_step_ms"]),
        ("duration, s", values["seconds"], "", ""),
        ("CPU time, s", values["cpu_seconds"], "", ""),
    )


@app.command()
def run(
    shape: Annotated[str, typer.Option(help=f"Shape of the model: {', '.join(SHAPES)}.")],
    exits: Annotated[
        str | None, typer.Option(help="Exits (default: at a quarter and half of the layers).")
    ] = None,
    quantization: Annotated[
        str, typer.Option(help=f"Quantization of the edge: {', '.join(get_args(Quantization))}.")
    ] = ExportConfig.quantization,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights.")] = 0,
    keep: Annotated[
        Path | None, path_option(help="Keep the bundle in this folder, on whose disk all is done.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure the export of a model with random weights, and its halves while they answer."""
    if shape not in SHAPES:
        raise ConfigError(f"unknown shape {shape!r}: expected one of {', '.join(SHAPES)}")
    layers = tuple(parse_numbers(exits, int, "--exits", "5,11")) if exits else SHAPES[shape].exits
    check_exits(layers, SHAPES[shape].num_layers)
    if keep:
        keep = keep.absolute()
        check_free(keep, "--keep")
        keep.parent.mkdir(parents=True, exist_ok=True)
    console = new_console(stderr=True)

    def progress(line: str) -> None:
        console.print(line, style="dim", highlight=False)

    with TemporaryDirectory(prefix="fleet-bench-", dir=keep and keep.parent) as folder:
        bundle = keep or Path(folder) / "bundle"
        graphs = Path(folder) / "graphs"
        config = export_config(shape, layers, quantization, bundle, graphs)  # type: ignore[arg-type]
        config.check()
        figures = export_in_child(config, shape, seed)
        shutil.rmtree(graphs, ignore_errors=True)  # without room there is none
        figures |= half_sizes(bundle)
        progress("starting a broker, a worker and a device")
        with running_halves(bundle, Path(folder) / "fleet") as halves:
            figures |= measure_halves(halves, progress)
    result = {"shape": shape, "exits": layers, "quantization": quantization, "seed": seed}
    result |= figures | {"machine": machine()}
    if as_json:
        print(json.dumps(result))
    else:
        print_result(new_console(), result)


if __name__ == "__main__":
    run_command("benchmarks.export", app)
