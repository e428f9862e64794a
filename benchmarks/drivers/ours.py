"""Our engine as a driver of the benchmark: an edge bundle, controlled by JSON lines on stdin.

    python -m benchmarks.drivers.ours --model BUNDLE --threads N

A bundle whose only exit is the model's last layer is the whole model; the last block's candidates
are then its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort

from benchmarks.drivers.protocol import serve
from fleet.bundles.manifest import Bundle
from fleet.graphs.cascade import Cascade
from fleet.graphs.partition import ExitCandidates, Partition

WARM_UP: Final = 10  # answers until the allocators have what they need


class OurEngine:
    """The driver of our engine; extends `benchmarks.drivers.protocol.Engine`."""

    version = f"onnxruntime {ort.__version__}"

    def __init__(self, bundle: Path, num_threads: int) -> None:
        self.partition = Partition(Bundle.load(bundle, ("edge",)), num_threads)

    def start(self, prompt: Sequence[int], room: int) -> tuple[Cascade, ExitCandidates]:
        """Start a sequence with its prompt and room for `room` more positions."""
        cascade = Cascade(self.partition, len(prompt) + room)
        cascade.append(prompt)
        return cascade, self.run(cascade)

    def run(self, cascade: Cascade) -> ExitCandidates:
        """Run every block over the new positions."""
        for block in range(len(self.partition.blocks)):
            candidates = cascade.run(block)
        return candidates

    def step(self, cascade: Cascade, token_id: int) -> int:
        """Append one token and return the best next one."""
        cascade.append([token_id])
        return int(self.run(cascade).token_ids[0])

    def speed(self, prompt: Sequence[int], new_tokens: int) -> dict[str, float]:
        """Measure greedy tokens per second after the prompt, end of sequence ignored."""
        cascade, candidates = self.start(prompt, new_tokens)
        token_id = int(candidates.token_ids[0])
        start = time.perf_counter()
        for _ in range(new_tokens):
            token_id = self.step(cascade, token_id)
        return {"tokens_per_s": new_tokens / (time.perf_counter() - start)}

    def prefill(self, prompt: Sequence[int]) -> dict[str, float]:
        """Measure a prompt up to its first token."""
        start = time.perf_counter()
        self.start(prompt, 1)
        return {"tokens_per_s": len(prompt) / (time.perf_counter() - start)}

    def best(self, prompt: Sequence[int], answer: Sequence[int]) -> dict[str, list[int]]:
        """Return the best next token at each position of a given answer."""
        cascade, candidates = self.start(prompt, len(answer))
        following = [self.step(cascade, token_id) for token_id in answer[:-1]]
        return {"best": [int(candidates.token_ids[0]), *following]}

    def candidates(self, prompt: Sequence[int], answer: Sequence[int]) -> dict[str, Any]:
        """Return the best three tokens at each position of an answer, and log-probabilities."""
        cascade, first = self.start(prompt, len(answer))
        found = [first]
        for token_id in answer[:-1]:
            cascade.append([token_id])
            found.append(self.run(cascade))
        rows = [zip(best.token_ids[:3], best.logprobs[:3], strict=True) for best in found]
        return {"candidates": [[(int(i), round(float(p), 4)) for i, p in row] for row in rows]}

    def step_ms(self, prompt: Sequence[int], steps: int) -> dict[str, float]:
        """Return the median time of one step, in ms."""
        cascade, candidates = self.start(prompt, steps)
        token_id = int(candidates.token_ids[0])
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            token_id = self.step(cascade, token_id)
            times.append(time.perf_counter() - start)
        return {"ms": statistics.median(times) * 1000}

    def growth(self, prompt: Sequence[int], answers: int, new_tokens: int) -> dict[str, float]:
        """Return the change of the resident memory, in MB, over answers of a fresh sequence each.

        `WARM_UP` answers come before them.
        """
        for _ in range(WARM_UP):
            self.speed(prompt, new_tokens)
        before = resident_mb()
        for _ in range(answers):
            self.speed(prompt, new_tokens)
        return {kind: after - before[kind] for kind, after in resident_mb().items()}


def resident_mb() -> dict[str, float]:
    """Return the resident memory of this process in MB of 10^6 bytes.

    `own` is anonymous memory, `mapped` that of mapped files.
    """
    status = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    )
    names = {"own": "RssAnon", "mapped": "RssFile"}
    return {kind: int(status[name].split()[0]) * 1024 / 1e6 for kind, name in names.items()}


if __name__ == "__main__":
    serve(OurEngine, __doc__)
