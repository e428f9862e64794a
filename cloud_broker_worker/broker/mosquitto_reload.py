"""How a mosquitto is told to read its files again."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fleet.errors import ConfigError

COMMAND_S: Final = 10.0


def by_signal(pid_file: Path) -> Callable[[], None]:
    """SIGHUP to the process that wrote `pid_file`. It raises ConfigError when there is none."""

    def reload() -> None:
        try:
            os.kill(int(pid_file.read_text()), signal.SIGHUP)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"mosquitto cannot be told of a change: no process by {pid_file} ({error}); "
                "start it, or say how with --reload"
            ) from None

    return reload


def by_command(command: str) -> Callable[[], None]:
    """Runs `command`, without a shell. It raises ConfigError when that fails or takes longer than ten seconds."""
    words = shlex.split(command)

    def reload() -> None:
        try:
            subprocess.run(words, check=True, timeout=COMMAND_S, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.SubprocessError) as error:
            raise ConfigError(
                f"mosquitto cannot be told of a change: {error}; correct --reload"
            ) from None

    return reload
