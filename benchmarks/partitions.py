"""Cloud partitions for measurements: a model's layers from any one on, the first included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from fleet.bundles.manifest import Bundle, Manifest, write_manifest
from onnx_export.atomic_folder import staged
from onnx_export.bundle import list_files
from onnx_export.checkpoint import cache_folder, resolve_model
from onnx_export.cloud import write_cloud
from onnx_export.config import DEFAULT_MODEL
from onnx_export.fingerprints import source_digest
from onnx_export.streamed_model import StreamedModel, open_model


class CloudPartitions:
    """Makes partitions, each once; those of the default model are kept in the user's cache."""

    def __init__(
        self,
        manifest: Manifest,
        progress: Callable[[str], None],
        model: str = DEFAULT_MODEL,
        folder: Path | None = None,
        stream: StreamedModel | None = None,
    ) -> None:
        """Use the `manifest` of a bundle of `model`; `stream` is one that has no checkpoint."""
        self._manifest = manifest
        self._progress = progress
        self._name = model
        self._folder = folder or cache_folder() / "bench" / source_digest()[:16]
        self._model = stream

    def bundle(self, layer: int) -> Bundle:
        """Return a bundle with the cloud's side alone, layers [layer, num_layers)."""
        folder = self._folder / f"cloud-{layer}"
        if not folder.exists():
            with staged(folder, self._progress) as partial:
                self._write(partial, layer)
        return Bundle.load(folder)

    def _write(self, folder: Path, layer: int) -> None:
        if self._model is None:
            source = resolve_model(self._name, self._progress)
            self._model = open_model(source, self._name, self._progress)
        self._progress(f"writing layers [{layer}, {self._manifest.model.num_layers}) for the cloud")
        write_cloud(self._model, layer, folder / "cloud")
        manifest = msgspec.structs.replace(
            self._manifest, upload_layer=layer, files=tuple(list_files(folder))
        )
        write_manifest(folder, manifest)
