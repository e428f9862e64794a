"""Files that are replaced in one step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fleet.utils.atomic_files import create_file, write_file


def test_root_keeps_the_owner_of_a_file_and_gives_a_new_one_that_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners: list[tuple[int, int]] = []
    lstat = Path.lstat

    def lstat_of_others(path: Path) -> os.stat_result:
        values = list(lstat(path))
        values[4:6] = [1001, 1002] if path == tmp_path else [2001, 2002]
        return os.stat_result(values)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "fchown", lambda _, user, group: owners.append((user, group)))
    monkeypatch.setattr(Path, "lstat", lstat_of_others)
    write_file(tmp_path / "key.pem", b"old")
    write_file(tmp_path / "key.pem", b"new")
    create_file(tmp_path / "other.pem", b"x")
    assert owners == [(1001, 1002), (2001, 2002), (1001, 1002)]


def test_other_users_change_no_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "fchown", None)
    write_file(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"
