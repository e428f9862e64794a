"""An export reuses unchanged graphs, and its bundle is the same to the byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from threading import Barrier, Thread
from typing import Any, NoReturn

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fleet.bundles.manifest import Manifest
from onnx_export import bundle
from onnx_export import graph_cache as parts
from onnx_export.bundle import export_bundle
from onnx_export.config import ExportConfig
from onnx_export.graph_cache import GraphCache, graph_key
from tests.tiny import make_tiny_heads

KEPT = "come from an earlier export"


def export(out: Path, model: Path, heads: Path, cache: Path) -> tuple[Manifest, list[str]]:
    lines: list[str] = []
    config = ExportConfig(out=out, exits=(1, 2), model=str(model), heads=heads, graph_cache=cache)
    return export_bundle(config, lines.append), [line for line in lines if KEPT in line]


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def make_graph(size: int = 4) -> onnx.ModelProto:
    weight = helper.make_tensor(
        "w", TensorProto.FLOAT, [size], np.zeros(size, np.float32).tobytes(), raw=True
    )
    return helper.make_model(helper.make_graph([], "g", [], [], [weight]))


def test_new_heads_are_put_behind_the_layers_of_an_earlier_export(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    heads = [
        make_tiny_heads(tmp_path / f"heads{seed}", tiny_checkpoint, seed=seed) for seed in (1, 2)
    ]
    first, kept = export(tmp_path / "first", tiny_checkpoint, heads[0], tmp_path / "parts")
    assert kept == []
    second, kept = export(tmp_path / "second", tiny_checkpoint, heads[1], tmp_path / "parts")
    assert len(kept) == 2
    alone, _ = export(tmp_path / "alone", tiny_checkpoint, heads[1], tmp_path / "other parts")
    assert content(tmp_path / "second") == content(tmp_path / "alone")
    changed = {
        a.path for a, b in zip(first.files, second.files, strict=True) if a.sha256 != b.sha256
    }
    assert changed == {"edge/block_0.onnx", "edge/block_1.onnx"}
    assert second.bundle_id == alone.bundle_id != first.bundle_id


def test_two_processes_write_the_same_bundle_to_the_byte(
    tiny_checkpoint: Path, tiny_heads: Path, tmp_path: Path
) -> None:
    """This process has another hash seed than the one that it starts."""
    config = ExportConfig(
        out=tmp_path / "here",
        exits=(1, 3),
        model=str(tiny_checkpoint),
        heads=tiny_heads,
        graph_cache=tmp_path / "graphs",
    )
    export_bundle(config)
    command = [
        *(sys.executable, "-m", "onnx_export"),
        *("--out", str(tmp_path / "there"), "--exits", "1,3"),
        *("--model", str(tiny_checkpoint), "--heads", str(tiny_heads)),
    ]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONHASHSEED": "3"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=280)
    here = content(tmp_path / "here")
    assert "manifest.json" in here
    assert here == content(tmp_path / "there")


def test_any_other_input_has_another_key() -> None:
    import torch

    weight = torch.zeros(2, 3)
    keys = {
        graph_key({"w": weight}, layers=(0, 1)),
        graph_key({"w": weight}, layers=(0, 2)),
        graph_key({"w": weight.reshape(3, 2)}, layers=(0, 1)),
        graph_key({"w": weight + 1}, layers=(0, 1)),
        graph_key({"v": weight}, layers=(0, 1)),
    }
    assert len(keys) == 5
    assert graph_key({"w": torch.zeros(2, 3)}, layers=(0, 1)) in keys


def test_a_damaged_graph_is_made_again(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path / "parts")
    assert cache.get_or_make("key", make_graph)[1] is False
    assert cache.get_or_make("key", make_graph) == (make_graph(), True)
    file = tmp_path / "parts" / "key"
    for damaged in (file.read_bytes()[:-1] + b"\xff", file.read_bytes()[:40], b""):
        file.write_bytes(damaged)
        assert cache.get_or_make("key", make_graph) == (make_graph(), False)
        assert cache.get_or_make("key", make_graph)[1] is True


class TooLargeGraph:
    """A graph of more than 2 GiB, as protobuf treats it."""

    def __init__(self) -> None:
        self.graph = make_graph(1000).graph

    def fail(self, **_: bool) -> NoReturn:
        raise ValueError("Failed to serialize proto")

    ByteSize = SerializeToString = fail


def test_a_graph_too_large_for_one_message_is_used_and_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "MAX_GRAPH_BYTES", 3999)
    graph: Any = TooLargeGraph()
    cache = GraphCache(tmp_path / "parts")
    assert cache.get_or_make("key", lambda: graph) == (graph, False)
    assert not (tmp_path / "parts").exists()


def test_large_weights_go_into_a_file_of_their_own_without_one_large_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "MAX_INLINE_BYTES", 3999)
    bundle.save_graph(make_graph(1000), tmp_path / "g.onnx")
    assert (tmp_path / "g.onnx.data").stat().st_size == 4000
    assert (tmp_path / "g.onnx").stat().st_size < 1000
    loaded = onnx.load(tmp_path / "g.onnx")
    assert len(loaded.graph.initializer[0].raw_data) == 4000


def test_the_least_recently_used_graphs_are_removed_first(tmp_path: Path) -> None:
    size = make_graph(100).ByteSize() + parts.DIGEST_BYTES
    cache = GraphCache(tmp_path, max_bytes=2 * size)
    for made_at, key in enumerate(("used", "idle")):
        cache.get_or_make(key, lambda: make_graph(100))
        os.utime(tmp_path / key, (made_at, made_at))
    assert cache.get_or_make("used", lambda: make_graph(100))[1] is True
    cache.get_or_make("newest", lambda: make_graph(100))
    assert {path.name for path in tmp_path.iterdir()} == {"used", "newest", parts.LOCK_FILE}


def test_the_files_of_a_killed_writer_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / parts.PARTIAL_FILE).write_bytes(b"half a graph")
    assert GraphCache(tmp_path).get_or_make("key", make_graph)[1] is False
    assert {path.name for path in tmp_path.iterdir()} == {"key", parts.LOCK_FILE}


def test_two_writers_at_once_leave_whole_graphs(tmp_path: Path) -> None:
    together = Barrier(2)

    def write() -> None:
        together.wait()
        for i in range(20):
            GraphCache(tmp_path).get_or_make(f"key{i}", lambda: make_graph(10_000))

    threads = [Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(GraphCache(tmp_path).get_or_make(f"key{i}", make_graph)[1] for i in range(20))
