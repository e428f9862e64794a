"""Traces of layers that the exports of one test module share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import pytest

from fleet.bundles.manifest import ModelInfo
from onnx_export.heads import ExitHead
from onnx_export.partition import export_block, export_lm_head

NOT_IN_TRACES = ("_name_or_path", "rope_scaling", "rope_theta", "max_position_embeddings")
"""Settings that change a graph's weights alone: the tables of angles are weights."""


@contextmanager
def shared_traces() -> Iterator[None]:
    """Trace equal layers once: a trace has no weights, and no quantisation yet."""
    graphs: dict[str, bytes] = {}

    def export_once(
        model: Any, layers: tuple[int, int], head: ExitHead, info: ModelInfo
    ) -> onnx.ModelProto:
        config = model.config.to_dict() | dict.fromkeys(NOT_IN_TRACES)
        shapes = [(name, tuple(value.shape)) for name, value in head.state_dict().items()]
        key = repr((layers, head.kind, shapes, config, info))
        if key not in graphs:
            graphs[key] = export_block(model, layers, head, info).SerializeToString()
        return onnx.load_model_from_string(graphs[key])

    def export_lm_head_once(*args: Any) -> onnx.ModelProto:
        key = repr(args)
        if key not in graphs:
            graphs[key] = export_lm_head(*args).SerializeToString()
        return onnx.load_model_from_string(graphs[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnx_export.assembly.export_block", export_once)
        patch.setattr("onnx_export.assembly.export_lm_head", export_lm_head_once)
        yield
