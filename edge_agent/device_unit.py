"""The systemd unit of a device."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from fleet.identity.identity import Identity
from fleet.protocol.access import Role
from fleet.utils.paths import absolute_path
from fleet.utils.systemd_unit import ServiceUnit, program_folders

DEVICE_SERVICE: Final = "edge-agent.service"
WATCHDOG_S: Final = 180
GPU_PACKAGE: Final = "onnxruntime-gpu"


def device_unit(folder: Path, user: str) -> str:
    """Return the unit of the device with this identity folder.

    Raises:
        IdentityError: there is no identity in the folder.
        ConfigError: the identity has another role, or a path begins with ``~`` and there is no home
            folder.
    """
    folder = absolute_path(folder)
    identity = Identity.load(folder)
    identity.check_role(Role.DEVICE, "make one with 'edge-agent join'")
    return ServiceUnit(
        description=f"CE-CoLLM fleet: device {identity.name}",
        command=[sys.executable, "-m", "edge_agent", "run", str(folder)],
        user=user,
        writable=[folder],
        readable=[*program_folders(), *filter(None, [identity.bundle])],
        watchdog_s=WATCHDOG_S,
        notify_access="all",  # a version in a slot runs as a child of the launcher
        start_s="infinity",  # a device without a bundle downloads it first
        has_gpu=_uses_gpu(),
    ).render()


def _uses_gpu() -> bool:
    try:
        distribution(GPU_PACKAGE)
    except PackageNotFoundError:
        return False
    return True
