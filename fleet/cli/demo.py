"""`fleet demo`: the whole system on this machine, as separate processes with TLS on loopback."""

from __future__ import annotations

import io
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer
from msgspec.structs import replace
from rich.console import Console, RenderableType

from fleet.bundles.manifest import PromptFormat, read_manifest
from fleet.cli.access import fleet_access
from fleet.cli.console import open_link, owner_link
from fleet.cli.options import (
    BundleOption,
    ConsoleOption,
    JsonOption,
    ModeOption,
    SeedOption,
    TemperatureOption,
    ThresholdOption,
    TokensOption,
    TopKOption,
    TopPOption,
    make_request,
    print_json,
)
from fleet.cli.responses import PromptResult, stream_response
from fleet.cli.stats_views import stats_table
from fleet.cli.views import legend
from fleet.errors import ConfigError, RegistryError
from fleet.protocol.access import Role
from fleet.protocol.modes import exit_source
from fleet.protocol.prompt import PromptRequest
from fleet.registry.results import StatsRow
from fleet.server.child_process import child
from fleet.server.gateway.api_options import ApiOptions
from fleet.server.home import FleetConfig, FleetHome
from fleet.server.supervisor import fleet_processes, resolve_bundle
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from fleet.utils.cli_runtime import check_writable, stop_event, wait_stopped
from fleet.utils.console import new_console, outside_text
from fleet.utils.host_address import free_port
from fleet.utils.optional_imports import require
from fleet.utils.path_options import path_option
from fleet.utils.prompt_file import read_prompts

DEVICE: Final = "edge-1"
APP: Final = "demo"
HOST: Final = "127.0.0.1"
REGISTRY_TIMEOUT_S: Final = 15.0
CHECK_S: Final = 0.1
PICTURE_TITLE: Final = "fleet demo"
PICTURE_ID: Final = "fleet-demo"
PICTURE_COLUMNS: Final = 100
PROMPTS: Final[dict[PromptFormat, tuple[str, ...]]] = {
    "chat": (
        "What is the capital of France, and what is it known for?",
        "Write a short note that asks a neighbour to water the plants.",
        "Give three tips for saving energy at home.",
    ),
    "raw": (
        "The capital of France is",
        "Dear neighbour, I am away next week. Could you please",
        "Three tips for saving energy at home:\n1.",
    ),
}

PromptsOption = Annotated[list[str] | None, typer.Option(help="A prompt; repeatable.")]
PromptFileOption = Annotated[Path | None, path_option(help="JSONL file of prompts.")]
PictureOption = Annotated[
    Path | None,
    path_option(metavar="FILE.svg", help="Write the coloured output into an SVG, too."),
]


