"""Engines that answer the prompts of a conversation: a device behind its broker, llama.cpp.

Each keeps what it has computed for one conversation, and can answer a prompt without that.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final, Protocol, Self

from msgspec import Struct

from benchmarks.engines import EngineProcess
from benchmarks.native_llama import native_build
from benchmarks.peers import NATIVE, native_command, peers_gguf
from benchmarks.processes import started_on, two_cores
from edge_agent.engine.tokenizer import ChatTokenizer
from fleet.errors import FleetError
from fleet.identity.enrolment import Enrolment
from fleet.identity.identity import Identity
from fleet.protocol.access import Role
from fleet.protocol.modes import FALLBACK
from fleet.protocol.prompt import PromptRequest, Reply, Usage
from fleet.server.child_process import child
from fleet.server.home import FleetConfig, FleetHome
from fleet.server.supervisor import fleet_processes
from fleet.transport.base import Transport
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from fleet.utils.host_address import free_port

HOST: Final = "127.0.0.1"
DEVICE: Final = "edge-1"
FIRST_TOKEN: Final = 1

Progress = Callable[[str], None]
Connect = Callable[[], AbstractContextManager[Transport]]


class Answer(Struct, frozen=True, kw_only=True):
    """An answer to one prompt; `reused_tokens` are positions that were not computed again."""

    prompt_tokens: int
    token_ids: tuple[int, ...]
    text: str
    ttft_ms: float
    bytes_up: int = 0
    reused_tokens: int = 0


class Responder(Protocol):
    """An engine that keeps what it has computed for one conversation."""

    def begin(self) -> None:
        """Begin a conversation of which nothing is kept."""

    def ask(self, request: PromptRequest, *, reuse: bool) -> Answer:
        """Answer a prompt; without `reuse`, nothing of earlier ones is used or replaced."""


class DeviceResponder:
    """A device that apps ask through the broker; an app that is new to it shares no prompt."""

    def __init__(self, connect: Connect, device: str) -> None:
        self._connect = connect
        self._device = device
        self._stack = ExitStack()
        self._client: PromptClient | None = None

    def begin(self) -> None:
        """Let a new app have the conversation."""
        self._stack.close()
        self._client = PromptClient(self._stack.enter_context(self._connect()))

    def ask(self, request: PromptRequest, *, reuse: bool) -> Answer:
        """Ask as the app of the conversation, or as a new one."""
        if reuse and self._client:
            return read_answer(self._client.ask(self._device, request))
        with self._connect() as transport:
            return read_answer(PromptClient(transport).ask(self._device, request))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class LlamaResponder:
    """llama.cpp with its prompt cache in one process, and without it in another."""

    def __init__(self, kept: EngineProcess, fresh: EngineProcess, tokenizer: ChatTokenizer) -> None:
        self._engines = {True: kept, False: fresh}
        self._tokenizer = tokenizer

    def begin(self) -> None:
        """Replace the prompt in the cache by another one."""
        request = PromptRequest(prompt="?", raw=True, max_new_tokens=FIRST_TOKEN)
        self._respond(self._engines[True], request, reuse=False)

    def ask(self, request: PromptRequest, *, reuse: bool) -> Answer:
        """Ask the process that keeps the conversation, or the other one."""
        return self._respond(self._engines[reuse], request, reuse=reuse)

    def _respond(self, engine: EngineProcess, request: PromptRequest, *, reuse: bool) -> Answer:
        prompt = self._tokenizer.encode(request)
        reply = engine.ask("respond", prompt=prompt, new_tokens=request.max_new_tokens, reuse=reuse)
        return Answer(
            prompt_tokens=len(prompt),
            token_ids=tuple(reply["token_ids"]),
            text=reply["text"],
            ttft_ms=reply["ttft_ms"],
            reused_tokens=reply["reused_tokens"],
        )


def read_answer(replies: Iterable[Reply]) -> Answer:
    """Read the replies of a device to their end.

    Raises:
        FleetError: the device answered alone where the cloud was to help.
    """
    token_ids: list[int] = []
    pieces: list[str] = []
    ttft_s = 0.0
    usage: Usage | None = None
    began = time.perf_counter()
    for reply in replies:
        if reply.token_id is not None:
            ttft_s = ttft_s or time.perf_counter() - began
            token_ids.append(reply.token_id)
        pieces.append(reply.text)
        usage = reply.usage
    if usage is None or usage.sources.get(FALLBACK):
        raise FleetError("the device answered without its worker; try again on an idle machine")
    return Answer(
        prompt_tokens=usage.prompt_tokens,
        token_ids=tuple(token_ids),
        text="".join(pieces),
        ttft_ms=1e3 * ttft_s,
        bytes_up=usage.bytes_up,
        reused_tokens=getattr(usage, "reused_tokens", 0),
    )


@contextmanager
def running_fleet(bundle: Path, num_apps: int) -> Iterator[DeviceResponder]:
    """Run a server, a worker and a device, each side on its core, with `num_apps` apps."""
    edge_core, cloud_core = two_cores() or (None, None)
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder, ExitStack() as stack:
        config = FleetConfig(host=HOST, port=free_port(HOST), bundle=str(bundle), service_port=0)
        home = FleetHome.create(Path(folder) / "home", config)
        device = home.enroll(DEVICE, Role.DEVICE, Path(folder) / DEVICE)
        apps = iter(enroll_apps(home, Path(folder), num_apps))
        with started_on(cloud_core):
            for worker in stack.enter_context(fleet_processes(home)).workers:
                worker.wait_ready()
        with started_on(edge_core):
            edge = child("the device", "edge_agent", "run", str(device.folder), "--threads", "1")
            stack.enter_context(edge).wait_ready()
        yield stack.enter_context(DeviceResponder(partial(connect_next, apps), DEVICE))


def enroll_apps(home: FleetHome, folder: Path, num_apps: int) -> Sequence[Identity]:
    """Enrol apps that may send prompts to the device."""
    names = [f"app-{number}" for number in range(1, num_apps + 1)]
    enrolments = {
        folder / name: Enrolment(name=name, role=Role.APP, targets=(DEVICE,)) for name in names
    }
    return home.enroll_all(enrolments, home.address())


def connect_next(apps: Iterator[Identity]) -> MqttTransport:
    """Connect the next of the apps."""
    return MqttTransport.connect(next(apps))


@contextmanager
def running_llama(tokenizer: ChatTokenizer, progress: Progress) -> Iterator[LlamaResponder]:
    """Run two processes of a native llama.cpp on the device's core."""
    model = peers_gguf(progress)
    command = native_command(native_build(progress), model, 1)
    edge_core, _ = two_cores() or (None, None)
    with ExitStack() as stack:
        with started_on(edge_core):
            kept, fresh = (
                stack.enter_context(EngineProcess(f"{NATIVE} {name}", command))
                for name in ("with its cache", "without a cache")
            )
        yield LlamaResponder(kept, fresh, tokenizer)
