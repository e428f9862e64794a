"""The model's lower layers in ONNX Runtime: blocks between exits, and the LM head that all exits share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from fleet.errors import BundleError
from fleet.manifest import Bundle

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

PROVIDERS: Final = ("CUDAExecutionProvider", "CPUExecutionProvider")


@dataclass(frozen=True)
class Candidates:
    """What an exit says of the next token: ids [k] int64 and log-probabilities [k] float32, best first."""

    token_ids: Int64
    logprobs: Float32
    confidence: float


class Partition:
    """The graphs of a bundle, loaded once and shared by every sequence on the device."""

    def __init__(self, bundle: Bundle, num_threads: int) -> None:
        """Raises BundleError when ONNX Runtime cannot load a graph."""
        self.manifest = bundle.manifest
        self.blocks = [
            _load(bundle.path(f"edge/block_{i}.onnx"), num_threads) for i in range(len(bundle.manifest.exits))
        ]
        self._lm_head = _load(bundle.path("edge/lm_head.onnx"), num_threads)

    def candidates(self, exit_hidden: Float32) -> Candidates:
        """The LM head on exit_hidden [1, hidden] float32."""
        ids, logprobs, confidence = self._lm_head.run(
            ["top_ids", "top_logprobs", "confidence"], {"exit_hidden": exit_hidden}
        )
        return Candidates(ids[0], logprobs[0], float(confidence[0]))


def _load(path: Path, num_threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the device also waits on the network
    available = set(ort.get_available_providers())
    try:
        return ort.InferenceSession(path, options, providers=[p for p in PROVIDERS if p in available])
    except Exception as error:  # noqa: BLE001  ONNX Runtime's errors have no common type of their own
        raise BundleError(
            f"ONNX Runtime {ort.__version__} cannot load {path}: {error}; export the bundle again"
        ) from None
