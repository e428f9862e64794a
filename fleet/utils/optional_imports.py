"""Imports of packages that an extra of the distribution installs."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from fleet.errors import ConfigError, MissingExtraError
from fleet.utils.paths import NO_CURRENT_FOLDER, has_current_folder

OWN_PACKAGES: Final = frozenset(
    {
        "benchmarks",
        "cloud_broker_worker",
        "edge_agent",
        "fleet",
        "onnx_export",
        "provisioning",
    }
)
TORCH_EXTRAS: Final = frozenset({"export", "worker"})


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Run a block of imports, whose objects stay: the search for garbage takes a fifth of it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Run a block of imports whose third-party packages `extra` installs.

    An error about a module of this project passes through: it is a fault, not a missing extra.

    Raises:
        ConfigError: an extra has PyTorch, and the current folder no longer exists.
        MissingExtraError: a third-party package is not installed; the message names the extra.
    """
    check_current_folder(extra)
    try:
        with without_garbage_collection():
            yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        if package in OWN_PACKAGES:
            raise
        raise missing_extra(package, extra) from None


def require(extra: str, *modules: str) -> None:
    """Check, without an import, that modules of `extra` are installed and can be imported.

    Raises:
        ConfigError: the extra has PyTorch, and the current folder no longer exists.
        MissingExtraError: a module is not installed.
    """
    check_current_folder(extra)
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise missing_extra(module, extra)


def missing_extra(module: str, extra: str) -> MissingExtraError:
    """The error that names the extra to install."""
    return MissingExtraError(
        f"this command needs {module}, which is not installed; "
        f"run: pip install 'cecollm-fleet[{extra}]'"
    )


def check_current_folder(extra: str) -> None:
    """Raise ConfigError where an import of PyTorch would end the process: in a deleted folder."""
    if not TORCH_EXTRAS.isdisjoint(extra.split(",")) and not has_current_folder():
        raise ConfigError(NO_CURRENT_FOLDER)
