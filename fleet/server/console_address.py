"""The address of the console, in a file of the fleet's folder while the server runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fleet.utils.atomic_files import write_file

FILE: Final = "console.url"
MAX_CHARS: Final = 500


@contextmanager
def published_console_url(folder: Path, url: str) -> Iterator[None]:
    """Keep the URL in the folder of the fleet until the block ends."""
    file = folder / FILE
    write_file(file, url.encode())
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def console_url(folder: Path) -> str | None:
    """Return the URL of the console that runs for this folder; None without one.

    A server that was killed has left its URL there.
    """
    try:
        return (folder / FILE).read_text(encoding="utf-8")[:MAX_CHARS].strip() or None
    except (OSError, UnicodeDecodeError):
        return None
