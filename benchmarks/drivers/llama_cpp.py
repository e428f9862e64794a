"""llama.cpp as a driver of the benchmark, through xllamacpp: a GGUF file, on the CPU alone.

    python -m benchmarks.drivers.llama_cpp --model FILE.gguf --threads N

Its prebuilt wheel is made for any x86-64 machine with AVX2; `version` has the instructions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import xllamacpp

from benchmarks.drivers.protocol import serve

NUM_POSITIONS = 2048
TIMEOUT_S = 120.0


class LlamaCpp:
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
        instructions = [
            part.strip() for part in xllamacpp.get_system_info().removeprefix("CPU :").split("|")
        ]
        built_for = ", ".join(
            part.removesuffix(" = 1") for part in instructions if part.endswith(" = 1")
        )
        self.version = f"xllamacpp {xllamacpp.__version__} ({built_for})"

    def speed(self, prompt: list[int], new_tokens: int) -> dict[str, float]:
        """Measure by its own timings, which leave out the first token.

        That one comes from the prompt's evaluation.
        """
        timings = self._complete(prompt, new_tokens + 1, ignore_eos=True)["timings"]
        if timings["predicted_n"] != new_tokens + 1:
            raise RuntimeError(f"expected {new_tokens + 1} tokens, got {timings['predicted_n']}")
        return {"tokens_per_s": new_tokens / timings["predicted_ms"] * 1000}

    def best(self, prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
        """Return the best tokens by one request a position.

        Each costs one step: the positions shared with the request before are in the cache.
        """
        return {
            "best": [
                self._complete(prompt + answer[:i], 1)["tokens"][0] for i in range(len(answer))
            ]
        }

    def generate(self, prompt: list[int], new_tokens: int) -> Iterator[dict[str, int]]:
        """Yield the tokens as its server streams them; no earlier prompt is kept."""
        options = {"cache_prompt": False, "stream": True, "ignore_eos": True}
        with self._post(prompt, new_tokens, **options) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                part = json.loads(line.removeprefix(b"data: "))
                for token_id in [] if part.get("stop") else part["tokens"]:
                    yield {"token_id": token_id}

    def _complete(self, prompt: list[int], num_tokens: int, **options: Any) -> dict[str, Any]:
        with self._post(prompt, num_tokens, **options) as response:
            reply: dict[str, Any] = json.load(response)
        return reply

    def _post(self, prompt: list[int], num_tokens: int, **options: Any) -> Any:
        """Post a greedy request to its own server on loopback.

        The reply of the Python call has no token ids.
        """
        request = {
            "prompt": prompt,
            "n_predict": num_tokens,
            "temperature": 0,
            "cache_prompt": True,
        }
        body = json.dumps(request | {"return_tokens": True} | options).encode()
        url = f"{self._server.listening_address}/completion"
        return urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=TIMEOUT_S)


if __name__ == "__main__":
    serve(LlamaCpp, __doc__)
