"""The suffix tables of a device: one for each app and trigger, in small private files."""

from __future__ import annotations

import errno
import logging
import stat
import threading
from pathlib import Path

import pytest

from edge_agent.config import TableStorage
from edge_agent.generation import suffix_tables
from edge_agent.generation.suffix_table import SuffixTable
from edge_agent.generation.suffix_tables import MAX_TABLES, SAVE_S, SuffixTables
from fleet.bundles.manifest import Bundle
from fleet.utils.atomic_files import write_file

TOKENIZER = "ab" * 32
VOCAB = 1000


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def tables_in(folder: Path | None, clock: Clock | None = None) -> SuffixTables:
    return SuffixTables(folder, TOKENIZER, VOCAB, clock=clock or Clock())


def next_token(table: SuffixTable) -> int | None:
    guesses = table.guess([1, 2, 3], 1)
    return guesses[0].token_id if guesses else None


def test_no_app_sees_the_texts_of_another_one_or_of_another_trigger() -> None:
    tables = tables_in(None)
    tables.of("app-1").add([1, 2, 3, 4])
    tables.of("app-1", "doors").add([1, 2, 3, 5])
    assert next_token(tables.of("app-1")) == 4
    assert next_token(tables.of("app-1", "doors")) == 5
    assert next_token(tables.of("app-2")) is None
    assert next_token(tables.of("app-1", "pumps")) is None


def test_tables_outlive_the_process_in_private_files(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    tables = tables_in(folder)
    tables.of("app-1").add([1, 2, 3, 4])
    tables.of("app-1", "doors").add([1, 2, 3, 5])
    tables.of("app-2")
    tables.save(is_last=True)
    assert sorted(path.name for path in folder.iterdir()) == ["app-1.doors.tokens", "app-1.tokens"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    later = tables_in(folder)
    assert next_token(later.of("app-1")) == 4
    assert next_token(later.of("app-1", "doors")) == 5


def test_a_table_is_written_seldom(tmp_path: Path) -> None:
    clock = Clock()
    tables = tables_in(tmp_path, clock)
    path = tmp_path / "app-1.tokens"
    tables.of("app-1").add([1, 2, 3, 4])
    tables.save()
    assert not path.exists()
    clock.now = SAVE_S
    tables.save()
    written = path.stat().st_mtime_ns
    tables.of("app-1").add([1, 2, 3, 4])
    clock.now = 1.5 * SAVE_S
    tables.save()
    assert path.stat().st_mtime_ns == written
    tables.save(is_last=True)
    assert path.stat().st_mtime_ns > written


def damage(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (damage, "damaged"),
        (lambda data: data[:30], "damaged"),
        (lambda _: b"", "another version"),
        (lambda data: b"suffix table 2\n" + data[15:], "another version"),
        (lambda data: data + bytes(1 << 20), "longer than"),
    ],
)
def test_a_file_that_does_not_fit_is_discarded_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: object, reason: str
) -> None:
    tables = tables_in(tmp_path)
    tables.of("app-1").add([1, 2, 3, 4])
    tables.save(is_last=True)
    path = tmp_path / "app-1.tokens"
    assert callable(change)
    path.write_bytes(change(path.read_bytes()))
    check_discarded(tables_in(tmp_path), path, caplog, reason)


def test_a_file_of_another_tokenizer_is_discarded_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = tables_in(tmp_path)
    tables.of("app-1").add([1, 2, 3, 4])
    tables.save(is_last=True)
    path = tmp_path / "app-1.tokens"
    other = SuffixTables(tmp_path, "cd" * 32, VOCAB)
    check_discarded(other, path, caplog, "another tokenizer")


def test_a_file_with_unknown_token_ids_is_discarded_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = tables_in(tmp_path)
    tables.of("app-1").add([1, 2, 3, VOCAB])
    tables.save(is_last=True)
    check_discarded(tables_in(tmp_path), tmp_path / "app-1.tokens", caplog, "token ids")


def check_discarded(
    tables: SuffixTables, path: Path, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    with caplog.at_level(logging.WARNING):
        assert next_token(tables.of("app-1")) is None
    assert len(caplog.records) == 1
    assert reason in caplog.text
    assert not path.exists()


def test_a_damaged_file_in_a_folder_that_cannot_be_written_costs_no_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    path = tmp_path / "app-1.tokens"
    path.write_bytes(b"damaged")
    monkeypatch.setattr(Path, "unlink", refuse)  # root may write everywhere
    tables = tables_in(tmp_path)
    with caplog.at_level(logging.WARNING):
        tables.of("app-1").add([1, 2, 3, 4])
    assert len(caplog.records) == 1
    assert next_token(tables.of("app-1")) == 4


def test_no_answer_waits_while_a_table_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = tables_in(tmp_path)
    tables.of("app-1").add([1, 2, 3, 4])
    found: list[int | None] = []

    def write(path: Path, data: bytes) -> None:
        reader = threading.Thread(target=lambda: found.append(next_token(tables.of("app-1"))))
        reader.start()
        reader.join(10.0)
        write_file(path, data)

    monkeypatch.setattr(suffix_tables, "write_file", write)
    tables.save(is_last=True)
    assert found == [4]
    assert (tmp_path / "app-1.tokens").exists()


def test_a_folder_that_cannot_be_written_costs_one_line_and_no_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "file"
    folder.write_text("no folder")
    tables = tables_in(folder)
    tables.of("app-1").add([1, 2, 3, 4])
    with caplog.at_level(logging.WARNING):
        tables.save(is_last=True)
    assert "cannot be" in caplog.text
    assert next_token(tables.of("app-1")) == 4


def test_only_the_tables_of_the_last_apps_are_kept(tmp_path: Path) -> None:
    tables = tables_in(tmp_path)
    for number in range(2 * MAX_TABLES):
        tables.of(f"app-{number}").add([1, 2, 3, number])
        tables.of("app-0")
    tables.save(is_last=True)
    assert len(list(tmp_path.iterdir())) == MAX_TABLES
    assert next_token(tables.of("app-0")) == 0


def test_an_app_whose_name_is_no_file_name_has_a_table_in_memory_alone(tmp_path: Path) -> None:
    tables = tables_in(tmp_path)
    tables.of("../app").add([1, 2, 3, 4])
    tables.save(is_last=True)
    assert list(tmp_path.iterdir()) == []
    assert next_token(tables.of("../app")) == 4


def test_tables_that_are_off_keep_nothing(tmp_path: Path) -> None:
    tables = SuffixTables(tmp_path, TOKENIZER, VOCAB, is_off=True)
    tables.of("app-1").add([1, 2, 3, 4])
    tables.save(is_last=True)
    assert next_token(tables.of("app-1")) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("storage", ["memory", "off"])
def test_files_are_removed_unless_tables_are_stored_on_disk(
    tiny_bundle: Bundle, tmp_path: Path, storage: TableStorage
) -> None:
    tables = SuffixTables.for_bundle(tiny_bundle.manifest, tmp_path, "disk")
    tables.of("app-1").add([1, 2, 3, 4])
    tables.save(is_last=True)
    assert list(tmp_path.iterdir())
    SuffixTables.for_bundle(tiny_bundle.manifest, tmp_path, storage)
    assert list(tmp_path.iterdir()) == []
