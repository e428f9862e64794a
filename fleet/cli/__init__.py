"""The command `fleet`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Console

from fleet.cli.allow import allow, disallow, tag
from fleet.cli.audit import audit
from fleet.cli.bench import app as bench_commands
from fleet.cli.broker import app as broker_commands
from fleet.cli.bundles import add_bundle_commands
from fleet.cli.config import app as config_commands
from fleet.cli.doctor import doctor
from fleet.cli.enroll import enroll, resume, revoke, suspend
from fleet.cli.export import PASS_ON, export
from fleet.cli.export import bundle as bundle_commands
from fleet.cli.heads import app as heads_commands
from fleet.cli.init import (
    MetricsPortOption,
    RegistryOption,
    RetentionOption,
    ServicePortOption,
    init,
    server,
)
from fleet.cli.plan import plan
from fleet.cli.rollouts import add_rollout_commands
from fleet.cli.stats import JsonOption, StateOption, device, devices, stats, workers
from fleet.errors import ConfigError, LinkError, UnknownDeviceError
from fleet.exits.exit_policy import check_threshold
from fleet.protocol.modes import parse_mode
from fleet.protocol.prompt import ChatMessage, PromptRequest
from fleet.server.home import (
    DEFAULT_PORT,
    DEFAULT_SERVICE_PORT,
    EMBEDDED,
    MOSQUITTO,
    FleetConfig,
    FleetHome,
    create_fleet,
    keeping,
)
from fleet.utils.cli_runtime import run_command, stop_event
from fleet.utils.optional_imports import load

ARRIVAL_S: Final = 5.0  # of what a device says of itself, in the registry
FIRST_ARRIVAL_S: Final = (
    15.0  # of one that has never said anything: a broker may not know its rights yet
)
ARRIVAL_CHECK_S: Final = 0.2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("export", context_settings=PASS_ON)(export)
app.command("doctor")(doctor)
app.command("init")(init)
app.command("server")(server)
app.command("enroll")(enroll)
app.command("suspend")(suspend)
app.command("resume")(resume)
app.command("revoke")(revoke)
app.command("devices")(devices)
app.command("allow")(allow)
app.command("disallow")(disallow)
app.command("tag")(tag)
app.command("device")(device)
app.command("workers")(workers)
app.command("stats")(stats)
app.command("audit")(audit)
app.command("plan")(plan)
app.add_typer(config_commands, name="config")
add_bundle_commands(bundle_commands)
add_rollout_commands(bundle_commands)
app.add_typer(bundle_commands, name="bundle")
app.add_typer(heads_commands, name="heads")
app.add_typer(bench_commands, name="bench")
app.add_typer(broker_commands, name="broker")

ModeOption = Annotated[
    str | None, typer.Option("--mode", help="standalone, collaborative, verified or auto.")
]
ThresholdOption = Annotated[
    float | None, typer.Option(help="For all exits, 0 to 1; 1 switches the exits off.")
]
TokensOption = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, help="Length limit of the answer.")
]
TemperatureOption = Annotated[float, typer.Option(min=0, max=5, help="0 is greedy.")]
TopPOption = Annotated[
    float, typer.Option(help="Nucleus: smallest set of tokens with this probability.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the sampling.")]
BundleOption = Annotated[
    Path | None, typer.Option(help="Model bundle (default: the default model's, built if missing).")
]


@app.callback()
def options() -> None:
    """One language model served by many small devices and a little cloud."""


@app.command()
def up(
    state: StateOption = None,
    host: Annotated[str, typer.Option(help="Address that the broker listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = DEFAULT_PORT,
    bundle: BundleOption = None,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="How many workers share the devices.")
    ] = 1,
    service_port: ServicePortOption = DEFAULT_SERVICE_PORT,
    metrics_port: MetricsPortOption = None,
    registry: RegistryOption = None,
    retention_days: RetentionOption = None,
    broker: Annotated[
        str, typer.Option(help="amqtt, in the server's process, or mosquitto beside it.")
    ] = EMBEDDED,
) -> None:
    """Start broker, registry, collector, service and workers; stop them with Ctrl-C."""
    from fleet.server.supervisor import (
        check_broker,
        check_port,
        fleet_processes,
        resolve_bundle,
        watch,
    )
    from fleet.server.worker_pool import WorkerPool

    console = Console(stderr=True)
    check_broker(broker)
    check_port(host, port)
    if service_port:
        check_port(host, service_port, "--service-port")
    path = resolve_bundle(bundle, console.print)
    folder = state or FleetHome.default_folder()
    config = FleetConfig(host=host, port=port, bundle=str(path), service_port=service_port)
    fleet = create_fleet(folder, keeping(folder, config, registry, retention_days))
    default = fleet.keep_bundle(path)
    stop = stop_event()  # until now a signal ends it at once
    with (
        fleet_processes(fleet, workers, metrics_port, broker) as (servers, started),
        WorkerPool(
            state=fleet, default=default, num_workers=workers, shares=broker == MOSQUITTO
        ) as crew,
    ):
        for worker in started:
            worker.wait_ready()
        for process in (*servers, *started):
            print(f"{process.ready_line} (process {process.process.pid})")
        print(f"the fleet is up on {host}:{port}; next: fleet enroll NAME", flush=True)
        watch(servers, started, stop, crew.tend)


@app.command()
def sessions(
    device: Annotated[str | None, typer.Argument()] = None,
    limit: Annotated[int, typer.Option(min=1)] = 50,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the latest sessions between devices and workers."""
    from fleet.cli.views import print_rows

    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        print_rows(Console(), registry.sessions(device, limit), "sessions", as_json=as_json)


