"""An agent without a fleet: it answers with the device's half of a bundle alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from msgspec.structs import replace

from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.protocol.modes import Mode
from fleet.transport.in_memory import InMemoryBroker

NAME: Final = "local"


@contextmanager
def lone_agent(bundle: Bundle, config: AgentConfig) -> Iterator[Agent]:
    """Run an agent in the mode `standalone`, which refuses prompts that need a worker."""
    with InMemoryBroker().connect(NAME) as transport:
        transport.drop()
        config = replace(config, mode=Mode.STANDALONE)
        with Agent(transport, bundle, config, is_alone=True) as agent:
            yield agent
