"""Backups: complete or absent, private, and restored only into new places."""

from __future__ import annotations

import gzip
import io
import re
import shutil
import tarfile
import threading
from pathlib import Path

import msgspec
import pytest

from fleet.bundles.manifest import Bundle
from fleet.cli.backup import backup
from fleet.errors import ConfigError, IdentityError, RegistryError
from fleet.protocol.access import Role
from fleet.server import backup as server_backup
from fleet.server.backup import back_up, remove_old_backups, restore_backup
from fleet.server.home import FleetConfig, FleetHome
from tests.fleet.conftest import add, report
from tests.postgresql import Databases


def make_home(folder: Path, bundle: str = "/no/bundle", url: str | None = None) -> FleetHome:
    config = FleetConfig(host="127.0.0.1", port=1, bundle=bundle, registry=url)
    home = FleetHome.create(folder, config)
    with home.registry() as registry:
        add(registry, "edge-1", group="kitchen")
        registry.stats.record_report("edge-1", report())
    return home


def check_restored(home: FleetHome) -> None:
    """The restored fleet has the counts, and its authority enrols further devices."""
    with home.registry() as registry:
        assert registry.stats.per_device()[0].tokens == 10
        assert not registry.stats.record_report("edge-1", report())
    home.enroll("edge-2", Role.DEVICE, home.folder.parent / "edge-2")


