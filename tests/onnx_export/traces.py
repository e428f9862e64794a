"""Traces of layers that the exports of one test module share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import pytest

from fleet.bundles.manifest import ModelInfo
from onnx_export.graph_cache import graph_key
from onnx_export.heads import ExitHead
from onnx_export.partition import export_block


@contextmanager
def shared_traces() -> Iterator[None]:
    """Trace equal layers once: bundles that differ in their quantisation have the same trace."""
    graphs: dict[str, bytes] = {}

    def export_once(
        model: Any, layers: tuple[int, int], head: ExitHead, info: ModelInfo
    ) -> onnx.ModelProto:
        tensors = dict(model.model.layers[slice(*layers)].state_dict())
        tensors |= {f"head.{name}": value for name, value in head.state_dict().items()}
        config = model.config.to_dict() | {"_name_or_path": ""}
        key = graph_key(tensors, layers=layers, kind=head.kind, config=config, info=info)
        if key not in graphs:
            graphs[key] = export_block(model, layers, head, info).SerializeToString()
        return onnx.load_model_from_string(graphs[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnx_export.assembly.export_block", export_once)
        yield
