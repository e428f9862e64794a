"""What every driver does the same way: it loads, says so, and answers JSON lines until its input ends.

The drivers of the peers run in an environment without this project's dependencies: only the standard library here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """A whole model, ready to run."""

    version: str

    def speed(self, prompt: list[int], new_tokens: int) -> Mapping[str, Any]:
        """`tokens_per_s` of `new_tokens` greedy steps after the prompt, each one evaluation of one position."""

    def best(self, prompt: list[int], answer: list[int]) -> Mapping[str, Any]:
        """`best`, the best next token at each position of a given answer."""


def serve(load: Callable[[Path, int], Engine], description: str | None) -> None:
    """Serves the public methods of what ``load(model, threads)`` gives, until stdin ends.

    Each line asks for one of them with its arguments, ``{"op": "speed", "prompt": [...], "new_tokens": 128}``, and is
    answered with one line, ``{"error": "..."}`` where it fails. Whatever else is printed goes to stderr.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def say(answer: Mapping[str, Any]) -> None:
            print(json.dumps(answer), file=out, flush=True)

        engine = load(arguments.model, arguments.threads)
        say({"ready": engine.version})
        for line in sys.stdin:
            request = json.loads(line)
            operation = request.pop("op")
            try:
                say(getattr(engine, operation)(**request))
            except Exception as error:  # noqa: BLE001  whatever it is, the benchmark has to hear of it
                say({"error": f"{type(error).__name__}: {error}"})
