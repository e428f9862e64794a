"""`fleet chat` without a network: `python -m tests.cli.chat_process BUNDLE`, for a terminal."""

from __future__ import annotations

import sys
from pathlib import Path

from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.cli.chat import Conversation
from fleet.cli.console import new_console
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest
from tests.system.memory_fleet import DEVICE, WAIT_S, memory_fleet


def main() -> None:
    """Hold a conversation with a device, then print the ends of its answers."""
    request = PromptRequest(messages=(), max_new_tokens=400, ignore_eos=True)
    with memory_fleet() as fleet:
        bundle = Bundle.load(Path(sys.argv[1]))
        fleet.start_device(bundle, AgentConfig(num_threads=1, mode=Mode.STANDALONE))
        Conversation(new_console(), fleet.client, DEVICE, request, []).run()
        print("ended:", fleet.reports.get(timeout=WAIT_S).finish_reason)


if __name__ == "__main__":
    main()
