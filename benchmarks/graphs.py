"""Edge bundles for measurements: one block up to any layer, the model's last one included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fleet.bundles.manifest import SCHEMA_VERSION, Manifest, write_manifest
from onnx_export.architecture import model_info
from onnx_export.assembly import Assembly
from onnx_export.atomic_folder import staged
from onnx_export.bundle import list_files
from onnx_export.checkpoint import (
    cache_folder,
    load_pretrained,
    model_config,
    resolve_model,
)
from onnx_export.config import DEFAULT_MODEL, ExportConfig, Quantization
from onnx_export.edge import write_edge
from onnx_export.fingerprints import source_digest, tool_versions
from onnx_export.graph_cache import default_graph_cache
from onnx_export.heads import ExitHead, HeadKind, HeadsFile, model_fingerprint, new_head
from onnx_export.streamed_model import StreamedModel, load_whole_model, open_model


def whole_model(name: str, attention: str, progress: Callable[[str], None]) -> Any:
    """Return a model in float32 with one of transformers' kinds of attention."""
    source = resolve_model(name, progress)
    return load_whole_model(source, name, attention=attention)


class EdgeGraphs:
    """Makes a model's edge up to a layer, each once.

    Bundles of the default model are kept in the user's cache. An exit has an untrained head of the
    default kind, `linear`, at the cost of a trained one; the last layer has the model's own norm,
    so that its best token is the model's. `stream` is a model that has no checkpoint.
    """

    def __init__(
        self,
        progress: Callable[[str], None],
        model: str = DEFAULT_MODEL,
        folder: Path | None = None,
        stream: StreamedModel | None = None,
    ) -> None:
        self._progress = progress
        self._name = model
        self._folder = folder or cache_folder() / "bench" / source_digest()[:16]
        self._model = stream

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return int(model_config(self._name).num_hidden_layers)

    def model(self) -> tuple[Any, Any]:
        """Return the whole model in float32 and its tokenizer."""
        source = resolve_model(self._name, self._progress)
        tokenizer = load_pretrained(AutoTokenizer, source, self._name)
        return whole_model(self._name, "eager", self._progress), tokenizer

    def bundle(self, layer: int, preset: Quantization) -> Path:
        """Return the folder of a bundle with edge graphs alone, layers [0, layer)."""
        folder = self._folder / f"{preset}-{layer}"
        if not folder.exists():
            with staged(folder, self._progress) as partial:
                self._write(partial, layer, preset)
        return folder

    def _write(self, folder: Path, layer: int, preset: Quantization) -> None:
        if self._model is None:
            source = resolve_model(self._name, self._progress)
            self._model = open_model(source, self._name, self._progress)
        model = self._model
        config = ExportConfig(out=folder, exits=(layer,), model=self._name, quantization=preset)
        info = model_info(Path(self._name).name, model.skeleton, config.max_positions)
        kind: HeadKind = "shared" if layer == info.num_layers else "linear"
        head: ExitHead = new_head(kind, model.skeleton, layer).requires_grad_(False)
        heads = HeadsFile({layer: head}, kind, model_fingerprint(model.skeleton))
        write_edge(
            Assembly(model, info, preset, default_graph_cache()),
            config,
            heads,
            folder / "edge",
            self._progress,
        )
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            model=info,
            exits=config.exits,
            split_layer=layer,
            upload_layer=layer,
            exit_head=kind,
            quantization=preset,
            top_k=config.top_k_of(info.vocab_size),
            thresholds=(1.0,),
            parity={},
            tools=tool_versions(),
            files=tuple(list_files(folder)),
        )
        write_manifest(folder, manifest)
