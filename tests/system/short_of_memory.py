"""A device in a process whose memory is limited: asked for much, then for little. Prints the last
replies and the reports as JSON."""

from __future__ import annotations

import queue
import resource
import sys
from pathlib import Path

import msgspec

from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.protocol import topics
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest, Reply, decode_reply
from fleet.protocol.report import GenerationReport, decode_report
from fleet.transport.in_memory import InMemoryBroker

WAIT_S = 60.0
HEADROOM_BYTES = 16 << 20


def limit_memory() -> None:
    """Lets this process have `HEADROOM_BYTES` more than it has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    most = pages * resource.getpagesize() + HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main(folder: Path, max_new_tokens: int) -> None:
    broker = InMemoryBroker()
    config = AgentConfig(num_threads=1, max_positions=8192, cache_budget_mb=1024)
    replies: queue.Queue[Reply] = queue.Queue()
    reports: queue.Queue[GenerationReport] = queue.Queue()
    with (
        broker.connect("app") as app,
        broker.connect("device") as link,
        Agent(link, Bundle.load(folder), config),
    ):
        app.subscribe(
            topics.device_reply("device", "app", "+"),
            lambda _, payload: replies.put(decode_reply(payload)),
        )
        app.subscribe(
            topics.device_stats("device"), lambda _, payload: reports.put(decode_report(payload))
        )
        limit_memory()
        last = []
        for request, length in ("large", max_new_tokens), ("small", 4):
            prompt = PromptRequest(
                prompt="How are you?", mode=Mode.STANDALONE, max_new_tokens=length
            )
            app.publish(
                topics.device_prompt("device", "app", request), msgspec.json.encode(prompt), qos=1
            )
            while not (reply := replies.get(timeout=WAIT_S)).done:
                pass
            last.append(reply)
        reported = [reports.get(timeout=WAIT_S) for _ in last]
        print(msgspec.json.encode({"replies": last, "reports": reported}).decode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
