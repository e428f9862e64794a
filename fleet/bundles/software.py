"""A version of the devices' software: its wheel, with a manifest that the fleet signs.

The store of a server has a folder for each version, named by it, complete or absent.
"""

from __future__ import annotations

import email
import hashlib
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct
from packaging.metadata import Metadata
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from fleet.bundles.manifest import MANIFEST_FILE, hash_file
from fleet.bundles.signature import is_signed
from fleet.errors import ConfigError, SoftwareError
from fleet.protocol.types import SoftwareVersion
from fleet.utils.atomic_files import write_file
from fleet.utils.text_files import read_json

DISTRIBUTION: Final = "cecollm-fleet"
PURE_TAG: Final = "py3-none-any"
SOFTWARE_SCHEMA: Final = 1
MAX_WHEEL_BYTES: Final = 64 << 20
ZIP_ERRORS: Final = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError)
"""Errors of a damaged archive; RuntimeError of one that is encrypted or packed in another way."""


class SoftwareManifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of `manifest.json` of a version; `wheel` is the file name."""

    software_schema: int
    version: SoftwareVersion
    wheel: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_.+-]{1,200}\.whl\Z")]
    num_bytes: Annotated[int, Meta(ge=1, le=MAX_WHEEL_BYTES)]
    sha256: str


def keep_software(
    wheel: Path, store: Path, sign: Callable[[Path], None], *, name: str | None = None
) -> SoftwareManifest:
    """Copy a wheel into `store`, signed by `sign(folder)`, unless it is there.

    `name` is the file name of the wheel where that of `wheel` is another.

    Raises:
        SoftwareError: it is not a wheel of this project, or the store has another one of its
            version.
        ConfigError: `store` cannot be written.
    """
    metadata = read_wheel(wheel, name)
    _check_limits(wheel, str(metadata.version))
    manifest = SoftwareManifest(
        software_schema=SOFTWARE_SCHEMA,
        version=str(metadata.version),
        wheel=name or wheel.name,
        num_bytes=wheel.stat().st_size,
        sha256=hash_file(wheel),
    )
    folder = store / manifest.version
    if folder.is_dir():
        _check_same(folder, manifest)
        return manifest
    try:
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=store, prefix=".new-") as temporary:
            content = Path(temporary) / "software"
            content.mkdir()
            shutil.copyfile(wheel, content / manifest.wheel)
            write_file(content / MANIFEST_FILE, msgspec.json.encode(manifest), mode=0o644)
            sign(content)
            content.rename(folder)
    except OSError as error:
        raise ConfigError(
            f"cannot keep version {manifest.version} in {store}: {error.strerror or error}; "
            "make room, or check the folder's rights"
        ) from None
    return manifest


def _check_limits(wheel: Path, version: str) -> None:
    """Raise SoftwareError for a version or a size that no manifest can have."""
    if not is_version(version):
        raise SoftwareError(
            f"{wheel}: version {version[:80]}: expected at most 63 digits, lower-case letters, "
            "dots and plus signs, without an epoch; give the wheel such a version"
        )
    num_bytes = wheel.stat().st_size
    if num_bytes > MAX_WHEEL_BYTES:
        raise SoftwareError(
            f"{wheel}: expected a wheel of at most {MAX_WHEEL_BYTES:,} bytes, got {num_bytes:,}; "
            "leave out files that devices do not need"
        )


def _check_same(folder: Path, new: SoftwareManifest) -> None:
    """Raise SoftwareError unless the version in `folder` has the wheel of `new`."""
    try:
        kept = read_software(folder)
    except SoftwareError as error:
        raise SoftwareError(f"{error}; delete this folder first") from None
    if kept.sha256 != new.sha256:
        raise SoftwareError(
            f"the fleet has another wheel of version {new.version} (sha256 "
            f"{kept.sha256[:16]}..., expected {new.sha256[:16]}...); give the wheel a new version"
        )


def find_software(store: Path, version: str) -> Path | None:
    """Return the folder of a version in a store, or None if the store does not have it."""
    return store / version if version in kept_versions(store) else None


def kept_versions(store: Path) -> list[str]:
    """Return the versions in a store, oldest first. Other files and folders do not count."""
    if not store.is_dir():
        return []
    names = (path.name for path in store.iterdir() if path.is_dir())
    return sorted(filter(is_version, names), key=Version)


def is_version(text: str) -> bool:
    """Return whether a text is a version as a manifest names it, such as ``0.2.0``."""
    try:
        msgspec.convert(text, SoftwareVersion)
        return str(Version(text)) == text
    except (msgspec.ValidationError, InvalidVersion):
        return False


def read_software(folder: Path) -> SoftwareManifest:
    """Read the manifest in `folder`.

    Raises:
        SoftwareError: the manifest is missing or not usable.
    """
    try:
        manifest: SoftwareManifest = read_json(
            folder / MANIFEST_FILE, SoftwareManifest, "add it with 'fleet update add WHEEL'"
        )
    except ConfigError as error:
        raise SoftwareError(f"no usable software in {folder}: {error}") from None
    if manifest.software_schema != SOFTWARE_SCHEMA:
        raise SoftwareError(
            f"{folder / MANIFEST_FILE}: expected schema {SOFTWARE_SCHEMA}, "
            f"got {manifest.software_schema}; install this version with pip"
        )
    return manifest


def check_software(folder: Path, version: str, ca: Path) -> SoftwareManifest:
    """Return the manifest of `version` in `folder`, signed by the key in the PEM file `ca`.

    Raises:
        SoftwareError: it is not usable, another key signed it, or it is another version's.
    """
    if not is_signed(folder, ca):
        raise SoftwareError(
            f"version {version} is not signed by this fleet: its manifest was altered, or another "
            "key signed it; add its wheel to the fleet again"
        )
    manifest = read_software(folder)
    if manifest.version != version:
        raise SoftwareError(
            f"expected the manifest of version {version}, got that of {manifest.version}; "
            "add its wheel to the fleet again"
        )
    return manifest


def check_wheel_bytes(data: bytes, manifest: SoftwareManifest) -> None:
    """Raise SoftwareError unless `data` is the wheel of a manifest."""
    sha256 = hashlib.sha256(data).hexdigest()
    if (len(data), sha256) != (manifest.num_bytes, manifest.sha256):
        raise SoftwareError(
            f"{manifest.wheel} arrived damaged: expected {manifest.num_bytes} bytes with sha256 "
            f"{manifest.sha256[:16]}..., got {len(data)} with {sha256[:16]}...; "
            "add the wheel to the fleet again"
        )


def read_wheel(path: Path, name: str | None = None) -> Metadata:
    """Return the metadata of one of our wheels.

    `name` is its file name where that of `path` is another.

    Raises:
        SoftwareError: the wheel is not for every machine, or is of another distribution.
    """
    name = name or path.name
    try:
        with zipfile.ZipFile(path) as wheel:
            _check_members(wheel)
            metadata = _read_metadata(wheel)
            tags = _read_tags(wheel)
    except (*ZIP_ERRORS, OSError, KeyError, ValueError) as error:
        raise SoftwareError(f"{path} is no usable wheel: {error}; build it again") from None
    if canonicalize_name(metadata.name) != DISTRIBUTION:
        raise SoftwareError(f"{name}: expected a wheel of {DISTRIBUTION}, got {metadata.name}")
    if tags != [PURE_TAG]:
        raise SoftwareError(
            f"{name}: expected {DISTRIBUTION} {metadata.version} with the tag {PURE_TAG}, "
            f"got {', '.join(tags)[:80] or 'none'}; build it with 'python -m build --wheel'"
        )
    if not _is_named(name, metadata.version):
        own_name = f"{DISTRIBUTION.replace('-', '_')}-{metadata.version}-{PURE_TAG}.whl"
        raise SoftwareError(f"{name}: expected the wheel's own name; rename it to {own_name}")
    return metadata


def _is_named(name: str, version: Version) -> bool:
    """Whether the name of a file is that of a wheel of this project and version."""
    try:
        distribution, named_version, _, tags = parse_wheel_filename(name)
    except InvalidWheelFilename:
        return False
    is_pure = [str(tag) for tag in tags] == [PURE_TAG]
    return is_pure and (distribution, named_version) == (DISTRIBUTION, version)


def _check_members(wheel: zipfile.ZipFile) -> None:
    """Raise an error of `ZIP_ERRORS` unless each file can be unpacked and has its checksum."""
    damaged = wheel.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"its file {damaged[:200]!r} is damaged")


def _read_tags(wheel: zipfile.ZipFile) -> list[str]:
    """Read the tags in the file WHEEL. Raises KeyError when the archive has no such file."""
    names = [name for name in wheel.namelist() if name.endswith(".dist-info/WHEEL")]
    if len(names) != 1:
        raise KeyError(f"expected one WHEEL, got {len(names)}")
    return email.message_from_bytes(wheel.read(names[0])).get_all("Tag", [])


def _read_metadata(wheel: zipfile.ZipFile) -> Metadata:
    """Read the metadata. Raises KeyError or ValueError when they are missing or malformed."""
    names = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    if len(names) != 1:
        raise ValueError(f"expected one METADATA, got {len(names)}")
    if any(".data/" in name for name in wheel.namelist()):
        raise ValueError("it has files outside the packages")
    try:
        return Metadata.from_email(wheel.read(names[0]))
    except ExceptionGroup as error:  # of packaging.metadata.InvalidMetadata
        raise ValueError(f"bad metadata: {error.exceptions[0]}") from None
