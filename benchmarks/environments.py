"""Environments of other engines, apart from the project's own, made once in the user's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from fleet.errors import FleetError
from onnx_export.atomic_folder import staged

INSTALL_TIMEOUT_S: Final = 3600.0
BUILD_TIMEOUT_S: Final = 900.0

Progress = Callable[[str], None]


def environment(folder: Path, packages: Sequence[str], progress: Progress) -> Path:
    """Return the Python of a virtual environment with `packages`, which is made once."""
    if not folder.exists():
        with staged(folder, progress) as partial:
            progress(
                f"installing {', '.join(packages)} into a separate environment "
                "(once, a few minutes)"
            )
            call(
                "make the peers' environment",
                [sys.executable, "-m", "venv", str(partial)],
                BUILD_TIMEOUT_S,
            )
            pip = [
                str(partial / "bin" / "python"),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
            ]
            call("install the peers", [*pip, *packages], INSTALL_TIMEOUT_S)
    return folder / "bin" / "python"


def call(
    purpose: str,
    command: Sequence[str],
    timeout_s: float,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Run a command to its end.

    Raises:
        FleetError: it fails or takes too long; the message has its last line of output.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=os.environ | (variables or {}),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FleetError(
            f"cannot {purpose} within {timeout_s:g} s; try again, or pass --no-peers"
        ) from None
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise FleetError(
            f"cannot {purpose}: {reason}; check the network and the disk, or pass --no-peers"
        )
