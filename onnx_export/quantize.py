"""Weight-only quantisation of edge graphs."""

from __future__ import annotations

import logging

import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from onnxruntime.quantization.quant_utils import QuantFormat

from onnx_export.config import Quantization

BLOCK_SIZE = 32
INT8_COMPUTE = 4  # MatMulNBits: int8 activations and int32 sums


def quantize(graph: onnx.ModelProto, preset: Quantization) -> onnx.ModelProto:
    """``int8``: every MatMul with a constant weight as symmetric MatMulNBits. ``fp32``: nothing."""
    if preset == "fp32":
        return graph
    config = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK_SIZE,
        is_symmetric=True,
        accuracy_level=INT8_COMPUTE,
        bits=8,
        quant_format=QuantFormat.QOperator,
        op_types_to_quantize=("MatMul",),
    )
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    quantizer = MatMulNBitsQuantizer(graph, algo_config=config)
    quantizer.process()
    result: onnx.ModelProto = quantizer.model.model
    return result
