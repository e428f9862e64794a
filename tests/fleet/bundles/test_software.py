"""Versions of the devices' software in a server's store, with real wheels of this tree."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fleet.bundles.signature import write_signature
from fleet.bundles.software import (
    SoftwareManifest,
    check_software,
    check_wheel_bytes,
    find_software,
    keep_software,
    kept_versions,
    read_software,
    read_wheel,
)
from fleet.errors import SoftwareError
from tests.wheels import build_wheel

ENTRY = b"PK\x01\x02"  # of the directory at the end of an archive
KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"), "0.9.0")


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """The public key of `KEY` in PEM."""
    path = tmp_path / "key.pem"
    pem = KEY.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    path.write_bytes(pem)
    return path


def keep(wheel: Path, store: Path) -> SoftwareManifest:
    return keep_software(wheel, store, lambda folder: write_signature(folder, KEY))


def changed(wheel: Path, folder: Path, name: str | None = None) -> Path:
    """Return a copy of a wheel with one more file."""
    copy = folder / (name or wheel.name)
    shutil.copyfile(wheel, copy)
    with zipfile.ZipFile(copy, "a") as archive:
        archive.writestr("fleet/more.py", "")
    return copy


def test_a_version_is_kept_signed_and_found_by_its_name(
    wheel: Path, key_file: Path, tmp_path: Path
) -> None:
    store = tmp_path / "software"
    manifest = keep(wheel, store)
    assert manifest.version == "0.9.0"
    assert keep(wheel, store) == manifest
    folder = find_software(store, "0.9.0")
    assert folder is not None
    assert check_software(folder, "0.9.0", key_file) == manifest
    check_wheel_bytes((folder / manifest.wheel).read_bytes(), manifest)
    assert kept_versions(store) == ["0.9.0"]
    assert find_software(store, "0.9.1") is None
    assert find_software(store, "..") is None


def test_another_wheel_of_the_same_version_is_refused(wheel: Path, tmp_path: Path) -> None:
    store = tmp_path / "software"
    manifest = keep(wheel, store)
    with pytest.raises(SoftwareError, match=r"another wheel of version 0\.9\.0"):
        keep(changed(wheel, tmp_path), store)
    assert read_software(store / "0.9.0") == manifest


def test_a_manifest_that_was_altered_or_renamed_is_refused(
    wheel: Path, key_file: Path, tmp_path: Path
) -> None:
    store = tmp_path / "software"
    keep(wheel, store)
    with pytest.raises(SoftwareError, match=r"expected the manifest of version 0\.9\.1"):
        check_software(store / "0.9.0", "0.9.1", key_file)
    manifest = store / "0.9.0" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"0.9.0", b"0.9.9"))
    with pytest.raises(SoftwareError, match="is not signed by this fleet"):
        check_software(store / "0.9.0", "0.9.0", key_file)


def test_bytes_that_are_not_the_wheel_are_refused(wheel: Path, tmp_path: Path) -> None:
    manifest = keep(wheel, tmp_path / "software")
    with pytest.raises(SoftwareError, match="arrived damaged"):
        check_wheel_bytes(wheel.read_bytes()[:-1], manifest)


@pytest.mark.parametrize(
    "name",
    [
        "wheel.whl",
        "notes.txt",
        "cecollm_fleet-0.9.0-py3-none-any (1).whl",
        "other-0.9.0-py3-none-any.whl",
        "cecollm_fleet-0.9.1-py3-none-any.whl",
        "cecollm_fleet-0.9.0-cp311-cp311-linux_x86_64.whl",
    ],
)
def test_a_wheel_under_another_name_is_to_be_renamed(
    wheel: Path, tmp_path: Path, name: str
) -> None:
    words = f"{re.escape(name)}: .*; rename it to {re.escape(wheel.name)}$"
    with pytest.raises(SoftwareError, match=words):
        read_wheel(changed(wheel, tmp_path, name))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("WHEEL", b"py3-none-any", b"cp311-cp311-linux_x86_64", "got cp311-cp311-linux_x86_64; "),
        ("METADATA", b"Name: cecollm-fleet", b"Name: other", "expected a wheel of cecollm-fleet"),
    ],
)
def test_a_wheel_of_another_kind_or_project_is_refused(
    wheel: Path, tmp_path: Path, file: str, old: bytes, new: bytes, message: str
) -> None:
    copy = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(copy, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            is_changed = name.endswith(f".dist-info/{file}")
            target.writestr(name, data.replace(old, new) if is_changed else data)
    with pytest.raises(SoftwareError, match=message):
        read_wheel(copy)


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cecollm_fleet-0.9.0-py3-none-any.whl"
    with pytest.raises(SoftwareError, match="is no usable wheel"):
        read_wheel(path)
    path.write_text("no archive")
    with pytest.raises(SoftwareError, match="is no usable wheel"):
        read_wheel(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cecollm_fleet-0.9.0.dist-info/METADATA", "Name: cecollm-fleet\n")
    with pytest.raises(SoftwareError, match="is no usable wheel"):
        read_wheel(path)


def repacked(wheel: Path, folder: Path, change: Callable[[bytearray, int], None]) -> Path:
    """Return a copy of a wheel; `change` gets its bytes and the place of each file's header."""
    data = bytearray(wheel.read_bytes())
    with zipfile.ZipFile(wheel) as archive:
        places = [each.header_offset for each in archive.infolist()]
        first_entry = archive.start_dir
    for place in places:
        change(data, place)
    entry = data.find(ENTRY, first_entry)
    while entry >= 0:
        change(data, entry + 2)  # this header has one more field of two bytes before the flags
        entry = data.find(ENTRY, entry + 1)
    copy = folder / wheel.name
    copy.write_bytes(data)
    return copy


