"""The parts above `fleet` are mounted by name, when a command needs them."""

from __future__ import annotations

import importlib
from types import ModuleType

from fleet.errors import MissingExtraError

EXTRAS = {
    "cloud_broker_worker.broker": "server",
    "fleet.registry": "server",
    "onnx_export": "export",
    "cloud_broker_worker": "worker",
    "edge_agent": "edge",
    "provisioning": "server",
}

OWN = frozenset(prefix.partition(".")[0] for prefix in EXTRAS)


def load(module: str) -> ModuleType:
    """Imports `module`.

    Raises:
        MissingExtraError: something that it needs is not installed; names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OWN:
            raise
        extra = next((extra for prefix, extra in EXTRAS.items() if module.startswith(prefix)), None)
        raise MissingExtraError(
            f"this command needs {error.name}, which is not installed; run: pip install 'cecollm-fleet[{extra}]'"
        ) from None
