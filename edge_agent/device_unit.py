"""The systemd unit of a device."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from edge_agent.local_api.api_keys import check_exposure
from fleet.http_api.api_address import ApiAddress
from fleet.identity.identity import Identity
from fleet.protocol.access import Role
from fleet.utils.paths import absolute_path
from fleet.utils.systemd_unit import ServiceUnit, program_folders

DEVICE_SERVICE: Final = "edge-agent.service"
WATCHDOG_S: Final = 180
GPU_PACKAGE: Final = "onnxruntime-gpu"


def device_unit(
    folder: Path, user: str, api: str | None = None, api_key_file: Path | None = None
) -> str:
    """Return the unit of the device with this identity folder, and the HTTP API at `api`, if given.

    Raises:
        IdentityError: there is no identity in the folder.
        ConfigError: the identity has another role, a path begins with ``~`` and there is no home
            folder, or `api` is no address, or needs a key.
    """
    folder = absolute_path(folder)
    key_file = absolute_path(api_key_file) if api_key_file else None
    options = ["--api-key-file", str(key_file)] if key_file else []
    if api:
        address = ApiAddress.parse(api)
        check_exposure(address, has_keys=key_file is not None)
        options += ["--api", str(address)]
    identity = Identity.load(folder)
    identity.check_role(Role.DEVICE, "make one with 'edge-agent join'")
    return ServiceUnit(
        description=f"CE-CoLLM fleet: device {identity.name}",
        command=[sys.executable, "-m", "edge_agent", "run", str(folder), *options],
        user=user,
        writable=[folder],
        readable=[*program_folders(), *filter(None, [identity.bundle, key_file])],
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
