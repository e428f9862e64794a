"""Paths and names of this system that need not exist: a user's home, a user's name."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Final

import platformdirs

from fleet.errors import ConfigError
from fleet.utils.printable import command_line

PROJECT: Final = "cecollm-fleet"
DEVICES: Final = "/dev"  # a pipe there (/dev/fd/63) is a link of the kernel, with no target
NO_CURRENT_FOLDER: Final = "the current folder no longer exists; cd to another one"


def absolute_path(path: Path) -> Path:
    """Return `path` without ``~`` and ``..``, from the root on; a pipe (``/dev/fd/63``) stays.

    Raises:
        ConfigError: it begins with ``~`` and this user has no home folder.
    """
    return path if path.is_relative_to(DEVICES) else expand_home(path).resolve()


def expand_home(path: Path) -> Path:
    """Return `path` with the user's home folder in place of ``~``. Raises ConfigError without."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise _homeless(str(path)) from None


def user_data_folder() -> Path:
    """Return the folder of this project's data of this user. Raises ConfigError without a home."""
    return _user_folder(platformdirs.user_data_path)


def user_cache_folder() -> Path:
    """Return the folder of this project's cache of this user. Raises ConfigError without a home."""
    return _user_folder(platformdirs.user_cache_path)


def _user_folder(find: Callable[[str], Path]) -> Path:
    try:
        path = find(PROJECT)
    except RuntimeError:  # of newer versions of platformdirs; older ones return a path with ~
        raise _homeless(PROJECT) from None
    return absolute_path(path)


def _homeless(path: str) -> ConfigError:
    return ConfigError(
        f"{path}: this user has no home folder; set HOME, or give whole paths (FLEET_HOME, --home, "
        "--bundle)"
    )


def existing_folder(path: Path) -> Path:
    """Return the nearest folder that exists: `path` or one that contains it."""
    return next((each for each in (path, *path.parents) if _is_folder(each)), Path("/"))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except PermissionError:  # below a folder of another user
        return False


def has_current_folder() -> bool:
    """Whether the current folder exists; it may have been deleted."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


def describe_absence(path: Path) -> str:
    """Return the words for a path that is no file: it is missing, or a folder."""
    return "is a folder, expected a file" if path.is_dir() else "is missing"


def rights_remedy(path: Path) -> str:
    """Return the next step for a file that this user may not use."""
    try:
        owner = user_name(path.stat().st_uid)
        folder_owner = user_name(path.parent.stat().st_uid)
    except OSError:  # in a folder of another user
        return "run this as its owner, or change its rights"
    if owner != folder_owner:  # as a command with sudo leaves it
        chown = command_line("sudo", "chown", folder_owner, path)
        return f"it belongs to {owner}, give it to the owner of its folder: {chown}"
    user = f"'#{owner}'" if owner.isdecimal() else owner
    return f"run this as its owner (sudo -u {user}), or change its rights"


def user_name(user: int | None = None) -> str:
    """Return the name of a user, by default of this process's; its number if it has no name."""
    number = os.geteuid() if user is None else user
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
