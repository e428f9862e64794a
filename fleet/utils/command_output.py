"""The standard streams of a command: closed ones, and the output, whose errors name it.

The rest of a failed output is dropped.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Final, TypeGuard

from fleet.errors import ConfigError

STDERR: Final = 2
OUTPUT: Final = "<output>"
"""The file name of an error of the output."""


class _Output(io.FileIO):
    """Standard output, whose errors have the file name `OUTPUT`."""

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        if not data:  # typer looks whether this is a binary stream
            return 0
        try:
            return super().write(data)
        except OSError as error:
            with Path(os.devnull).open("wb") as nowhere:  # Python writes the rest when it ends
                os.dup2(nowhere.fileno(), self.fileno())
            error.filename = OUTPUT
            raise


def open_closed_streams() -> None:
    """Open descriptors 0 to 2 on ``/dev/null`` if they are closed: a file might get their number.

    Standard output stays without a stream, because its lines would be lost; see `check_output`.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(descriptor)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(os.devnull)), "utf-8")
    if sys.stderr is None:
        sys.stderr = io.TextIOWrapper(io.FileIO(os.devnull, "w"), "utf-8", write_through=True)


def check_output() -> None:
    """Raise ConfigError, before the work, if standard output is closed."""
    if sys.stdout is None:
        raise ConfigError(
            "standard output is closed, and what this command prints would be lost; send it to a "
            f"file, or to {os.devnull}"
        )


def name_output() -> None:
    """Give errors of standard output a name, if it is a file, a pipe or a terminal."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper) or not _has_file(stream):
        return
    raw = _Output(stream.fileno(), "wb", closefd=False)
    is_buffered = isinstance(stream.buffer, io.BufferedWriter)  # not with PYTHONUNBUFFERED
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw) if is_buffered else raw,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _has_file(stream: io.TextIOWrapper) -> bool:
    try:
        stream.fileno()
    except OSError:  # a stream in memory
        return False
    return True


def is_output_error(error: BaseException) -> TypeGuard[OSError]:
    """Whether standard output could not be written."""
    return isinstance(error, OSError) and error.filename == OUTPUT
