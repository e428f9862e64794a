"""The installation of a version into a slot: fetched, checked, unpacked, complete or absent."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from edge_agent.state.software_slots import SITE_FOLDER, SoftwareStore
from edge_agent.update.requirements import check_requirements
from fleet.bundles.manifest import MANIFEST_FILE
from fleet.bundles.signature import SIGNATURE_FILE
from fleet.bundles.software import (
    SoftwareManifest,
    check_software,
    check_wheel_bytes,
    read_wheel,
)
from fleet.errors import SoftwareError
from fleet.identity.identity import CA_FILE, Identity
from fleet.identity.service_client import ServiceClient
from fleet.utils.atomic_files import sync_folder, write_file

MAX_SOFTWARE_MANIFEST_BYTES: Final = 4096
MAX_SOFTWARE_SIGNATURE_BYTES: Final = 4096


def install_software(identity: Identity, store: SoftwareStore, version: str) -> None:
    """Fetch a version from the fleet's service, and install it into its slot.

    Raises:
        ConfigError: the identity names no service.
        SoftwareError: the version is not signed by the fleet, damaged, or does not fit this
            device; or the disk is full.
        ServiceError, IdentityError: the service cannot be used, or refuses the device.
    """
    try:
        store.folder.mkdir(exist_ok=True)
        with (
            ServiceClient.of(identity) as service,
            tempfile.TemporaryDirectory(dir=store.folder, prefix=".new-") as temporary,
        ):
            content = Path(temporary) / "slot"
            content.mkdir()
            manifest = _fetch(service, version, content, identity.folder / CA_FILE)
            _unpack(content, manifest)
            shutil.rmtree(store.slot(version), ignore_errors=True)
            content.rename(store.slot(version))
            sync_folder(store.folder)
    except OSError as error:
        reason = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the disk"
        raise SoftwareError(
            f"cannot install version {version} below {store.folder}: "
            f"{error.strerror or error}; {reason}"
        ) from None


def _fetch(service: ServiceClient, version: str, content: Path, ca: Path) -> SoftwareManifest:
    """Fetch manifest, signature and wheel into `content`, and check them."""
    limits = {
        MANIFEST_FILE: MAX_SOFTWARE_MANIFEST_BYTES,
        SIGNATURE_FILE: MAX_SOFTWARE_SIGNATURE_BYTES,
    }
    for name, max_bytes in limits.items():
        write_file(content / name, service.software_file(version, name, max_bytes))
    manifest = check_software(content, version, ca)
    wheel = service.software_file(version, manifest.wheel, manifest.num_bytes)
    check_wheel_bytes(wheel, manifest)
    (content / manifest.wheel).write_bytes(wheel)
    return manifest


def _unpack(content: Path, manifest: SoftwareManifest) -> None:
    """Unpack the wheel that fits this device; its packages are on disk afterwards."""
    wheel = content / manifest.wheel
    check_requirements(read_wheel(wheel))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(content / SITE_FOLDER)
    wheel.unlink()
    for folder, _, names in os.walk(content):
        for name in names:
            _sync_file(Path(folder, name))
        sync_folder(Path(folder))


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
