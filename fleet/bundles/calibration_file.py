"""Files of calibrated thresholds: in a bundle's manifest, or kept for the next export."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from fleet.bundles.manifest import MANIFEST_FILE, Bundle, Manifest, write_manifest
from fleet.bundles.signature import SIGNATURE_FILE
from fleet.errors import BundleError, ConfigError
from fleet.exits.calibration import Calibration
from fleet.utils.cli_runtime import check_free
from fleet.utils.text_files import read_json


class KeptCalibration(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Thresholds with their calibration; they hold for these exits and heads only."""

    exits: tuple[int, ...]
    quantization: str
    heads_sha256: str
    thresholds: tuple[float, ...]
    calibration: Calibration

    def fits(self, exits: Sequence[int], quantization: str, heads_sha256: str) -> bool:
        """Whether the thresholds hold for this edge partition."""
        own = (self.exits, self.quantization, self.heads_sha256)
        return own == (tuple(exits), quantization, heads_sha256)


def keep_calibration(manifest: Manifest, path: Path) -> None:
    """Write a calibrated bundle's thresholds to `path`, for later exports of the same heads.

    Raises:
        BundleError: the bundle is not calibrated.
    """
    if manifest.calibration is None:
        raise BundleError(
            f"bundle {manifest.bundle_id} is not calibrated; run 'fleet heads calibrate'"
        )
    kept = KeptCalibration(
        exits=manifest.exits,
        quantization=manifest.quantization,
        heads_sha256=manifest.heads_sha256,
        thresholds=manifest.thresholds,
        calibration=manifest.calibration,
    )
    path.write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=2) + b"\n")


def read_calibration(path: Path) -> KeptCalibration:
    """Read a file of :func:`keep_calibration`.

    Raises:
        ConfigError: the file is missing or has another content.
    """
    kept: KeptCalibration = read_json(
        path, KeptCalibration, "make a calibration with 'fleet heads calibrate --write'"
    )
    return kept


def find_calibration(
    paths: Iterable[Path], exits: Sequence[int], quantization: str, heads_sha256: str
) -> KeptCalibration | None:
    """Return the first calibration that fits this edge partition, or None."""
    for path in sorted(paths):
        kept = read_calibration(path)
        if kept.fits(exits, quantization, heads_sha256):
            return kept
    return None


def write_calibrated(
    bundle: Bundle, thresholds: tuple[float, ...], calibration: Calibration, out: Path | None = None
) -> Manifest:
    """Write thresholds into the bundle's manifest, or into that of a copy in `out`.

    The bundle's id changes, so devices and workers both need the new bundle; a signature is
    dropped. Return the new manifest.

    Raises:
        ConfigError: `out` is in use, or the disk is full.
    """
    manifest = msgspec.structs.replace(
        bundle.manifest, thresholds=thresholds, calibration=calibration
    )
    if out is not None:
        check_free(out)
    try:
        if out is None:
            write_manifest(bundle.folder, manifest)
            (bundle.folder / SIGNATURE_FILE).unlink(missing_ok=True)
        else:
            _copy_with_manifest(bundle.folder, manifest, out)
    except (OSError, shutil.Error) as error:
        raise ConfigError(
            f"cannot write the calibrated bundle {out or bundle.folder}: {error}; make room"
        ) from error
    return manifest


def _copy_with_manifest(folder: Path, manifest: Manifest, out: Path) -> None:
    """Copy a bundle with another manifest, complete or not at all."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(
            folder,
            partial,
            copy_function=_link_or_copy,
            ignore=shutil.ignore_patterns(MANIFEST_FILE, SIGNATURE_FILE),
        )
        write_manifest(partial, manifest)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    """Make a hard link, or a copy on a file system without links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