def demo(
    prompt: PromptsOption = None,
    prompts: PromptFileOption = None,
    mode: ModeOption = None,
    threshold: ThresholdOption = None,
    max_new_tokens: TokensOption = 64,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = 0,
    bundle: BundleOption = None,
    picture: PictureOption = None,
    console: ConsoleOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the whole system on this machine, with answers to a few prompts.

    With --console it goes on until Ctrl-C, and a browser shows the fleet.
    """
    check_writable(picture=picture)
    if console and as_json:
        raise ConfigError("--console and --json exclude each other; give one of them")
    web_server = ApiOptions.of_console(console, None, None)
    if picture and picture.suffix.lower() != ".svg":
        raise ConfigError(f"--picture {picture}: expected a file named *.svg")
    texts = [*(prompt or ()), *(read_prompts(prompts) if prompts else ())]
    requests = [
        make_request(
            text,
            mode=mode,
            threshold=threshold,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )
        for text in texts or PROMPTS["chat"]
    ]
    folder = resolve_bundle(bundle, new_console(stderr=True).print)
    if not texts:
        pairs = zip(requests, default_prompts(folder), strict=True)
        requests = [replace(request, prompt=text) for request, text in pairs]
    screen = Screen(as_json=as_json, has_picture=picture is not None)
    save_picture = partial(screen.save_picture, picture) if picture else None
    run_demo(folder, requests, screen, web_server, as_json=as_json, then=save_picture)


def default_prompts(bundle: Path) -> tuple[str, ...]:
    """The prompts of a demo without any: questions, or texts that the bundle's model continues."""
    return PROMPTS[read_manifest(bundle).prompt_format]


class Screen:
    """The terminal, and a picture of fixed width if one is to be saved."""

    def __init__(self, *, as_json: bool = False, has_picture: bool = False) -> None:
        self.console = new_console(stderr=as_json)
        self.picture = None
        if has_picture:
            self.picture = new_console(file=io.StringIO(), width=PICTURE_COLUMNS)

    def print(self, renderable: RenderableType = "") -> None:
        """Print on both."""
        self.console.print(renderable)
        if self.picture:
            self.picture.print(renderable)

    def save_picture(self, path: Path) -> None:
        """Write the picture; equal output gives an equal file."""
        if self.picture:
            self.picture.save_svg(str(path), title=PICTURE_TITLE, unique_id=PICTURE_ID)


def run_demo(
    bundle: Path,
    requests: Sequence[PromptRequest],
    screen: Screen,
    web_server: ApiOptions | None = None,
    *,
    as_json: bool,
    then: Callable[[], None] | None = None,
) -> None:
    """Send every prompt to one device, then print the counts of the registry.

    `then` is called after that. With the options of a console, the fleet runs until it is stopped.

    Raises:
        RegistryError: the counts of the registry do not become those of the responses.
    """
    manifest = read_manifest(bundle)
    exits = [exit_source(layer) for layer in manifest.exits]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-demo-"))
        fleet = running_fleet(bundle, Path(folder), screen.console, web_server)
        home, transport = stack.enter_context(fleet)
        results = _send_all(screen, PromptClient(transport), requests, exits)
        rows = await_counts(home, results)
        screen.print()
        if as_json:
            print_json({"bundle_id": manifest.bundle_id, "results": results, "stats": rows})
        else:
            screen.print(stats_table(rows, "what the registry counted"))
        if then:
            then()
        if web_server:
            _show_console(home)


def _show_console(home: FleetHome) -> None:
    """Open the console in a browser, and wait for SIGINT or SIGTERM."""
    with fleet_access(home.folder) as access:
        open_link(owner_link(access))
    print("the fleet runs until Ctrl-C", flush=True)
    wait_stopped(stop_event())


def _send_all(
    screen: Screen, client: PromptClient, requests: Sequence[PromptRequest], exits: Sequence[str]
) -> list[PromptResult]:
    screen.print(legend(exits))
    results = []
    for request in requests:
        screen.print()
        screen.print(outside_text(f"> {request.prompt}", "bold"))
        result = stream_response(
            screen.console, client, DEVICE, request, exits, picture=screen.picture
        )
        results.append(result)
    return results


@contextmanager
def running_fleet(
    bundle: Path, folder: Path, console: Console, web_server: ApiOptions | None = None
) -> Iterator[tuple[FleetHome, MqttTransport]]:
    """Run server, worker and one device, ready when the block begins; an app's connection.

    `web_server` are the options of the console.

    Each process is reported when it starts and when it is ready.
    """
    console.print(outside_text("starting the broker and the registry ...", "dim"))
    require("edge", "onnxruntime", "tokenizers")
    config = FleetConfig(
        host=HOST, port=free_port(HOST), bundle=str(bundle), service_port=free_port(HOST)
    )
    home = FleetHome.create(folder, config)
    device = folder / "devices" / DEVICE
    home.enroll(DEVICE, Role.DEVICE, device)
    app = home.enroll(APP, Role.APP, folder / "apps" / APP, allow=(DEVICE,))
    server_options: list[str] = []
    if web_server:
        home.identity(web_server.gateway, Role.GATEWAY)  # before the broker reads its rights
        server_options = web_server.arguments()
    with ExitStack() as stack:
        processes = stack.enter_context(fleet_processes(home, server_options=server_options))
        for server in processes.servers:
            console.print(outside_text(server.ready_line, "dim"))
        console.print(outside_text("starting a worker and a device ...", "dim"))
        edge = stack.enter_context(child("the device", "edge_agent", "run", str(device)))
        transport = stack.enter_context(MqttTransport.connect(app))
        for process in (*processes.workers, edge):
            console.print(outside_text(process.wait_ready(), "dim"))
        yield home, transport


def await_counts(home: FleetHome, results: Sequence[PromptResult]) -> list[StatsRow]:
    """Wait until the registry holds the counts of the responses; its rows."""
    expected: Counter[str] = Counter()
    for result in results:
        expected.update(result.sources)
    deadline = time.monotonic() + REGISTRY_TIMEOUT_S
    with home.registry() as registry:
        while True:
            rows = registry.stats.per_device(DEVICE)
            counted = dict(rows[0].sources) if rows else {}
            if rows and rows[0].generations == len(results) and counted == expected:
                return rows
            if time.monotonic() > deadline:
                raise RegistryError(
                    f"expected {dict(expected)} of {len(results)} answers in the registry within "
                    f"{REGISTRY_TIMEOUT_S:g} s, got {counted}; the collector's log above has the "
                    "reason"
                )
            time.sleep(CHECK_S)
