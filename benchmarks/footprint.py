"""A device's cost for its machine: start-up, memory, and CPU while idle."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Final

from benchmarks.processes import memory_mb
from fleet.errors import FleetError
from fleet.protocol.access import Role
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import ChatMessage, PromptRequest
from fleet.server.child_process import child
from fleet.server.home import FleetConfig, FleetHome
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from fleet.utils.host_address import free_port

HOST: Final = "127.0.0.1"
DEVICE: Final = "edge-1"
IDLE_S: Final = 20.0
NUM_ANSWERS: Final = 3
QUESTION: Final = "Explain in a few sentences how a battery stores energy."
TEXT: Final = 40 * "Rivers carry water from the hills to the sea. "


def measure_footprint(bundle: Path, idle_s: float = IDLE_S) -> dict[str, float]:
    """Measure a real device in standalone mode, with a real broker, on the default settings.

    Return the time from the start of its process to the first text of an answer in s, its resident
    memory in MB after three answers (`rss_mb`, of which `own_rss_mb` is not mapped from files;
    `peak_rss_mb` at most so far) and its use of one core in percent while connected and idle. The
    names of the memory after three more answers to a long prompt begin with ``long_``.
    """
    prompt = standalone_prompt(QUESTION)
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder:
        home = FleetHome.create(
            Path(folder),
            FleetConfig(host=HOST, port=free_port(HOST), bundle=str(bundle), service_port=0),
        )
        device = Path(folder) / "devices" / DEVICE
        home.enroll(DEVICE, Role.DEVICE, device)
        app = home.enroll("bench", Role.APP, Path(folder) / "apps" / "bench", allow=(DEVICE,))
        with child("the broker", "fleet.cli", "server", "--home", str(home.folder)) as server:
            server.wait_ready()
            with MqttTransport.connect(app) as transport:
                client = PromptClient(transport)
                start = time.monotonic()
                with child("the device", "edge_agent", "run", str(device)) as edge:
                    edge.wait_ready()
                    first = first_text_after(client, prompt, start)
                    for _ in range(NUM_ANSWERS - 1):
                        first_text_after(client, prompt, start)
                    memory = memory_mb(edge.process.pid)
                    for _ in range(NUM_ANSWERS):
                        first_text_after(client, standalone_prompt(TEXT), start)
                    memory |= {f"long_{k}": v for k, v in memory_mb(edge.process.pid).items()}
                    idle = idle_percent(edge.process.pid, idle_s)
    return {"start_to_first_token_s": first, **memory, "idle_cpu_percent": idle}


def standalone_prompt(text: str) -> PromptRequest:
    """Return a request for an answer of the device alone."""
    message = ChatMessage("user", text)
    return PromptRequest(messages=(message,), mode=Mode.STANDALONE, max_new_tokens=64)


def first_text_after(client: PromptClient, prompt: PromptRequest, start: float) -> float:
    """Return the seconds from `start` to the first token of an answer; read it to its end."""
    first = 0.0
    for reply in client.ask(DEVICE, prompt):
        if reply.token_id is not None and not first:
            first = time.monotonic() - start
    if not first:
        raise FleetError(f"device {DEVICE} answered without a token; expected at least one")
    return first


def idle_percent(pid: int, seconds: float) -> float:
    """Return the CPU time of a process over `seconds`, in percent of one core."""
    before = cpu_seconds(pid)
    start = time.monotonic()
    time.sleep(seconds)
    return 100 * (cpu_seconds(pid) - before) / (time.monotonic() - start)


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
