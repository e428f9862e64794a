"""The requirements of a wheel, checked against the environment that it is to run in."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from packaging.metadata import Metadata
from packaging.requirements import Requirement

from fleet.errors import SoftwareError

DEVICE_EXTRAS: Final = ("edge", "edge-gpu")
"""The extras of a device, of which one must be complete."""


def check_requirements(metadata: Metadata) -> None:
    """Raise SoftwareError unless this environment meets the requirements of a device."""
    python = platform.python_version()
    if metadata.requires_python and not metadata.requires_python.contains(python, prereleases=True):
        raise SoftwareError(
            f"version {metadata.version} needs Python {metadata.requires_python}, this device has "
            f"{python}; install that Python on the device first"
        )
    requirements = metadata.requires_dist or []
    unmet = min((_unmet(requirements, extra) for extra in DEVICE_EXTRAS), key=len)
    if unmet:
        raise SoftwareError(
            f"version {metadata.version} needs {', '.join(unmet)}; "
            "install that on the device with pip first"
        )


def _unmet(requirements: list[Requirement], extra: str) -> list[str]:
    """Return the requirements of one extra that are not met, with what is installed."""
    needed = [each for each in requirements if not each.marker or _applies(each, extra)]
    return [text for each in needed if (text := _unmet_text(each))]


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is not None and requirement.marker.evaluate({"extra": extra})


def _unmet_text(requirement: Requirement) -> str:
    """Return the requirement and what is installed; "" when it is met."""
    needed = f"{requirement.name}{requirement.specifier}"
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return f"{needed} (not installed)"
    if requirement.specifier.contains(installed, prereleases=True):
        return ""
    return f"{needed} ({installed} is installed)"
