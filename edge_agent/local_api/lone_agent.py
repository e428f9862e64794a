"""An agent without a fleet: it answers with the device's half of a bundle alone."""

from __future__ import annotations

from typing import Final

from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.protocol.modes import Mode
from fleet.transport.in_memory import InMemoryBroker

NAME: Final = "local"


def lone_agent(bundle: Bundle, num_threads: int) -> Agent:
    """Return an agent in the mode `standalone`, whose link to a broker is down for ever."""
    transport = InMemoryBroker().connect(NAME)
    transport.drop()
    return Agent(transport, bundle, AgentConfig(mode=Mode.STANDALONE, num_threads=num_threads))
