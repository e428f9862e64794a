"""The core of the fleet: protocol, bundles, transport, registry, server and command line."""

import os
from typing import TYPE_CHECKING, Any

from fleet.version import __version__

# ONNX Runtime's official builds report their use to their maker, and write files into the home,
# unless this is set before their import. The other packages import this one first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = (
    "Answer",
    "AsyncAnswer",
    "AsyncFleetClient",
    "ChatMessage",
    "FleetClient",
    "FleetError",
    "LocalFleet",
    "Mode",
    "PromptRequest",
    "Reply",
    "__version__",
)

if TYPE_CHECKING:
    from fleet.public import (
        Answer,
        AsyncAnswer,
        AsyncFleetClient,
        ChatMessage,
        FleetClient,
        FleetError,
        LocalFleet,
        Mode,
        PromptRequest,
        Reply,
    )
else:

    def __getattr__(name: str) -> Any:
        """Import the public names when the first of them is used: most programs need none."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from fleet import public

        return getattr(public, name)
