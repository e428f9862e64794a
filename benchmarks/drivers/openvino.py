"""OpenVINO GenAI as a driver of the benchmark: a GGUF file, on the CPU, with its own defaults.

python -m benchmarks.drivers.openvino --model FILE.gguf --threads N
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai

from benchmarks.drivers.protocol import serve


class OpenVino:
    """The driver of OpenVINO GenAI; see `benchmarks.drivers.protocol.Engine`."""

    def __init__(self, model: Path, num_threads: int) -> None:
        options = {"INFERENCE_NUM_THREADS": num_threads, "PERFORMANCE_HINT": "LATENCY"}
        self._pipeline = openvino_genai.LLMPipeline(str(model), "CPU", **options)
        self._num_prompts = 0
        self.version = f"openvino-genai {openvino_genai.__version__}"

    def speed(self, prompt: list[int], new_tokens: int) -> dict[str, float]:
        """Measure by its own times of the tokens after the first one."""
        times = self._generate(prompt, new_tokens + 1).perf_metrics.raw_metrics.m_new_token_times
        return {"tokens_per_s": new_tokens / (times[-1] - times[0]) * 1000}

    def prefill(self, prompt: list[int]) -> dict[str, float]:
        """Measure a prompt up to its first token; its first id differs from all before.

        The pipeline would reuse the beginning of an earlier prompt.
        """
        self._num_prompts += 1
        start = time.perf_counter()
        self._generate([prompt[0] + self._num_prompts, *prompt[1:]], 1)
        return {"tokens_per_s": len(prompt) / (time.perf_counter() - start)}

    def best(self, prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
        """Return the best tokens by one request a position."""
        texts = [prompt + answer[:i] for i in range(len(answer))]
        return {"best": [int(self._generate(text, 1).tokens[0][0]) for text in texts]}

    def _generate(self, prompt: list[int], num_tokens: int) -> Any:
        """Generate greedily, end of sequence ignored."""
        ids = np.array([prompt], np.int64)
        inputs = openvino_genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = num_tokens
        config.ignore_eos = True
        config.do_sample = False
        return self._pipeline.generate(inputs, config)


if __name__ == "__main__":
    serve(OpenVino, __doc__)
