"""The parts above `fleet` are mounted by name, when a command needs them."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from fleet.errors import MissingExtraError

EXTRAS = {
    "benchmarks.plots": "plots",
    "cloud_broker_worker.broker": "server",
    "fleet.cli.stats_plot": "plots",
    "fleet.exits.plot": "plots",
    "fleet.utils.plots": "plots",
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
        extra = next(
            (extra for prefix, extra in EXTRAS.items() if module.startswith(prefix)), "server"
        )
        raise missing(error.name or module, extra) from None


def require(extra: str, *modules: str) -> None:
    """Checks, without importing them, that the modules which `extra` brings are there.

    Raises:
        MissingExtraError: one is not.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise missing(module, extra)


def missing(module: str, extra: str) -> MissingExtraError:
    return MissingExtraError(
        f"this command needs {module}, which is not installed; run: pip install 'cecollm-fleet[{extra}]'"
    )
