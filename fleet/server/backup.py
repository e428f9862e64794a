"""A fleet in one file: its folder and its registry, copied while the fleet runs."""

from __future__ import annotations

import fcntl
import gzip
import io
import os
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from fleet.bundles.manifest import MANIFEST_FILE
from fleet.errors import ConfigError
from fleet.identity.identity import CA_FILE
from fleet.server.home import FLEET_FILE, REGISTRY_FILE, FleetConfig, FleetHome, bundle_id_of
from fleet.utils.atomic_files import made_folder, sync_folder
from fleet.utils.optional_imports import needs
from fleet.utils.text_files import decode_json
from fleet.version import __version__
from provisioning.authority import CA_KEY_FILE

INFO_FILE: Final = "backup.json"  # the first member
DUMP_FILE: Final = "registry.backup"
LOCK_FILE: Final = "lock"
BUNDLES: Final = "bundles"
NAME: Final = "fleet-{fleet}-{time}.tar.gz"
TIME: Final = "%Y-%m-%dT%H%M%SZ"
ANY_TIME: Final = "????-??-??T??????Z"  # of a glob
FLEET_DIGITS: Final = 8
GZIP_MAGIC: Final = b"\x1f\x8b"
END_BYTES: Final = 1024  # zeros at the end of an archive of tar
COMPRESSION: Final = 1  # most of a backup is a model, which hardly gets smaller
CHUNK_BYTES: Final = 1 << 20


class BackupInfo(Struct, frozen=True, kw_only=True):
    """The first member of a backup; `bundle_id` is that of the bundle that the fleet serves."""

    format: Literal[1] = 1
    version: str
    created_at: float
    bundle_id: str | None


