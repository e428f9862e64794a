"""`fleet demo`: the whole system on this machine, as separate processes, with real TLS on loopback."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.text import Text

from fleet.bundles.manifest import Bundle
from fleet.cli.stats_views import print_stats
from fleet.cli.views import legend, print_reply, usage_line
from fleet.errors import ConfigError, RegistryError
from fleet.protocol.access import Role
from fleet.protocol.modes import exit_source
from fleet.protocol.prompt import PromptRequest, Reply
from fleet.protocol.report import Switch
from fleet.server.child_process import child
from fleet.server.home import FleetConfig, FleetHome
from fleet.server.supervisor import fleet_processes, free_port
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from fleet.utils.optional_imports import require

DEVICE: Final = "edge-1"
APP: Final = "demo"
HOST: Final = "127.0.0.1"
REGISTRY_TIMEOUT_S: Final = 15.0
PROMPTS: Final = (
    "What is the capital of France, and what is it known for?",
    "Write a short note that asks a neighbour to water the plants.",
    "Give three tips for saving energy at home.",
)


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of the demo, or of ``fleet prompt``."""

    prompt: str
    text: str
    token_ids: list[int]
    finish_reason: str
    sources: dict[str, int]
    offload_rate: float
    bytes_up: int
    bytes_down: int
    ttft_ms: float
    tpot_ms: float
    round_trips: int
    drafted: int
    switches: tuple[Switch, ...]


def follow(
    console: Console, client: PromptClient, device: str, prompt: PromptRequest, exits: list[str]
) -> Result:
    """Streams one answer to the console and gives it whole."""
    text = ""
    token_ids = []
    final = Reply(seq=0)
    for reply in client.ask(device, prompt):
        text = text + reply.text
        final = reply
        if reply.token_id is not None:
            token_ids.append(reply.token_id)
        print_reply(console, reply, exits)
    usage = final.usage
    if usage is None:
        raise ConfigError(
            f"device {device} ended its answer without counts; is it of another version?"
        )
    console.print()
    console.print(usage_line(usage, final.note))
    return Result(
        prompt=prompt.chat[-1].content,
        text=text,
        token_ids=token_ids,
        finish_reason=final.finish_reason or "",
        sources=usage.sources,
        offload_rate=usage.offload_rate,
        bytes_up=usage.bytes_up,
        bytes_down=usage.bytes_down,
        ttft_ms=usage.ttft_ms,
        tpot_ms=usage.tpot_ms,
        round_trips=usage.round_trips,
        drafted=usage.drafted,
        switches=usage.switches,
    )


@contextmanager
def running_fleet(
    bundle: Path, folder: Path, say: Console
) -> Iterator[tuple[FleetHome, MqttTransport]]:
    """Broker, registry, worker and one device, ready; and an app's connection."""
    require("edge", "onnxruntime", "tokenizers")
    config = FleetConfig(
        host=HOST, port=free_port(HOST), bundle=str(bundle), service_port=free_port(HOST)
    )
    state = FleetHome.create(folder, config)
    device = folder / "devices" / DEVICE
    state.enroll(DEVICE, Role.DEVICE, device)
    app = state.enroll(APP, Role.APP, folder / "apps" / APP, allow=(DEVICE,))
    with (
        fleet_processes(state) as (_, (worker,)),
        child("the device", "edge_agent", "run", str(device)) as edge,
        MqttTransport.connect(app) as transport,
    ):
        for process in (worker, edge):
            say.print(Text(process.wait_ready(), "dim"))
        yield state, transport


def run_demo(
    bundle: Path, requests: list[PromptRequest], console: Console, *, as_json: bool
) -> None:
    """Asks every prompt of one device, then shows the registry's counts.

    Raises:
        RegistryError: the registry's counts do not become those of the answers.
    """
    manifest = Bundle.load(bundle, ()).manifest
    exits = [exit_source(layer) for layer in manifest.exits]
    with (
        tempfile.TemporaryDirectory(prefix="fleet-demo-") as folder,
        running_fleet(bundle, Path(folder), console) as (
            state,
            transport,
        ),
    ):
        client = PromptClient(transport)
        console.print(legend(exits))
        results = []
        for request in requests:
            console.print()
            console.print(Text(f"> {request.chat[-1].content}", "bold"))
            results.append(follow(console, client, DEVICE, request, exits))
        stats = await_counts(state, results)
    console.print()
    if as_json:
        print(
            msgspec.json.encode(
                {"bundle_id": manifest.bundle_id, "results": results, "stats": stats}
            ).decode()
        )
    else:
        print_stats(console, stats, "what the registry counted")


def await_counts(state: FleetHome, results: list[Result]) -> list[Any]:
    """The registry's rows once they hold the answers' counts."""
    wanted: Counter[str] = Counter()
    for result in results:
        wanted.update(result.sources)
    deadline = time.monotonic() + REGISTRY_TIMEOUT_S
    with state.registry() as registry:
        while True:
            rows = list(registry.stats(DEVICE))
            counted = dict(rows[0].sources) if rows else {}
            if rows and rows[0].generations == len(results) and counted == wanted:
                return rows
            if time.monotonic() > deadline:
                raise RegistryError(
                    f"expected {dict(wanted)} of {len(results)} answers in the registry within "
                    f"{REGISTRY_TIMEOUT_S:g} s, got {counted}; the collector's log above says why"
                )
            time.sleep(0.1)
