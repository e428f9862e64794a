"""llama.cpp as a driver of the benchmark, through xllamacpp: a GGUF file, on the CPU alone.

    python -m benchmarks.drivers.llama_cpp --model FILE.gguf --threads N

Its prebuilt wheel is made for any x86-64 machine with AVX2; `version` has the instructions.
"""

from __future__ import annotations

from pathlib import Path

import xllamacpp

from benchmarks.drivers.llama_server import FEATURE, NUM_POSITIONS, LlamaServer
from benchmarks.drivers.protocol import serve


class LlamaCpp(LlamaServer):
    """The driver of llama.cpp; see `benchmarks.drivers.protocol.Peer`."""

    def __init__(self, model: Path, num_threads: int) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx = NUM_POSITIONS
        params.n_gpu_layers = 0
        params.n_parallel = 1
        params.cache_ram_mib = 0  # else it keeps every earlier prompt
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
        self._server = xllamacpp.Server(params)
        super().__init__(
            self._server.listening_address,
            f"xllamacpp {xllamacpp.__version__}",
            FEATURE.findall(xllamacpp.get_system_info()),
        )


if __name__ == "__main__":
    serve(LlamaCpp, __doc__)
