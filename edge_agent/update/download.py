"""A bundle from the fleet's service onto the disk: resumed where it was cut off, and nothing taken on trust."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from edge_agent.service_client import ServiceClient
from edge_agent.state.bundle_slots import SlotStore, partial_name
from fleet.bundles.manifest import MANIFEST_FILE, FileEntry, Manifest, check_file, read_manifest
from fleet.bundles.signature import SIGNATURE_FILE, check_signature
from fleet.errors import BundleError, ServiceAwayError
from fleet.identity.identity import CA_FILE, Identity
from fleet.utils.atomic_files import sync_folder, write_file
from fleet.utils.backoff import backoff_s

MAX_MANIFEST_BYTES: Final = 4 << 20
MAX_SIGNATURE_BYTES: Final = 4096
MAX_CUTS: Final = 5  # in a row without one new byte
NUM_TRIES: Final = 2  # of a file that came whole and damaged
SIDES: Final = ("edge", "tokenizer")

Progress = Callable[[int, int], None]

log = logging.getLogger(__name__)


class BundleDownload:
    """One bundle into `bundles`/<id>, which appears there whole or not at all; what is half done is kept beside it.

    `ca` is the file with the certificate whose key has to have signed it. `progress` is told bytes that are here and
    bytes of all.
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

    def run(self, stop: threading.Event | None = None) -> Path:
        """The bundle's folder, with every file of a device in it checked.

        Raises:
            BundleError: what came is not the bundle, or not signed by the fleet, or damaged twice; or the disk is full.
            ServiceAwayError: the service does not answer, or `stop` was set; what is here is kept for the next time.
            ServiceError, IdentityError: the service cannot be used, or refuses us.
        """
        stop = stop or threading.Event()
        try:
            if self._folder.is_dir() and self._is_whole():
                return self._folder
            self._prepare()
            manifest = self._manifest()
            entries = [entry for entry in manifest.files if entry.path.split("/")[0] in SIDES]
            self._check_room(entries)
            for done, entry in enumerate(entries):
                self._take(
                    entry,
                    sum(each.num_bytes for each in entries[:done]),
                    total_bytes(entries),
                    stop,
                )
            for folder in (*(self._partial / side for side in SIDES), self._partial):
                sync_folder(folder)
            self._partial.replace(self._folder)
            sync_folder(self._folder.parent)
        except OSError as error:
            raise (
                self._no_room(error.strerror)
                if error.errno in (errno.ENOSPC, errno.EDQUOT)
                else BundleError(
                    f"cannot write bundle {self._bundle_id} below {self._folder.parent}: {error.strerror or error}; "
                    "the present one goes on"
                )
            ) from None
        return self._folder

    def _is_whole(self) -> bool:
        try:
            check_bundle(self._folder, self._bundle_id, self._ca)
        except BundleError as error:
            log.warning("%s; it is fetched again", error)
            return False
        return True

    def _prepare(self) -> None:
        """What is damaged in a bundle that was whole is mended like what is missing in one that was cut off."""
        if self._folder.is_dir():
            shutil.rmtree(self._partial, ignore_errors=True)
            self._folder.replace(self._partial)
        for side in SIDES:
            (self._partial / side).mkdir(parents=True, exist_ok=True)

    def _manifest(self) -> Manifest:
        for name, limit in (
            (MANIFEST_FILE, MAX_MANIFEST_BYTES),
            (SIGNATURE_FILE, MAX_SIGNATURE_BYTES),
        ):
            data = self._service.small_file(self._bundle_id, name, limit)
            write_file(self._partial / name, data, mode=0o644)
        manifest = check_manifest(self._partial, self._bundle_id)
        check_signature(self._partial, self._ca)
        return manifest

    def _check_room(self, entries: list[FileEntry]) -> None:
        here = sum(size(self._partial / entry.path) for entry in entries)
        if shutil.disk_usage(self._partial).free < total_bytes(entries) - here:
            raise self._no_room(f"{(total_bytes(entries) - here) / 1e6:.0f} MB are missing")

    def _no_room(self, reason: str | None) -> BundleError:
        free = shutil.disk_usage(self._folder.parent.parent).free
        return BundleError(
            f"no room for bundle {self._bundle_id} below {self._folder.parent}: {reason}, {free / 1e6:.0f} MB are "
            "free; make room; the present bundle goes on"
        )

    def _take(self, entry: FileEntry, done: int, total: int, stop: threading.Event) -> None:
        """Brings one file here, unless it is; one that is wrong when it is complete is fetched again once."""
        path = self._partial / entry.path
        for is_last in (False, True):
            self._complete(entry, path, done, total, stop)
            try:
                check_file(self._partial, entry)
            except BundleError:
                path.unlink(missing_ok=True)
                if is_last:
                    raise BundleError(
                        f"{entry.path} of bundle {self._bundle_id} came damaged {NUM_TRIES} times: expected sha256 "
                        f"{entry.sha256[:16]}...; add the bundle to the fleet again"
                    ) from None
                log.warning(
                    "%s of bundle %s came damaged; it is fetched again", entry.path, self._bundle_id
                )
            else:
                self._progress(done + entry.num_bytes, total)
                return

    def _complete(
        self, entry: FileEntry, path: Path, done: int, total: int, stop: threading.Event
    ) -> None:
        """Fetches what is missing of a file, from the byte where the last connection was cut."""
        num_cuts = 0
        while size(path) < entry.num_bytes or not path.exists():
            before = size(path)
            try:
                self._append(entry, path, lambda here: self._progress(done + here, total), stop)
            except ServiceAwayError as error:
                num_cuts = 0 if size(path) > before else num_cuts + 1
                if num_cuts >= MAX_CUTS or stop.wait(
                    max(backoff_s(num_cuts, 0.5), error.retry_after_s)
                ):
                    raise

    def _append(
        self, entry: FileEntry, path: Path, tell: Callable[[int], None], stop: threading.Event
    ) -> None:
        with (
            self._service.file(self._bundle_id, entry.path, size(path)) as (start, pieces),
            path.open("ab") as file,
        ):
            file.truncate(start)
            here = start
            for piece in pieces:
                if stop.is_set():
                    raise ServiceAwayError(
                        f"the download of bundle {self._bundle_id} was stopped and goes on later"
                    )
                here += file.write(
                    piece[: entry.num_bytes - here]
                )  # of what is too long the hash is wrong
                tell(here)
            file.flush()
            os.fsync(file.fileno())
        if here < entry.num_bytes:
            raise ServiceAwayError(f"{entry.path} ended after {here} of {entry.num_bytes} bytes")


