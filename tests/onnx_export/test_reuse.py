"""An export reuses unchanged graphs, and its bundle is the same to the byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from fleet.bundles.manifest import Manifest
from onnx_export import graph_cache as parts
from onnx_export.assembly import save_graph
from onnx_export.bundle import export_bundle
from onnx_export.config import ExportConfig
from onnx_export.graph_cache import GraphCache, graph_key
from onnx_export.graph_weights import DataFile
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
    files = ("block_0.onnx", "block_0.onnx.data", "block_1.onnx", "block_1.onnx.data")
    assert changed == {f"edge/{name}" for name in files}
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
    weight = torch.zeros(2, 3)
    keys = {
        graph_key({"w": lambda: weight}, layers=(0, 1)),
        graph_key({"w": lambda: weight}, layers=(0, 2)),
        graph_key({"w": lambda: weight.reshape(3, 2)}, layers=(0, 1)),
        graph_key({"w": lambda: weight + 1}, layers=(0, 1)),
        graph_key({"w": lambda: weight.half()}, layers=(0, 1)),
        graph_key({"v": lambda: weight}, layers=(0, 1)),
    }
    assert len(keys) == 6
    assert graph_key({"w": lambda: torch.zeros(2, 3)}, layers=(0, 1)) in keys


def test_a_damaged_graph_is_made_again(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path / "parts")
    assert cache.get_or_make("key", make_graph)[1] is False
    assert cache.get_or_make("key", make_graph) == (make_graph(), True)
    file = tmp_path / "parts" / "key"
    for damaged in (file.read_bytes()[:-1] + b"\xff", file.read_bytes()[:40], b""):
        file.write_bytes(damaged)
        assert cache.get_or_make("key", make_graph) == (make_graph(), False)
        assert cache.get_or_make("key", make_graph)[1] is True


def make_with_data(path: Path) -> onnx.ModelProto:
    """Return a graph whose weight is in a file of its own, which it writes."""
    graph = make_graph()
    tensor = DataFile(path).store("w", np.arange(1000, dtype=np.float32))
    graph.graph.initializer[0].CopyFrom(tensor)
    return graph


def test_the_file_of_large_weights_comes_from_the_cache_too_unless_it_is_damaged(
    tmp_path: Path,
) -> None:
    cache = GraphCache(tmp_path / "parts")
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    graph, is_cached = cache.get_or_make("key", lambda: make_with_data(first), first)
    assert not is_cached
    assert cache.get_or_make("key", make_graph, second) == (graph, True)
    assert second.read_bytes() == first.read_bytes()
    stored = tmp_path / "parts" / "key"
    stored.write_bytes(stored.read_bytes()[:-1] + b"\xff")
    assert cache.get_or_make("key", lambda: make_with_data(third), third)[1] is False
    assert third.read_bytes() == first.read_bytes()


def test_a_graph_larger_than_the_cache_is_used_and_not_stored(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path / "parts", max_bytes=3999)
    data = tmp_path / "data"
    assert cache.get_or_make("key", lambda: make_with_data(data), data)[1] is False
    assert not (tmp_path / "parts").exists()


def test_large_weights_are_in_a_file_next_to_the_graph(tmp_path: Path) -> None:
    graph = make_with_data(tmp_path / "of another name")
    (tmp_path / "of another name").rename(tmp_path / "g.onnx.data")
    save_graph(graph, tmp_path / "g.onnx")
    assert (tmp_path / "g.onnx.data").stat().st_size == 4000
    assert (tmp_path / "g.onnx").stat().st_size < 1000
    loaded = onnx.load(tmp_path / "g.onnx")
    np.testing.assert_array_equal(
        numpy_helper.to_array(loaded.graph.initializer[0]), np.arange(1000)
    )


def test_the_least_recently_used_graphs_are_removed_first(tmp_path: Path) -> None:
    size = make_graph(100).ByteSize() + parts.DIGEST_BYTES + parts.SIZE_BYTES
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
