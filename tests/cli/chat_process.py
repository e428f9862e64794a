"""`fleet chat` without a network: `python -m tests.cli.chat_process BUNDLE`, for a terminal."""

from __future__ import annotations

import sys
import threading
from collections import Counter, defaultdict
from pathlib import Path
from typing import Final

from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.cli.chat import Conversation
from fleet.protocol import topics
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest
from fleet.transport.in_memory import InMemoryBroker
from fleet.utils.console import new_console
from tests.system.memory_fleet import DEVICE, WAIT_S, memory_fleet

NUM_REPLIES: Final = 200


class HeldAnswers(InMemoryBroker):
    """A broker that keeps each answer after `NUM_REPLIES` replies until it is cancelled.

    So no answer ends before the keys arrive, however slow the terminal is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._num_replies: Counter[str] = Counter()
        self._cancelled: defaultdict[str, threading.Event] = defaultdict(threading.Event)

    def _publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        request = topic.rsplit("/", 1)[1]
        if topics.matches(topics.CANCEL_FILTER, topic):
            self._cancelled[request].set()
        elif topics.matches(topics.device_reply("+", "+", "+"), topic):
            self._num_replies[request] += 1
            if self._num_replies[request] > NUM_REPLIES:
                self._cancelled[request].wait(WAIT_S)
        super()._publish(topic, payload, retain=retain)


def main() -> None:
    """Hold a conversation with a device, then print the ends of its answers."""
    request = PromptRequest(messages=(), max_new_tokens=400, ignore_eos=True)
    with memory_fleet(HeldAnswers()) as fleet:
        bundle = Bundle.load(Path(sys.argv[1]))
        fleet.start_device(bundle, AgentConfig(num_threads=1, mode=Mode.STANDALONE))
        Conversation(new_console(), fleet.client, DEVICE, request, []).run()
        print("ended:", fleet.reports.get(timeout=WAIT_S).finish_reason)


if __name__ == "__main__":
    main()
