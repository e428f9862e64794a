"""The bundles of a server: complete, signed, and without other files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fleet.bundles.manifest import Bundle
from fleet.bundles.signature import check_signature
from fleet.bundles.store import keep_bundle
from fleet.bundles.verify import verify_bundle
from fleet.errors import BundleError, ConfigError
from provisioning.authority import CertificateAuthority


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "ca")


def test_a_kept_bundle_is_whole_and_signed_by_the_fleet(
    tmp_path: Path, authority: CertificateAuthority, tiny_bundle: Bundle
) -> None:
    kept = keep_bundle(tiny_bundle.folder, tmp_path / "bundles", authority.sign_bundle)
    assert kept.folder == tmp_path / "bundles" / tiny_bundle.manifest.bundle_id
    verdict = verify_bundle(kept.folder, tmp_path / "ca" / "ca.pem")
    assert (verdict.ok, verdict.signature, verdict.bundle_id) == (
        True,
        "valid",
        tiny_bundle.manifest.bundle_id,
    )
    assert [path.name for path in (tmp_path / "bundles").iterdir()] == [
        tiny_bundle.manifest.bundle_id
    ]


def test_a_kept_bundle_is_readable_for_other_users_whatever_the_umask_is(
    tmp_path: Path, tiny_bundle: Bundle, authority: CertificateAuthority
) -> None:
    previous = os.umask(0o077)
    try:
        folder = keep_bundle(tiny_bundle.folder, tmp_path / "store", authority.sign_bundle).folder
    finally:
        os.umask(previous)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (folder, *folder.rglob("*"))}
    folders = {folder.name, "edge", "cloud", "tokenizer"}
    assert modes == {name: "0o755" if name in folders else "0o644" for name in modes}


def test_files_on_the_same_disk_are_not_copied_and_the_source_is_not_touched(
    tmp_path: Path, authority: CertificateAuthority, tiny_bundle: Bundle
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_bundle.folder, source)
    (source / "notes.txt").write_text("not the manifest's")
    before = sorted(path.name for path in source.rglob("*"))
    kept = keep_bundle(source, tmp_path / "bundles", authority.sign_bundle)
    name = kept.manifest.files[0].path
    assert (kept.folder / name).stat().st_ino == (source / name).stat().st_ino
    assert sorted(path.name for path in source.rglob("*")) == before
    assert not (kept.folder / "notes.txt").exists()


def test_a_bundle_with_another_signature_is_signed_again(
    tmp_path: Path, authority: CertificateAuthority, tiny_bundle: Bundle
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_bundle.folder, source)
    CertificateAuthority.create(tmp_path / "other").sign_bundle(source)
    kept = keep_bundle(source, tmp_path / "bundles", authority.sign_bundle)
    check_signature(kept.folder, tmp_path / "ca" / "ca.pem")
    check_signature(source, tmp_path / "other" / "ca.pem")


def test_keeping_it_again_changes_nothing(
    tmp_path: Path, authority: CertificateAuthority, tiny_bundle: Bundle
) -> None:
    first = keep_bundle(tiny_bundle.folder, tmp_path / "bundles", authority.sign_bundle)
    signature = (first.folder / "manifest.sig").read_bytes()
    again = keep_bundle(tiny_bundle.folder, tmp_path / "bundles", authority.sign_bundle)
    assert again.folder == first.folder
    assert (again.folder / "manifest.sig").read_bytes() == signature


@pytest.mark.parametrize("harm", ["missing", "altered"])
def test_of_a_damaged_bundle_nothing_is_kept(
    tmp_path: Path, authority: CertificateAuthority, tiny_bundle: Bundle, harm: str
) -> None:
    source = tmp_path / "source"
    path = tiny_bundle.manifest.files[0].path
    shutil.copytree(tiny_bundle.folder, source)
    if harm == "missing":
        (source / path).unlink()
    else:
        (source / path).write_bytes(b"other")
    with pytest.raises(BundleError, match=harm):
        keep_bundle(source, tmp_path / "bundles", authority.sign_bundle)
    assert list((tmp_path / "bundles").iterdir()) == []


def test_a_store_that_cannot_be_written_is_named(
    tmp_path: Path, authority: CertificateAuthority, tiny_bundle: Bundle
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot keep bundle .* in .*file"):
        keep_bundle(tiny_bundle.folder, tmp_path / "file", authority.sign_bundle)
