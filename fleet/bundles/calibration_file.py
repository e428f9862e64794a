"""Calibrated thresholds on their way into bundles: written into one, or kept in a file for the next export."""

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


class KeptCalibration(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Thresholds and how they were found, with what they hold for: these exits, heads and quantization alone."""

    exits: tuple[int, ...]
    quantization: str
    heads_sha256: str
    thresholds: tuple[float, ...]
    calibration: Calibration

    def fits(self, exits: Sequence[int], quantization: str, heads_sha256: str) -> bool:
        """Whether it was made for such an edge."""
        return (self.exits, self.quantization, self.heads_sha256) == (
            tuple(exits),
            quantization,
            heads_sha256,
        )


def keep_calibration(manifest: Manifest, path: Path) -> None:
    """Writes a calibrated bundle's thresholds for later exports of the same heads.

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
    """Raises ConfigError when the file is not one of :func:`keep_calibration`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=KeptCalibration)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the calibration {path}: {error}; make one with 'fleet heads calibrate --write'"
        ) from None


def find_calibration(
    paths: Iterable[Path], exits: Sequence[int], quantization: str, heads_sha256: str
) -> KeptCalibration | None:
    """The first of some files that was made for such an edge, or None."""
    kept = (read_calibration(path) for path in sorted(paths))
    return next((one for one in kept if one.fits(exits, quantization, heads_sha256)), None)


def write_calibrated(
    bundle: Bundle, thresholds: tuple[float, ...], calibration: Calibration, out: Path | None = None
) -> Manifest:
    """Puts thresholds into the bundle's manifest, or into that of a copy in `out`; gives the new manifest.

    The bundle's id changes with them, so devices and workers must both get it; a signature is dropped.

    Raises:
        ConfigError: `out` is in use, or there is no room.
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
            copy_with(bundle.folder, manifest, out)
    except (OSError, shutil.Error) as error:
        raise ConfigError(
            f"cannot write the calibrated bundle {out or bundle.folder}: {error}; make room"
        ) from error
    return manifest


def copy_with(folder: Path, manifest: Manifest, out: Path) -> None:
    """A copy of a bundle with another manifest, whole or not at all."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(
            folder,
            partial,
            copy_function=link_or_copy,
            ignore=shutil.ignore_patterns(MANIFEST_FILE, SIGNATURE_FILE),
        )
        write_manifest(partial, manifest)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def link_or_copy(source: str, target: str) -> None:
    """A hard link where the file system has them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
