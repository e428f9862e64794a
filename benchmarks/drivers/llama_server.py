"""The common part of both drivers of llama.cpp: greedy requests to its own server on loopback."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.request import Request, urlopen

NUM_POSITIONS: Final = 2048
TIMEOUT_S: Final = 120.0
FEATURE: Final = re.compile(r"(\w+) = 1\b")


class LlamaServer:
    """A server with one slot; see `benchmarks.drivers.protocol.Peer`.

    The replies of its Python interfaces have no token ids, so it is asked over HTTP.
    """

    def __init__(self, url: str, version: str, instruction_sets: list[str]) -> None:
        self.version = f"{version} ({', '.join(instruction_sets)})"
        self.instruction_sets = instruction_sets
        self._url = url

    def speed(self, prompt: list[int], new_tokens: int) -> dict[str, float]:
        """Measure by its own timings, which leave out the first token.

        That one comes from the prompt's evaluation.
        """
        timings = self._complete(prompt, new_tokens + 1, ignore_eos=True)["timings"]
        if timings["predicted_n"] != new_tokens + 1:
            raise RuntimeError(f"expected {new_tokens + 1} tokens, got {timings['predicted_n']}")
        return {"tokens_per_s": new_tokens / timings["predicted_ms"] * 1000}

    def prefill(self, prompt: list[int]) -> dict[str, float]:
        """Measure the prompt's evaluation by its own timings."""
        timings = self._complete(prompt, 1, cache_prompt=False)["timings"]
        if timings["prompt_n"] != len(prompt):
            raise RuntimeError(f"expected {len(prompt)} positions, got {timings['prompt_n']}")
        return {"tokens_per_s": len(prompt) / timings["prompt_ms"] * 1000}

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
        options = {"cache_prompt": False, "ignore_eos": True}
        for part in self._stream(prompt, new_tokens, **options):
            for token_id in [] if part.get("stop") else part["tokens"]:
                yield {"token_id": token_id}

    def respond(self, prompt: list[int], new_tokens: int, *, reuse: bool) -> dict[str, Any]:
        """Return a whole answer, the time to its first token, and the number of reused positions.

        With `reuse`, positions of the earlier prompt and its answer are not computed again.
        """
        token_ids: list[int] = []
        text = ""
        ttft_s = 0.0
        began = time.perf_counter()
        for part in self._stream(prompt, new_tokens, cache_prompt=reuse):
            ttft_s = ttft_s or time.perf_counter() - began
            text += part["content"]
            token_ids += [] if part["stop"] else part["tokens"]
        return {
            "token_ids": token_ids,
            "text": text,
            "ttft_ms": 1e3 * ttft_s,
            "reused_tokens": len(prompt) - part["timings"]["prompt_n"],
        }

    def _stream(
        self, prompt: list[int], num_tokens: int, **options: Any
    ) -> Iterator[Mapping[str, Any]]:
        with self._post(prompt, num_tokens, stream=True, **options) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    yield json.loads(line.removeprefix(b"data: "))

    def _complete(self, prompt: list[int], num_tokens: int, **options: Any) -> dict[str, Any]:
        with self._post(prompt, num_tokens, **options) as response:
            reply: dict[str, Any] = json.load(response)
        return reply

    def _post(self, prompt: list[int], num_tokens: int, **options: Any) -> Any:
        request = {
            "prompt": prompt,
            "n_predict": num_tokens,
            "temperature": 0,
            "cache_prompt": True,
        }
        body = json.dumps(request | {"return_tokens": True} | options).encode()
        headers = {"Content-Type": "application/json"}
        return urlopen(Request(f"{self._url}/completion", body, headers), timeout=TIMEOUT_S)
