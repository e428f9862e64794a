"""Traces of layers that the exports of one test module share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import pytest

from fleet.bundles.manifest import ModelInfo
from onnx_export.heads import ExitHead
from onnx_export.partition import export_block


@contextmanager
def shared_traces() -> Iterator[None]:
    """Trace equal layers once: a trace has no weights, and no quantisation yet."""
    graphs: dict[str, bytes] = {}

    def export_once(
        model: Any, layers: tuple[int, int], head: ExitHead, info: ModelInfo
    ) -> onnx.ModelProto:
        config = model.config.to_dict() | {"_name_or_path": ""}
        shapes = [(name, tuple(value.shape)) for name, value in head.state_dict().items()]
        key = repr((layers, head.kind, shapes, config, info))
        if key not in graphs:
            graphs[key] = export_block(model, layers, head, info).SerializeToString()
        return onnx.load_model_from_string(graphs[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnx_export.assembly.export_block", export_once)
        yield
