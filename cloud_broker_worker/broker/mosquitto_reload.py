"""Ways to make a mosquitto read its files again."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fleet.errors import ConfigError

COMMAND_S: Final = 10.0


def reload_by_signal(pid_file: Path) -> Callable[[], None]:
    """Return a function that sends SIGHUP to the process that wrote `pid_file`.

    The function raises ConfigError when there is no such process, and when the signal would end it:
    mosquitto listens before it handles signals.
    """

    def reload() -> None:
        try:
            process = int(pid_file.read_bytes())
            if ends_at_hangup(process):
                raise ConfigError(f"cannot reload mosquitto: process {process} is still starting")
            os.kill(process, signal.SIGHUP)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot reload mosquitto: no process by {pid_file} ({error}); "
                "start it, or give a command with --reload"
            ) from None

    return reload


def ends_at_hangup(process: int) -> bool:
    """Return whether a process neither handles, blocks nor ignores SIGHUP (proc(5)).

    Without such information, as on systems other than Linux, return False.
    """
    try:
        status = Path("/proc", str(process), "status").read_text(encoding="utf-8")
    except OSError:
        return False
    masks = re.findall(r"^Sig(?:Cgt|Blk|Ign):\s*([0-9a-f]+)$", status, re.MULTILINE)
    bit = 1 << (signal.SIGHUP - 1)
    return bool(masks) and not any(int(mask, 16) & bit for mask in masks)


def reload_by_command(command: str) -> Callable[[], None]:
    """Return a function that runs `command`, without a shell.

    The function raises ConfigError when the command fails or takes longer than `COMMAND_S` seconds.
    """
    words = shlex.split(command)

    def reload() -> None:
        try:
            subprocess.run(words, check=True, timeout=COMMAND_S, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.SubprocessError) as error:
            raise ConfigError(f"cannot reload mosquitto: {error}; correct --reload") from None

    return reload
