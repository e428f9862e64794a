"""The device: the model in ONNX Runtime with early exits, and the agent that serves prompts."""

from typing import TYPE_CHECKING, Any

import fleet.version  # noqa: F401  # before ONNX Runtime: it turns off its telemetry

__all__ = ("AgentConfig", "Engine")

if TYPE_CHECKING:
    from edge_agent.config import AgentConfig
    from edge_agent.local_api.python_engine import Engine
else:

    def __getattr__(name: str) -> Any:
        """Import a public name when it is used: the command line needs neither."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from edge_agent.config import AgentConfig
        from edge_agent.local_api.python_engine import Engine

        return {"AgentConfig": AgentConfig, "Engine": Engine}[name]
