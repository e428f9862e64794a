"""Bundles: only files that agree with the manifest."""

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fleet.bundles.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    Bundle,
    FileEntry,
    Manifest,
    write_manifest,
)
from fleet.errors import BundleError, ConfigError
from tests.model_info import TINY_MODEL

SCHEMA_3_ID = "0f8dc984857cfb847a7103c7f07c9549"
FILES = {
    "edge/block_0.onnx": b"lower layers",
    "edge/lm_head.onnx": b"head",
    "cloud/model.safetensors": b"upper layers",
    "tokenizer/tokenizer.json": b"{}",
}


def manifest(files: dict[str, bytes] = FILES, **changes: Any) -> Manifest:
    entries = tuple(
        FileEntry(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()
    )
    fields: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": TINY_MODEL,
        "exits": (1, 2),
        "split_layer": 2,
        "upload_layer": 2,
        "quantization": "fp32",
        "top_k": 64,
        "thresholds": (0.8, 0.8),
        "parity": {"hidden_states": 1e-6, "logits": 1e-5},
        "tools": {"torch": "2", "onnx": "1"},
        "files": entries,
    }
    return Manifest(**fields | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    write_manifest(tmp_path, manifest())
    return tmp_path


def rewrite(folder: Path, **changes: Any) -> None:
    """Return the manifest's JSON with other values, legal or not."""
    path = folder / MANIFEST_FILE
    path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | changes))


def test_a_bundle_is_read_as_it_was_written(folder: Path) -> None:
    assert Bundle.load(folder).manifest == manifest()


def test_the_id_is_the_same_on_every_machine() -> None:
    assert manifest().bundle_id == "fc30887aa9861fb023e25d54c6898855"


def test_the_id_does_not_depend_on_the_order_in_which_things_were_noted(folder: Path) -> None:
    assert manifest(tools={"onnx": "1", "torch": "2"}).bundle_id == manifest().bundle_id
    path = folder / MANIFEST_FILE
    fields = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode(dict(reversed(fields.items()))))
    assert Bundle.load(folder).manifest.bundle_id == manifest().bundle_id


@pytest.mark.parametrize(
    "changes",
    [
        {"upload_layer": 1},
        {"upload_layer": 1, "uploads": (1, 2)},
        {"thresholds": (0.8, 0.9)},
        {"files": FILES | {"edge/lm_head.onnx": b"hEad"}},
    ],
)
def test_the_id_is_another_when_a_setting_or_a_file_is(changes: dict[str, Any]) -> None:
    assert manifest(**changes).bundle_id != manifest().bundle_id


@pytest.mark.parametrize(
    "changes",
    [
        {"parity": {"logits": 2e-5}},
        {"tools": {"torch": "2", "onnx": "1.1"}},
    ],
)
def test_the_id_is_the_same_with_other_tools_on_another_processor(changes: dict[str, Any]) -> None:
    assert manifest(**changes).bundle_id == manifest().bundle_id


def test_a_bundle_of_schema_3_keeps_its_id(folder: Path) -> None:
    rewrite(folder, schema_version=3)
    loaded = Bundle.load(folder).manifest
    assert loaded.bundle_id == SCHEMA_3_ID
    assert manifest(schema_version=3, parity={}).bundle_id != SCHEMA_3_ID


def test_the_blocks_are_the_layers_between_the_exits() -> None:
    assert manifest(exits=(8, 15)).blocks == ((0, 8), (8, 15))


@pytest.mark.parametrize(
    ("changes", "splits", "uploads"),
    [
        ({}, (2,), [2]),
        ({"upload_layer": 1}, (1, 2), [1, 1]),
        ({"upload_layer": 1, "uploads": (1, 2)}, (1, 2), [1, 2]),
        ({"exits": (1, 3, 4), "upload_layer": 1, "uploads": (1, 3)}, (1, 3, 4), [1, 3, 3]),
        ({"exits": (2, 4), "split_layer": 4, "upload_layer": 4}, (4,), [4]),
    ],
)
def test_a_device_holds_layers_up_to_an_exit_and_uploads_at_the_deepest_layer_that_it_can(
    changes: dict[str, Any], splits: tuple[int, ...], uploads: list[int]
) -> None:
    made = manifest(**changes)
    assert made.splits == splits
    assert [made.upload_layer_of(split) for split in splits] == uploads
    assert made.split_of(splits[0]) == splits[0]
    with pytest.raises(ConfigError, match=r"split 7: expected 'auto' or one of"):
        made.split_of(7)


