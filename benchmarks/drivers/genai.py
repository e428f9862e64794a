"""onnxruntime-genai as a driver of the benchmark: a folder of its model builder, on the CPU.

python -m benchmarks.drivers.genai --model FOLDER --threads N
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from benchmarks.drivers.protocol import serve

NUM_POSITIONS = 2048


class GenAi:
    """The driver of onnxruntime-genai; see `benchmarks.drivers.protocol.Peer`."""

    def __init__(self, model: Path, num_threads: int) -> None:
        config = og.Config(str(model))
        options = {"intra_op_num_threads": num_threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)
        self.version = f"onnxruntime-genai {og.__version__}"

    def speed(self, prompt: list[int], new_tokens: int) -> dict[str, float]:
        """Measure its own greedy search, end of sequence ignored.

        The first token comes from the prompt's evaluation.
        """
        generator = self._start(prompt, min_length=len(prompt) + new_tokens + 2)
        generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(new_tokens):
            generator.generate_next_token()
        return {"tokens_per_s": new_tokens / (time.perf_counter() - start)}

    def prefill(self, prompt: list[int]) -> dict[str, float]:
        """Measure a prompt up to its first token."""
        start = time.perf_counter()
        self._start(prompt).generate_next_token()
        return {"tokens_per_s": len(prompt) / (time.perf_counter() - start)}

    def best(self, prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
        """Return the best tokens by its logits."""
        generator = self._start(prompt)
        best = [int(generator.get_logits()[0, -1].argmax())]
        for token_id in answer[:-1]:
            generator.append_tokens(np.array([token_id], np.int32))
            best.append(int(generator.get_logits()[0, -1].argmax()))
        return {"best": best}

    def generate(self, prompt: list[int], new_tokens: int) -> Iterator[dict[str, int]]:
        """Yield the tokens of its own greedy search."""
        generator = self._start(prompt, min_length=len(prompt) + new_tokens + 1)
        for _ in range(new_tokens):
            generator.generate_next_token()
            yield {"token_id": int(generator.get_next_tokens()[0])}

    def _start(self, prompt: list[int], **options: Any) -> Any:
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=NUM_POSITIONS, do_sample=False, **options)
        generator = og.Generator(self._model, params)
        generator.append_tokens(np.array(prompt, np.int32))
        return generator


if __name__ == "__main__":
    serve(GenAi, __doc__)
