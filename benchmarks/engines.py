"""Engines in processes of their own, controlled by JSON lines, each response with a deadline."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final, Self

from fleet.errors import FleetError

ROOT: Final = Path(__file__).parents[1]
LOAD_TIMEOUT_S: Final = 300.0
ANSWER_TIMEOUT_S: Final = 900.0
STOP_TIMEOUT_S: Final = 10.0


class EngineProcess:
    """One engine's process. Use it as a context manager.

    `instruction_sets` are those that it was built for; an engine that chooses them when it runs has
    none.
    """

    version = ""
    instruction_sets: tuple[str, ...] = ()

    def __init__(self, name: str, command: Sequence[str], *, wait: bool = True) -> None:
        """Start the process; with ``wait=False`` it still loads when this returns.

        Raises:
            FleetError: it does not start.
        """
        self.name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,  # the peers' environment imports the drivers from here
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._errors: deque[str] = deque(maxlen=20)
        readers = [
            threading.Thread(target=forward_lines, args=(stream, read), daemon=True)
            for read, stream in (
                (self._lines.put, self._process.stdout),
                (self._errors.append, self._process.stderr),
            )
        ]
        for reader in readers:
            reader.start()
        self._error_reader = readers[1]
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Return when it has loaded; close it otherwise.

        Raises:
            FleetError: it ended, or did not load in time.
        """
        try:
            line = self._answer(LOAD_TIMEOUT_S)
            self.version = str(line["ready"])
            self.instruction_sets = tuple(line.get("instruction_sets", ()))
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status of the process; None while it runs."""
        return self._process.poll()

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and return the response.

        Raises:
            FleetError: the engine reports a failure, ended, or did not respond in time.
        """
        self._request(op, arguments)
        return self._answer(ANSWER_TIMEOUT_S)

    def stream(self, op: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """Send one request and yield its responses, which must be read to the end.

        Raises:
            FleetError: as for `ask`.
        """
        self._request(op, arguments)
        while "done" not in (answer := self._answer(ANSWER_TIMEOUT_S)):
            yield answer

    def _request(self, op: str, arguments: dict[str, Any]) -> None:
        stdin = self._process.stdin
        if stdin is None:
            raise FleetError(f"{self.name} was closed")
        try:
            stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise FleetError(f"{self.name} gave no answer within {timeout_s:g} s") from None
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise FleetError(f"{self.name} failed: {answer['error']}")
        return answer

    def _ended(self) -> FleetError:
        status = self._process.wait(STOP_TIMEOUT_S)
        # The last lines of stderr may arrive after the end of the responses.
        self._error_reader.join(STOP_TIMEOUT_S)
        output = " ".join("".join(self._errors).split())[-400:]
        return FleetError(f"{self.name} ended with status {status}: {output or 'no output'}")

    def close(self) -> None:
        """End the process, by force when it does not end by itself."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def forward_lines(stream: IO[str], read: Any) -> None:
    """Pass every line to `read`, and an empty one at the end."""
    with stream:
        for line in stream:
            read(line)
    read("")
