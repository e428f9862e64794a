"""The common protocol of all drivers: load, report readiness, and answer JSON lines on stdin.

The drivers of the peers run in an environment without this project's dependencies: this module uses
the standard library only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """A whole model, ready to run."""

    version: str

    def speed(self, prompt: list[int], new_tokens: int) -> Mapping[str, Any]:
        """Return `tokens_per_s` of `new_tokens` greedy steps after the prompt.

        Each step is one evaluation of one position.
        """

    def prefill(self, prompt: list[int]) -> Mapping[str, Any]:
        """Return `tokens_per_s` of a prompt up to its first token; no earlier prompt is kept."""

    def best(self, prompt: list[int], answer: list[int]) -> Mapping[str, Any]:
        """Return `best`, the best next token at each position of a given answer."""


class Peer(Engine, Protocol):
    """An engine that answers prompts as well."""

    def generate(self, prompt: list[int], new_tokens: int) -> Iterator[Mapping[str, Any]]:
        """Yield `token_id` of each of `new_tokens` greedy tokens; end of sequence is ignored."""


def serve(load: Callable[[Path, int], Engine], description: str | None) -> None:
    """Serve the result of ``load(model, threads)`` of the command line; see `serve_lines`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    serve_lines(lambda: load(arguments.model, arguments.threads))


def serve_lines(load: Callable[[], Any]) -> None:
    """Serve the public methods of the result of `load`, which has a `version`, until stdin ends.

    It may have `instruction_sets`, those that it was built for. Each line requests one of the
    methods with its arguments, ``{"op": "speed", "prompt": [...],
    "new_tokens": 128}``. The response is one line, ``{"error": "..."}`` if it fails. For an
    iterator it is a line for each item, and ``{"done": true}``. All other output goes to stderr.
    """
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def send(answer: Mapping[str, Any]) -> None:
            print(json.dumps(answer), file=out, flush=True)

        engine = load()
        send({"ready": engine.version, "instruction_sets": built_for(engine)})
        for line in sys.stdin:
            request = json.loads(line)
            operation = request.pop("op")
            try:
                for answer in answers(getattr(engine, operation)(**request)):
                    send(answer)
            except Exception as error:  # noqa: BLE001  report any failure to the benchmark
                send({"error": f"{type(error).__name__}: {error}"})


def answers(result: Any) -> Iterable[Mapping[str, Any]]:
    """Return the lines of an operation's result."""
    if not isinstance(result, Iterator):
        return [result]
    return itertools.chain(result, [{"done": True}])


def built_for(engine: Any) -> list[str]:
    """Return the instruction sets that an engine was built for; none if it chooses when it runs."""
    return list(getattr(engine, "instruction_sets", ()))