@app.command()
def prompt(
    device: str,
    text: str,
    mode: ModeOption = None,
    threshold: ThresholdOption = None,
    max_new_tokens: TokensOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a device and stream its answer."""
    request = make_request(
        (ChatMessage("user", text),),
        mode,
        threshold=threshold,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    ask(FleetHome.load(state or FleetHome.default_folder()), device, [request], as_json=as_json)


@app.command()
def chat(
    device: str,
    mode: ModeOption = None,
    threshold: ThresholdOption = None,
    max_new_tokens: TokensOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    state: StateOption = None,
) -> None:
    """Talk with a device; it keeps the conversation. /reset forgets it, an empty line or Ctrl-D ends."""
    from fleet.cli.chat import converse

    base = make_request(
        (),
        mode,
        threshold=threshold,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    converse(FleetHome.load(state or FleetHome.default_folder()), device, base)


@app.command()
def demo(
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL file of prompts.")] = None,
    mode: ModeOption = None,
    threshold: ThresholdOption = None,
    max_new_tokens: TokensOption = 64,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    bundle: BundleOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the whole system on this machine and watch it answer."""
    from fleet.cli.demo import PROMPTS, run_demo
    from fleet.server.supervisor import resolve_bundle
    from fleet.utils.prompt_file import read_prompts

    texts = [*(prompt or ()), *(read_prompts(prompts) if prompts else ())] or list(PROMPTS)
    requests = [
        make_request(
            (ChatMessage("user", text),),
            mode,
            threshold=threshold,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        for text in texts
    ]
    console = Console(stderr=as_json, highlight=False)
    run_demo(resolve_bundle(bundle, Console(stderr=True).print), requests, console, as_json=as_json)


def make_request(
    messages: tuple[ChatMessage, ...],
    mode: str | None,
    threshold: float | None,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
) -> PromptRequest:
    """A request from a command's options; raises ConfigError for a value outside its range."""
    if not 0.0 < top_p <= 1.0:
        raise ConfigError(f"top-p {top_p}: expected a number above 0 and at most 1")
    if any(not message.content.strip() for message in messages):
        raise ConfigError("the prompt is empty; give some text")
    return PromptRequest(
        messages=messages,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        mode=parse_mode(mode) if mode else None,
        threshold=None if threshold is None else check_threshold(threshold),
    )


def online_device(fleet: FleetHome, device: str) -> Any:
    """The registry's row of a device that is online; one that has just started has a moment to get there.

    Raises:
        UnknownDeviceError: nobody enrolled it.
        LinkError: it is offline.
    """
    began = time.monotonic()
    with fleet.registry() as registry:
        while True:
            rows = {row.device: row for row in registry.devices()}
            if device not in rows:
                known = ", ".join(rows) or "none"
                raise UnknownDeviceError(
                    f"unknown device {device!r}: enrolled are {known}; enrol it with 'fleet enroll {device}'"
                )
            if rows[device].online:
                return rows[device]
            patience_s = FIRST_ARRIVAL_S if rows[device].last_seen is None else ARRIVAL_S
            if rows[device].state != "active" or time.monotonic() > began + patience_s:
                raise LinkError(f"device {device} is offline; start it with 'edge-agent run DIR'")
            time.sleep(ARRIVAL_CHECK_S)


def exits_served(fleet: FleetHome, bundle_id: str) -> list[str]:
    """The sources of a device's exits, in order of depth; none for a bundle that is not here."""
    from fleet.bundles.manifest import Bundle
    from fleet.protocol.modes import exit_source

    folder = fleet.bundle_folder(bundle_id)
    return (
        [exit_source(layer) for layer in Bundle.load(folder, ()).manifest.exits] if folder else []
    )


def ask(fleet: FleetHome, device: str, requests: list[PromptRequest], *, as_json: bool) -> None:
    """Sends requests as an operator and shows the answers."""
    from fleet.cli.demo import follow
    from fleet.transport.prompt_client import PromptClient

    row = online_device(fleet, device)
    exits = exits_served(fleet, row.bundle_id)
    console = Console(stderr=as_json, highlight=False)
    transport = load("fleet.transport.mqtt").MqttTransport
    with fleet.operator() as identity, transport.connect(identity) as link:
        client = PromptClient(link)
        results = [follow(console, client, device, request, exits) for request in requests]
    if as_json:
        with fleet.registry() as registry:
            rows = registry.stats(device)
        print(
            msgspec.json.encode(
                {"bundle_id": row.bundle_id, "results": results, "stats": rows}
            ).decode()
        )


def main() -> None:
    """Entry point."""
    run_command("fleet", app)