@pytest.mark.parametrize(
    ("place", "advice"), [("missing/", "is no folder; make it"), ("-", "is not printed; name one")]
)
def test_a_place_that_is_no_file_is_refused(
    place: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_home(tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=advice):
        backup(place, folder=tmp_path / "home")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_fleet_on_sqlite_comes_back(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    file = back_up(home, tmp_path / "backup.tar.gz")
    restored = restore_backup(file, tmp_path / "new")
    assert restored.ca_sha256() == home.ca_sha256()
    assert restored.config == home.config
    check_restored(restored)


def test_a_fleet_on_postgresql_comes_back_in_another_database(
    tmp_path: Path, postgresql: Databases
) -> None:
    with postgresql.database() as url, postgresql.database(empty=True) as new_url:
        file = back_up(make_home(tmp_path / "home", url=url), tmp_path / "backup.tar.gz")
        with pytest.raises(RegistryError, match=r"is not empty.*--registry"):
            restore_backup(file, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        restored = restore_backup(file, tmp_path / "new", new_url)
        assert restored.config.registry == new_url
        check_restored(restored)


def test_a_registry_that_is_being_written_is_copied_whole(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    stop = threading.Event()

    def write() -> None:
        with home.registry() as registry:
            for number in range(100_000):
                if stop.is_set():
                    return
                registry.stats.record_report("edge-1", report(f"more-{number}"))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        files = [back_up(home, tmp_path / f"{number}.tar.gz") for number in range(3)]
    finally:
        stop.set()
        writer.join()
    for file in files:
        with restore_backup(file, tmp_path / f"from-{file.name}").registry() as registry:
            (row,) = registry.stats.per_device()
            assert row.tokens == 10 * row.generations


def test_a_backup_is_private_and_replaces_no_file(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    file = back_up(home, tmp_path / "backup.tar.gz")
    assert file.stat().st_mode & 0o777 == 0o600
    content = file.read_bytes()
    with pytest.raises(ConfigError, match="exists; a backup replaces no file"):
        back_up(home, file)
    assert file.read_bytes() == content


def test_a_backup_that_fails_leaves_no_file(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    (home.folder / "registry.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(RegistryError):
        back_up(home, tmp_path / "backup.tar.gz")
    with pytest.raises(ConfigError, match="cannot write the backup"):
        back_up(home, tmp_path / "no/folder.tar.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_in_a_folder_only_the_newest_of_this_fleet_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    home = make_home(tmp_path / "home")
    other = make_home(tmp_path / "other")
    last = back_up(home, folder)
    names = [re.sub(r"-\d{4}-.*T", f"-2026-01-0{day}T", last.name) for day in range(1, 4)]
    kept = {last.name, names[2], back_up(other, folder).name, "photos-2020T1Z.tar.gz"}
    for name in {*names, *kept}:
        (folder / name).touch()
    assert [path.name for path in remove_old_backups(home, last, 2)] == names[:2]
    assert {path.name for path in folder.iterdir()} == kept


@pytest.mark.parametrize(("num_kept", "kept"), [(1, []), (2, ["2020"]), (3, ["2020", "2098"])])
def test_a_clock_that_was_or_is_wrong_does_not_remove_the_new_backup(
    num_kept: int, kept: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    home = make_home(tmp_path / "home")
    new = back_up(home, folder)
    for year in ("2020", "2097", "2098"):
        (folder / re.sub(r"-\d{4}-", f"-{year}-", new.name)).touch()
    remove_old_backups(home, new, num_kept)
    years = {path.name.split("-")[2] for path in folder.iterdir() if path != new}
    assert new.exists()
    assert years == set(kept)


def test_an_empty_registry_is_no_registry(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    (home.folder / "registry.sqlite").write_bytes(b"")
    with pytest.raises(RegistryError, match=r"registry\.sqlite is missing or empty"):
        back_up(home, tmp_path / "backup.tar.gz")


@pytest.mark.parametrize("content", [b"", b"-----BEGIN CERTIFICATE-----", b"\xff"])
def test_a_damaged_certificate_of_the_authority_is_named(content: bytes, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    (home.folder / "ca/ca.pem").write_bytes(content)
    with pytest.raises(IdentityError, match=r"ca\.pem is damaged: .*; restore it"):
        back_up(home, tmp_path)


def test_bundles_are_optional_and_are_served_where_the_old_folder_is_gone(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    home = make_home(tmp_path / "home", str(tiny_bundle.folder))
    bundle_id = home.keep_bundle(tiny_bundle.folder)
    small = back_up(home, tmp_path / "small.tar.gz")
    assert not (restore_backup(small, tmp_path / "small").bundles / bundle_id).exists()
    config = msgspec.structs.replace(home.config, bundle=str(home.bundles / bundle_id))
    moved = FleetHome(home.folder, config)
    moved.save()
    large = back_up(moved, tmp_path / "large.tar.gz", bundles=True)
    home.folder.rename(tmp_path / "lost")
    restored = restore_backup(large, tmp_path / "new")
    assert restored.config.bundle == str(tmp_path / "new/bundles" / bundle_id)
    assert Bundle.load(Path(restored.config.bundle)).manifest == tiny_bundle.manifest


def test_a_bundle_elsewhere_in_the_fleets_folder_is_left_out_as_well(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    model = tmp_path / "home/models/tiny"
    home = make_home(tmp_path / "home", str(model))
    shutil.copytree(tiny_bundle.folder, model)
    (model.parent / "notes.txt").write_text("kept")
    small = restore_backup(back_up(home, tmp_path / "small.tar.gz"), tmp_path / "small")
    assert [path.name for path in (small.folder / "models").iterdir()] == ["notes.txt"]
    file = back_up(home, tmp_path / "large.tar.gz", bundles=True)
    large = restore_backup(file, tmp_path / "large")
    assert Bundle.load(large.folder / "models/tiny").manifest == tiny_bundle.manifest


def test_a_backup_in_the_fleets_folder_is_no_part_of_the_next_one(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    (home.folder / "backups").mkdir()
    first = back_up(home, home.folder / "backups")
    first.with_name("first.tar").write_bytes(gzip.decompress(first.read_bytes()))
    first.rename(first.with_name("mine (1).tgz"))
    first.with_name("photos.tar.gz").write_bytes(gzip.compress(b"photos"))
    restored = restore_backup(back_up(home, home.folder), tmp_path / "new")
    assert [path.name for path in (restored.folder / "backups").iterdir()] == ["photos.tar.gz"]
    assert not list(restored.folder.glob("*.tar.gz"))


@pytest.mark.parametrize("is_unpacked", [True, False])
def test_a_backup_that_another_program_has_packed_again_is_restored(
    tmp_path: Path, is_unpacked: bool
) -> None:
    home = make_home(tmp_path / "home")
    file = back_up(home, tmp_path / "backup.tar.gz")
    again = tmp_path / "again"
    if is_unpacked:
        again.write_bytes(gzip.decompress(file.read_bytes()))
    else:
        with tarfile.open(file) as tar:
            tar.extractall(tmp_path / "content", filter="data")
        with tarfile.open(again, "w:gz") as tar:
            tar.add(tmp_path / "content", ".")
    check_restored(restore_backup(again, tmp_path / "new"))


def test_a_backup_without_gzip_that_is_cut_off_restores_nothing(tmp_path: Path) -> None:
    file = back_up(make_home(tmp_path / "home"), tmp_path / "backup.tar.gz")
    content = gzip.decompress(file.read_bytes())
    with tarfile.open(file) as tar:
        ends = [member.offset for member in tar.getmembers()[3:]]
    for end in (*ends[:2], len(content) - 10_000):
        (tmp_path / "cut.tar").write_bytes(content[:end])
        with pytest.raises(ConfigError, match=r"cut.tar is damaged, or no backup of a fleet"):
            restore_backup(tmp_path / "cut.tar", tmp_path / "new")


def test_a_folder_with_files_is_not_restored_into(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    file = back_up(home, tmp_path / "backup.tar.gz")
    with pytest.raises(ConfigError, match="is not empty; restore into a new folder"):
        restore_backup(file, home.folder)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_file_that_is_cut_off_restores_nothing(tmp_path: Path, share: float) -> None:
    file = back_up(make_home(tmp_path / "home"), tmp_path / "backup.tar.gz")
    data = file.read_bytes()
    (tmp_path / "cut").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ConfigError, match=r"damaged|no backup"):
        restore_backup(tmp_path / "cut", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_file_with_a_flipped_bit_restores_nothing(tmp_path: Path) -> None:
    file = back_up(make_home(tmp_path / "home"), tmp_path / "backup.tar.gz")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises((ConfigError, RegistryError)):
        restore_backup(file, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["../outside", "/outside", "ca/../../outside"])
def test_an_archive_writes_nothing_outside_the_folder(tmp_path: Path, name: str) -> None:
    file = tmp_path / "backup.tar.gz"
    with gzip.open(file, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ConfigError, match="unexpected member"):
        restore_backup(file, tmp_path / "inside/new")
    assert {path.name for path in tmp_path.iterdir()} == {"backup.tar.gz", "inside"}


def test_an_archive_of_other_files_is_no_backup(tmp_path: Path) -> None:
    file = tmp_path / "backup.tar.gz"
    with gzip.open(file, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("notes.txt"), io.BytesIO())
    words = r"backup\.tar\.gz is no backup of a fleet: it has no backup\.json$"
    with pytest.raises(ConfigError, match=words):
        restore_backup(file, tmp_path / "new")


def test_a_link_in_an_archive_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "backup.tar.gz"
    link = tarfile.TarInfo("ca")
    link.type = tarfile.SYMTYPE
    link.linkname = "/etc"
    with gzip.open(file, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(link)
    with pytest.raises(ConfigError, match="unexpected member 'ca'"):
        restore_backup(file, tmp_path / "new")


def test_folders_on_another_disk_are_part_of_a_backup(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    for name in ("ca", "identities"):
        (home.folder / name).rename(tmp_path / name)
        (home.folder / name).symlink_to(tmp_path / name)
    (home.folder / "itself").symlink_to(home.folder)
    restored = restore_backup(back_up(home, tmp_path / "backup.tar.gz"), tmp_path / "new")
    assert restored.ca_sha256() == home.ca_sha256()
    assert restored.has_identity("collector")
    assert not (restored.folder / "itself").exists()
    check_restored(restored)


def test_a_fleet_without_its_authority_is_not_backed_up(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    key = home.folder / "ca" / "ca-key.pem"
    key.unlink()
    key.symlink_to("/no/disk/ca-key.pem")
    with pytest.raises(ConfigError, match=r"no .*ca-key\.pem; restore its files, or mount"):
        back_up(home, tmp_path / "backup.tar.gz")
    assert not (tmp_path / "backup.tar.gz").exists()


def test_a_backup_without_an_authority_restores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_home(tmp_path / "home")
    with monkeypatch.context() as patch:
        patch.setattr(server_backup, "_check_authority", lambda folder, advice: None)
        shutil.rmtree(home.folder / "ca")
        file = back_up(home, tmp_path / "backup.tar.gz")
    with pytest.raises(ConfigError, match="is not complete: restore another backup"):
        restore_backup(file, tmp_path / "new")
    assert not (tmp_path / "new").exists()
