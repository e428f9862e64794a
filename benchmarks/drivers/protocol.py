"""What every driver does the same way: it loads, says so, and answers JSON lines until its input ends.

The drivers of the peers run in an environment without this project's dependencies: only the standard library here.
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
        """`tokens_per_s` of `new_tokens` greedy steps after the prompt, each one evaluation of one position."""

    def best(self, prompt: list[int], answer: list[int]) -> Mapping[str, Any]:
        """`best`, the best next token at each position of a given answer."""


class Peer(Engine, Protocol):
    """One that answers prompts as well."""

    def generate(self, prompt: list[int], new_tokens: int) -> Iterator[Mapping[str, Any]]:
        """`token_id` of each of `new_tokens` greedy tokens, at once; end of sequence is ignored."""


def serve(load: Callable[[Path, int], Engine], description: str | None) -> None:
    """Serves what ``load(model, threads)`` gives, both from the command line; see `serve_lines`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    serve_lines(lambda: load(arguments.model, arguments.threads))


def serve_lines(load: Callable[[], Any]) -> None:
    """Serves the public methods of what `load` gives, until stdin ends; it has a `version`.

    Each line asks for one of them with its arguments, ``{"op": "speed", "prompt": [...], "new_tokens": 128}``, and is
    answered with one line, ``{"error": "..."}`` where it fails. An iterator is answered with a line for each item, and
    ``{"done": true}``. Whatever else is printed goes to stderr.
    """
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def say(answer: Mapping[str, Any]) -> None:
            print(json.dumps(answer), file=out, flush=True)

        engine = load()
        say({"ready": engine.version})
        for line in sys.stdin:
            request = json.loads(line)
            operation = request.pop("op")
            try:
                for answer in answers(getattr(engine, operation)(**request)):
                    say(answer)
            except Exception as error:  # noqa: BLE001  whatever it is, the benchmark has to hear of it
                say({"error": f"{type(error).__name__}: {error}"})


def answers(result: Any) -> Iterable[Mapping[str, Any]]:
    """The lines that an operation's result makes."""
    if not isinstance(result, Iterator):
        return [result]
    return itertools.chain(result, [{"done": True}])