def back_up(home: FleetHome, file: Path, *, bundles: bool = False) -> Path:
    """Write a backup to the new file `file`; if that is a folder, to a new file in this folder,
    with the fleet and the time in its name.

    The file (mode 0600) appears complete or not at all. It holds the authority's key.

    Raises:
        ConfigError: the file exists, or cannot be written, or there is no authority.
        RegistryError: the registry cannot be copied.
    """
    now = time.strftime(TIME, time.gmtime())
    _check_authority(home.ca_folder, "restore its files, or mount their disk")
    path = file / _name(home, now) if file.is_dir() else file
    if path.exists():
        raise _exists(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            archive = Path(folder) / "archive"
            _write_archive(home, archive, bundles=bundles)
            _place(archive, path)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise ConfigError(
            f"cannot write the backup {path}: {error.strerror or error}; make room, "
            "or name another file"
        ) from None
    return path


def remove_old_backups(home: FleetHome, newest: Path, num_kept: int) -> list[Path]:
    """Remove backups of this fleet next to `newest`, which `back_up` has just written and named.

    `num_kept` are kept: `newest`, and those of the latest times before it. A backup of a later time
    was made while a clock was wrong, now or then, and counts as older than all others.
    """
    others = {*newest.parent.glob(_name(home, ANY_TIME))} - {newest}
    by_age = sorted(others, key=lambda path: (path.name < newest.name, path.name), reverse=True)
    old = by_age[num_kept - 1 :]
    for path in old:
        path.unlink()
    return sorted(old)


def restore_backup(file: Path, folder: Path, registry: str | None = None) -> FleetHome:
    """Restore a backup into a new or empty folder; `registry` is the URL of the new database.

    `fleet.json` appears last: without it there is no fleet in the folder.

    Raises:
        ConfigError: the file is no backup, is damaged or has no authority, or the folder is not
            empty.
        RegistryError: the database is not empty, or cannot be reached.
    """
    if not file.is_file():
        raise ConfigError(f"{file} is not a file; name one that 'fleet backup' wrote")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; restore into a new folder, with --home")
    try:
        with (
            made_folder(folder),
            tempfile.TemporaryDirectory(dir=folder, prefix=".restore-") as temporary,
        ):
            _restore_into(folder, file, Path(temporary), registry)
    except OSError as error:
        raise ConfigError(
            f"cannot restore {file} into {folder}: {error.strerror or error}"
        ) from None
    return FleetHome.load(folder)


def _name(home: FleetHome, at: str) -> str:
    """Return the name of a backup; digits of the authority's hash tell fleets apart."""
    return NAME.format(fleet=home.ca_sha256()[:FLEET_DIGITS], time=at)


def _exists(path: Path) -> ConfigError:
    return ConfigError(f"{path} exists; a backup replaces no file, so name another one")


def _place(archive: Path, path: Path) -> None:
    """Give a complete archive its name, unless there is a file of that name."""
    try:
        os.link(archive, path)
    except FileExistsError:
        raise
    except OSError:  # a disk without links, such as many USB sticks
        if path.exists():
            raise FileExistsError from None
        archive.rename(path)
    sync_folder(path.parent)


def _write_archive(home: FleetHome, archive: Path, *, bundles: bool) -> None:
    with needs("server"):
        from fleet.registry.backup import dump_registry
    info = BackupInfo(
        version=__version__,
        created_at=time.time(),
        bundle_id=bundle_id_of(Path(home.config.bundle)),
    )
    dump = archive.with_name(DUMP_FILE)
    with archive.open("xb") as file:
        os.fchmod(file.fileno(), 0o600)
        with (
            gzip.GzipFile("", "wb", COMPRESSION, file) as stream,
            tarfile.open(fileobj=stream, mode="w|", dereference=True) as tar,
        ):
            _add_bytes(tar, INFO_FILE, msgspec.json.encode(info))
            with _lock(home.folder):
                dump_registry(home.registry_url, dump)
                tar.add(dump, DUMP_FILE)
                for path in _files(home.folder, bundles=bundles):
                    tar.add(path, str(path.relative_to(home.folder)))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the lock with which other processes enrol the fleet's own identities."""
    with (folder / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _files(folder: Path, *, bundles: bool) -> Iterator[Path]:
    """Yield the files of a fleet's folder, but no registry, lock, or file that is being written.

    Backups in the folder are left out, too: otherwise each one would hold all earlier ones.
    Without `bundles`, leave out each folder of a bundle, too: the registry has the bundle's id. A
    link counts as the file or the folder to which it leads, such as an authority on another disk.
    """
    models = set() if bundles else _bundle_folders(folder)
    for path in sorted(_walk(folder)):
        parts = path.relative_to(folder).parts
        is_left_out = (
            any(part.startswith(".") or part == LOCK_FILE for part in parts)
            or parts[0].startswith(REGISTRY_FILE)
            or (parts[0] == BUNDLES and not bundles)
            or not models.isdisjoint(path.parents)
        )
        if not is_left_out and path.is_file() and not _is_backup(path):
            yield path


def _walk(folder: Path) -> Iterator[Path]:
    """Yield every path in a folder; a link to a folder around it is not followed."""
    for name, folders, files in os.walk(folder, followlinks=True):
        path = Path(name)
        if path != folder and path.resolve() in {each.resolve() for each in path.parents}:
            folders.clear()
            continue
        yield from (path / file for file in files)


def _is_backup(path: Path) -> bool:
    """Whether a file begins as `back_up` writes it, whatever its name is now."""
    try:
        with _open_archive(path) as stream:
            return stream.read(len(INFO_FILE)) == INFO_FILE.encode()
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return False


def _open_archive(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """Open a backup; it may be without gzip, as some browsers keep it."""
    with path.open("rb") as file:
        is_packed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    return gzip.open(path) if is_packed else path.open("rb")


def _bundle_folders(folder: Path) -> set[Path]:
    manifests = [path for path in _walk(folder) if path.name == MANIFEST_FILE]
    return {path.parent for path in manifests if bundle_id_of(path.parent) is not None}


def _add_bytes(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _restore_into(folder: Path, file: Path, content: Path, registry: str | None) -> None:
    """Restore into `folder` by way of `content`, a new folder in it."""
    info = _extract(file, content)
    dump = content / DUMP_FILE
    config = _read_config(content, file)
    _check_authority(content / "ca", f"{file} is not complete: restore another backup")
    if registry and not config.registry:
        raise ConfigError(f"the registry in {file} is a SQLite file; leave --registry out")
    config = msgspec.structs.replace(config, registry=registry or config.registry)
    _load_registry(FleetHome(content, config), dump)
    own = Path(BUNDLES) / (info.bundle_id or "")
    if bundle_id_of(Path(config.bundle)) != info.bundle_id and bundle_id_of(content / own):
        config = msgspec.structs.replace(config, bundle=str(folder.absolute() / own))
    dump.unlink()
    (content / INFO_FILE).unlink()
    FleetHome(content, config).save()
    names = sorted(path.name for path in content.iterdir())
    for name in sorted(names, key=lambda name: name == FLEET_FILE):  # that file last
        (content / name).rename(folder / name)
    sync_folder(folder)


def _check_authority(folder: Path, advice: str) -> None:
    """Check that a fleet has its authority: with a new one, no device could connect again."""
    for name in (CA_FILE, CA_KEY_FILE):
        if not (folder / name).is_file():
            raise ConfigError(f"the fleet's authority has no {folder / name}; {advice}")


def _load_registry(home: FleetHome, dump: Path) -> None:
    with needs("server"):
        from fleet.registry.backup import load_registry
    load_registry(dump, home.registry_url)
    home.registry().close()  # migrates the registry, or refuses that of a newer version


def _read_config(content: Path, file: Path) -> FleetConfig:
    config: FleetConfig = _read_member(content, file, FLEET_FILE, FleetConfig)
    return config


def _read_member(content: Path, file: Path, name: str, type_: Any) -> Any:
    """Read JSON that was extracted from `file`. Raises ConfigError, which names this backup."""
    try:
        return decode_json((content / name).read_bytes(), name, type_)
    except FileNotFoundError:
        raise ConfigError(f"{file} is no backup of a fleet: it has no {name}") from None
    except ConfigError as error:
        raise ConfigError(f"{file} is no backup that this version reads: {error}") from None


def _extract(file: Path, content: Path) -> BackupInfo:
    """Extract every file of a backup (mode 0600) into a folder, and check the backup's checksum.

    Raises:
        ConfigError: the file is damaged, or no backup that this version can read.
    """
    try:
        with _open_archive(file) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    _extract_member(tar, member, content)
            while stream.read(CHUNK_BYTES):  # to the end, where the checksum is
                pass
            if not isinstance(stream, gzip.GzipFile):
                _check_end(stream)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"{file} is damaged, or no backup of a fleet: {error}") from None
    info: BackupInfo = _read_member(content, file, INFO_FILE, BackupInfo)
    return info


def _check_end(stream: io.BufferedReader) -> None:
    """Check the zeros at the end of a file without a checksum. Raises TarError if it is cut off."""
    stream.seek(-END_BYTES, os.SEEK_END)
    if any(stream.read()):
        raise tarfile.TarError("its end is missing")


def _extract_member(tar: tarfile.TarFile, member: tarfile.TarInfo, content: Path) -> None:
    name = PurePosixPath(member.name)
    if member.isdir():  # of a backup that was packed again
        return
    if not member.isfile() or name.is_absolute() or ".." in name.parts:
        raise tarfile.TarError(f"unexpected member {member.name!r}")
    source = tar.extractfile(member)
    path = content / name
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as target:
        while source and (chunk := source.read(CHUNK_BYTES)):
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