def fetch_bundle(
    identity: Identity, bundle_id: str, stop: threading.Event, progress: Progress | None = None
) -> Path:
    """The folder of a bundle among an identity's, fetched from its fleet's service unless it is there and whole.

    Raises what :meth:`BundleDownload.run` raises, and ConfigError when the identity names no service.
    """
    with ServiceClient.of(identity) as service:
        bundles = SlotStore(identity.folder).bundles
        return BundleDownload(service, bundle_id, bundles, identity.folder / CA_FILE, progress).run(
            stop
        )


def check_bundle(folder: Path, bundle_id: str, ca: Path) -> None:
    """Raises BundleError unless all that a device needs of the bundle is in `folder`, as its signed manifest says."""
    manifest = check_manifest(folder, bundle_id)
    check_signature(folder, ca)
    for entry in manifest.files:
        if entry.path.split("/")[0] in SIDES:
            check_file(folder, entry)


def check_manifest(folder: Path, bundle_id: str) -> Manifest:
    """The manifest in `folder`; raises BundleError when it is another bundle's."""
    manifest = read_manifest(folder)
    if manifest.bundle_id != bundle_id:
        raise BundleError(
            f"expected the manifest of bundle {bundle_id}, got that of {manifest.bundle_id}; add it to the fleet again"
        )
    return manifest


def total_bytes(entries: list[FileEntry]) -> int:
    return sum(entry.num_bytes for entry in entries)


def size(path: Path) -> int:
    """Bytes of a file; 0 when it is not there."""
    return path.stat().st_size if path.exists() else 0
