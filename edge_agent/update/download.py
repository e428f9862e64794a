"""The download of a bundle from the fleet's service: resumable, and checked before it is used."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from edge_agent.state.bundle_slots import SlotStore, partial_name
from fleet.bundles.manifest import (
    EDGE_SIDES,
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    check_file,
    read_manifest,
)
from fleet.bundles.signature import SIGNATURE_FILE, check_signature
from fleet.errors import BundleError, ServiceAwayError
from fleet.identity.identity import CA_FILE, Identity
from fleet.identity.service_client import ServiceClient
from fleet.utils.atomic_files import sync_folder, write_file
from fleet.utils.backoff import backoff_s

FETCH_S: Final = 3600.0  # to fetch the first bundle of a device
MAX_MANIFEST_BYTES: Final = 4 << 20
MAX_SIGNATURE_BYTES: Final = 4096
MAX_CUTS: Final = 5  # in a row without one new byte
NUM_TRIES: Final = 2  # of a file that is complete and damaged

Progress = Callable[[int, int], None]
"""Receives the number of downloaded bytes, and that of all bytes."""

log = logging.getLogger(__name__)


class BundleDownload:
    """The download of one bundle into `bundles`/<id>, which appears there complete or not at all.

    A partial download is kept next to it. `ca` is the file with the certificate whose key must have
    signed the bundle.
    """

    def __init__(
        self,
        service: ServiceClient,
        bundle_id: str,
        bundles: Path,
        ca: Path,
        progress: Progress | None = None,
    ) -> None:
        self._service = service
        self._bundle_id = bundle_id
        self._folder = bundles / bundle_id
        self._partial = bundles / partial_name(bundle_id)
        self._ca = ca
        self._progress = progress or (lambda *_: None)
        self._num_bytes_done = 0
        self._num_bytes = 0

    def run(self, stop: threading.Event | None = None) -> Path:
        """Return the bundle's folder, with every file that a device needs checked.

        Raises:
            BundleError: the download is not the bundle, or not signed by the fleet, or damaged
                twice; or the disk is full.
            ServiceAwayError: the service does not respond, or `stop` was set; the partial download
                is kept for the next time.
            ServiceError, IdentityError: the service cannot be used, or refuses the device.
        """
        stop = stop or threading.Event()
        try:
            if not self._is_complete():
                self._download(stop)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._no_room(error.strerror) from None
            raise BundleError(
                f"cannot write bundle {self._bundle_id} below {self._folder.parent}: "
                f"{error.strerror or error}; the present one goes on"
            ) from None
        return self._folder

    def _is_complete(self) -> bool:
        if not self._folder.is_dir():
            return False
        try:
            check_device_bundle(self._folder, self._bundle_id, self._ca)
        except BundleError as error:
            log.warning("%s; it is downloaded again", error)
            return False
        return True

    def _download(self, stop: threading.Event) -> None:
        self._prepare()
        entries = device_files(self._manifest())
        self._num_bytes = sum(entry.num_bytes for entry in entries)
        self._num_bytes_done = 0
        self._check_room(entries)
        for entry in entries:
            self._download_file(entry, stop)
            self._num_bytes_done += entry.num_bytes
            self._progress(self._num_bytes_done, self._num_bytes)
        for side in EDGE_SIDES:
            sync_folder(self._partial / side)
        sync_folder(self._partial)
        self._partial.replace(self._folder)
        sync_folder(self._folder.parent)

    def _prepare(self) -> None:
        """Make the folder of the partial download, from a damaged bundle if there is one."""
        if self._folder.is_dir():
            shutil.rmtree(self._partial, ignore_errors=True)
            self._folder.replace(self._partial)
        for side in EDGE_SIDES:
            (self._partial / side).mkdir(parents=True, exist_ok=True)

    def _manifest(self) -> Manifest:
        self._download_small(MANIFEST_FILE, MAX_MANIFEST_BYTES)
        self._download_small(SIGNATURE_FILE, MAX_SIGNATURE_BYTES)
        manifest = check_manifest(self._partial, self._bundle_id)
        check_signature(self._partial, self._ca)
        return manifest

    def _download_small(self, name: str, max_bytes: int) -> None:
        data = self._service.small_file(self._bundle_id, name, max_bytes)
        write_file(self._partial / name, data, mode=0o644)

    def _check_room(self, entries: list[FileEntry]) -> None:
        missing = self._num_bytes - sum(size(self._partial / entry.path) for entry in entries)
        if shutil.disk_usage(self._partial).free < missing:
            raise self._no_room(f"{missing / 1e6:.0f} MB are missing")

    def _no_room(self, reason: str | None) -> BundleError:
        free = shutil.disk_usage(self._folder.parent.parent).free
        return BundleError(
            f"no room for bundle {self._bundle_id} below {self._folder.parent}: {reason}, "
            f"{free / 1e6:.0f} MB are free; make room; the present bundle goes on"
        )

    def _download_file(self, entry: FileEntry, stop: threading.Event) -> None:
        """Download a missing file. Download it again if it is complete but damaged."""
        path = self._partial / entry.path
        for _ in range(NUM_TRIES):
            self._complete(entry, path, stop)
            try:
                check_file(self._partial, entry)
                return
            except BundleError:
                path.unlink(missing_ok=True)
                log.warning("%s of bundle %s is damaged", entry.path, self._bundle_id)
        raise BundleError(
            f"{entry.path} of bundle {self._bundle_id} arrived damaged {NUM_TRIES} times: "
            f"expected sha256 {entry.sha256[:16]}...; add the bundle to the fleet again"
        )

    def _complete(self, entry: FileEntry, path: Path, stop: threading.Event) -> None:
        """Download the rest of a file, from the byte at which the last connection was cut."""
        num_cuts = 0
        while size(path) < entry.num_bytes or not path.exists():
            previous_size = size(path)
            try:
                self._append(entry, path, stop)
            except ServiceAwayError as error:
                num_cuts = 0 if size(path) > previous_size else num_cuts + 1
                pause_s = max(backoff_s(num_cuts, 0.5), error.retry_after_s)
                if num_cuts >= MAX_CUTS or stop.wait(pause_s):
                    raise

    def _append(self, entry: FileEntry, path: Path, stop: threading.Event) -> None:
        with (
            self._service.file(self._bundle_id, entry.path, size(path)) as (start, chunks),
            path.open("ab") as file,
        ):
            file.truncate(start)
            num_bytes = start
            for chunk in chunks:
                if stop.is_set():
                    raise ServiceAwayError(
                        f"the download of bundle {self._bundle_id} was stopped and goes on later"
                    )
                # A file that is too long has another hash.
                num_bytes += file.write(chunk[: entry.num_bytes - num_bytes])
                self._progress(self._num_bytes_done + num_bytes, self._num_bytes)
            file.flush()
            os.fsync(file.fileno())
        if num_bytes < entry.num_bytes:
            raise ServiceAwayError(
                f"{entry.path} ended after {num_bytes} of {entry.num_bytes} bytes"
            )


def fetch_bundle(
    identity: Identity, bundle_id: str, stop: threading.Event, progress: Progress | None = None
) -> Path:
    """Return the folder of a bundle in an identity folder, after downloading it if necessary.

    Raises:
        ConfigError: the identity names no service.
        BundleError, ServiceError, IdentityError: as `BundleDownload.run`.
    """
    with ServiceClient.of(identity) as service:
        bundles = SlotStore(identity.folder).bundles
        ca = identity.folder / CA_FILE
        return BundleDownload(service, bundle_id, bundles, ca, progress).run(stop)


def check_device_bundle(folder: Path, bundle_id: str, ca: Path) -> None:
    """Raise BundleError unless `folder` has every file that a device needs, as signed."""
    manifest = check_manifest(folder, bundle_id)
    check_signature(folder, ca)
    for entry in device_files(manifest):
        check_file(folder, entry)


def check_manifest(folder: Path, bundle_id: str) -> Manifest:
    """Return the manifest in `folder`.

    Raises:
        BundleError: it is missing, malformed, or another bundle's.
    """
    manifest = read_manifest(folder)
    if manifest.bundle_id != bundle_id:
        raise BundleError(
            f"expected the manifest of bundle {bundle_id}, got that of {manifest.bundle_id}; "
            "add it to the fleet again"
        )
    return manifest


def device_files(manifest: Manifest) -> list[FileEntry]:
    """Return the files of a bundle that a device needs."""
    return [entry for entry in manifest.files if entry.path.split("/")[0] in EDGE_SIDES]


def size(path: Path) -> int:
    """Return the number of bytes of a file, or 0 if it is missing."""
    return path.stat().st_size if path.exists() else 0