def test_the_split_is_the_bundles_own_unless_it_is_set() -> None:
    several = manifest(upload_layer=1, uploads=(1, 2), split_layer=1)
    assert (several.split_of("auto"), several.split_of(2)) == (1, 2)


def test_a_file_is_found_by_its_name(folder: Path) -> None:
    assert Bundle.load(folder).path("edge/lm_head.onnx").read_bytes() == b"head"


@pytest.mark.parametrize("name", ["edge/block_9.onnx", "../manifest.json", "manifest.json", ""])
def test_a_file_that_the_manifest_does_not_name_is_not_copied(folder: Path, name: str) -> None:
    with pytest.raises(BundleError, match="has no file"):
        Bundle.load(folder).path(name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_altered_at_the_same_length_is_found(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"X" * len(FILES[name]))
    with pytest.raises(BundleError, match=f"{name} was altered"):
        Bundle.load(folder)


def test_a_file_cut_short_is_found(folder: Path) -> None:
    (folder / "cloud/model.safetensors").write_bytes(b"upper")
    with pytest.raises(BundleError, match=r"altered: expected 12 bytes .* got 5 bytes"):
        Bundle.load(folder)


def test_a_missing_file_is_found(folder: Path) -> None:
    (folder / "edge/block_0.onnx").unlink()
    with pytest.raises(BundleError, match=r"edge/block_0.onnx is missing; export or copy"):
        Bundle.load(folder)
    (folder / "edge/block_0.onnx").mkdir()
    with pytest.raises(BundleError, match=r"edge/block_0.onnx is a folder, expected a file"):
        Bundle.load(folder)


def test_a_manifest_in_utf_16_is_refused_by_that_name(folder: Path) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(path.read_text(), encoding="utf-16")
    with pytest.raises(BundleError, match=r"manifest\.json is in UTF-16, expected UTF-8"):
        Bundle.load(folder)


def test_a_device_needs_no_files_of_the_cloud(folder: Path) -> None:
    (folder / "cloud/model.safetensors").unlink()
    assert Bundle.load(folder, ("edge", "tokenizer")).manifest == manifest()


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no usable bundle in .*manifest.json"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "edge/../../secret",
        "edge/..",
        "edge/.hidden",
        "edge/a/b",
        "edge/",
        "edge\\a",
        "other/a",
        "edge/a\n",
        "edge/" + "a" * 5000,
        "",
    ],
)
def test_a_file_name_that_leaves_the_bundles_folders_is_refused(folder: Path, name: str) -> None:
    rewrite(
        folder, files=[{"path": name, "num_bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}]
    )
    with pytest.raises(BundleError, match="is not usable"):
        Bundle.load(folder)


def test_another_schema_is_refused_with_both_numbers(folder: Path) -> None:
    rewrite(folder, schema_version=SCHEMA_VERSION + 1)
    with pytest.raises(
        BundleError, match=f"expected schema {SCHEMA_VERSION}, got {SCHEMA_VERSION + 1}"
    ):
        Bundle.load(folder)


def test_a_threshold_that_is_no_probability_is_refused(folder: Path) -> None:
    rewrite(folder, thresholds=[2.0, -1.0])
    with pytest.raises(BundleError, match="thresholds"):
        Bundle.load(folder)


def test_an_unknown_field_is_refused(folder: Path) -> None:
    rewrite(folder, colour="red")
    with pytest.raises(BundleError, match="colour"):
        Bundle.load(folder)


@pytest.mark.parametrize(
    "payload", [b"", b"{", b"[]", b"\xff", b'{"schema_version": "\xff"}', b"[" * 10_000]
)
def test_a_file_that_is_no_manifest_is_refused(folder: Path, payload: bytes) -> None:
    (folder / MANIFEST_FILE).write_bytes(payload)
    with pytest.raises(BundleError, match=r"make one of schema 4|is not in UTF-8"):
        Bundle.load(folder)