def encrypt(data: bytearray, header: int) -> None:
    data[header + 6] |= 1


def pack_in_an_unknown_way(data: bytearray, header: int) -> None:
    data[header + 8] = 99


def damage(data: bytearray, header: int) -> None:
    if data[header : header + 4] == b"PK\x03\x04":
        data[header + 60 : header + 90] = bytes(30)


@pytest.mark.parametrize("change", [encrypt, pack_in_an_unknown_way, damage])
def test_a_wheel_that_cannot_be_unpacked_is_refused(
    change: Callable[[bytearray, int], None], wheel: Path, tmp_path: Path
) -> None:
    with pytest.raises(SoftwareError, match=r"is no usable wheel: .*; build it again"):
        read_wheel(repacked(wheel, tmp_path, change))


def test_a_wheel_that_no_device_would_accept_is_not_kept(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.bundles.software.MAX_WHEEL_BYTES", 1000)
    with pytest.raises(SoftwareError, match=r"a wheel of at most 1,000 bytes, got .*; leave out"):
        keep(wheel, tmp_path / "software")
    assert not (tmp_path / "software").exists()


@pytest.mark.parametrize("version", ["1!0.9.0", f"0.{'9' * 63}"])
def test_a_version_that_no_configuration_can_have_is_not_kept(
    version: str, wheel: Path, tmp_path: Path
) -> None:
    copy = tmp_path / f"cecollm_fleet-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(copy, "w") as target:
        for name in source.namelist():
            if ".dist-info/" in name:
                text = source.read(name)
                target.writestr(
                    name, text.replace(b"Version: 0.9.0", f"Version: {version}".encode())
                )
    with pytest.raises(SoftwareError, match=r"version .*: expected at most 63 digits"):
        keep(copy, tmp_path / "software")


def test_what_a_disk_adds_to_the_store_is_no_version(wheel: Path, tmp_path: Path) -> None:
    store = tmp_path / "software"
    keep(wheel, store)
    (store / "lost+found").mkdir()
    (store / "Thumbs.db").touch()
    (store / "1!0.9.0").mkdir()
    assert kept_versions(store) == ["0.9.0"]


def test_a_kept_version_that_is_damaged_is_to_be_deleted(wheel: Path, tmp_path: Path) -> None:
    store = tmp_path / "software"
    keep(wheel, store)
    (store / "0.9.0/manifest.json").write_text("{")
    with pytest.raises(SoftwareError, match=r"software/0\.9\.0: .*; delete this folder first"):
        keep(wheel, store)
