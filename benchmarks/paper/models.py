"""The models of the paper's experiments: deployed bundle, whole model, and a float32 edge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.partitions import CloudPartitions
from benchmarks.peers import llama_cpp, peers
from fleet.bundles.manifest import Bundle
from onnx_export.bundle import export_bundle
from onnx_export.checkpoint import cache_folder, is_gguf
from onnx_export.config import DEFAULT_MODEL, ExportConfig
from onnx_export.fingerprints import source_digest

PeerName = tuple[str, str]
LLAMA_CPP: Final[PeerName] = ("llama.cpp", "Q4_1")
GENAI: Final[PeerName] = ("onnxruntime-genai", "int4")


class PaperModels:
    """Makes missing models, each once, in `folder`.

    That of the default model is in the user's cache.
    """

    def __init__(
        self,
        bundle: Bundle,
        progress: Callable[[str], None],
        *,
        model: str = DEFAULT_MODEL,
        heads: Path | None = None,
        folder: Path | None = None,
    ) -> None:
        """Use a `bundle` of `model` with the exit `heads`; see `ExportConfig`."""
        self.bundle = bundle
        self._progress = progress
        self._model = model
        self._heads = heads
        self._folder = folder or cache_folder() / "bench" / source_digest()[:16]

    def peers(self) -> dict[PeerName, list[str]]:
        """Return the commands of other projects' engines, each with one thread.

        For a model in a GGUF file it is llama.cpp alone.
        """
        if is_gguf(self._model):
            return {LLAMA_CPP: llama_cpp(Path(self._model), 1, self._progress)}
        return peers(1, self._progress)

    def whole(self) -> Bundle:
        """Return every layer in float32, for the cloud."""
        partitions = CloudPartitions(
            self.bundle.manifest, self._progress, self._model, self._folder
        )
        return partitions.bundle(0)

    def float32(self) -> PaperModels:
        """Return the same split with its edge in float32 as well.

        The thresholds are those of the deployed one.
        """
        manifest = self.bundle.manifest
        exits = "-".join(map(str, manifest.exits))
        folder = self._folder / f"float32-{manifest.bundle_id[:16]}-{exits}"
        if not folder.exists():
            export_bundle(
                ExportConfig(
                    out=folder,
                    exits=manifest.exits,
                    model=self._model,
                    heads=self._heads,
                    split_layer=manifest.split_layer,
                    uploads=manifest.upload_layers,
                    quantization="fp32",
                    thresholds=manifest.thresholds,
                    max_positions=manifest.model.max_positions,
                ),
                self._progress,
            )
        bundle = Bundle.load(folder)
        return PaperModels(
            bundle, self._progress, model=self._model, heads=self._heads, folder=self._folder
        )
