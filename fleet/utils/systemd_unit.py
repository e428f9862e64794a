"""Unit files of systemd for the fleet's long-running processes, with few rights."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from fleet.errors import ConfigError
from fleet.utils.atomic_files import write_file
from fleet.utils.paths import user_name
from fleet.utils.printable import HIDDEN as HIDDEN_CHARACTER

HIDDEN: Final = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))
"""Folders that ProtectHome= and PrivateTmp= replace by empty ones."""

STATE: Final = Path("/var/lib")
ENVIRONMENT_FILE: Final = "/etc/cecollm-fleet/environment"
MAX_OPEN_FILES: Final = 65_536

USER: Final = re.compile(r"[^-\s:/](?:[^:/\0-\x1f]{0,253}[^\s:/])?")
"""Names that systemd accepts, also those of a directory service (``fleet@example.org``)."""

SPECIAL: Final = re.compile(r"[ \"'\\:;]")
QUOTABLE: Final = re.compile(r"[\"\\]")
"""Characters that end a quoted word, or change the next character in it."""

NO_USERS: Final = (2**16 - 1, 2**32 - 1)  # of systemd and the kernel

SERVICE: Final = """\
[Unit]
Description={description}
Documentation=https://www.freedesktop.org/software/systemd/man/systemd.service.html
Wants=network-online.target
After={after}
StartLimitIntervalSec=0

[Service]
{process}
{commands}
User={user}
UMask=0077
Environment=PYTHONUNBUFFERED=1
EnvironmentFile=-{environment_file}
{folders}
LimitNOFILE={max_open_files}
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
PrivateTmp=yes
PrivateUsers=yes
{devices}
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
ProtectProc=invisible
RemoveIPC=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM
{install}"""

RESTARTED: Final = """\
Restart=always
RestartSec=5
TimeoutStartSec={start_s}
TimeoutStopSec={stop_s}"""
INSTALL: Final = "\n[Install]\nWantedBy=multi-user.target\n"
NO_DEVICES: Final = "PrivateDevices=yes"
GPU_DEVICES: Final = """\
DevicePolicy=closed
DeviceAllow=char-nvidia rw
DeviceAllow=char-nvidia-uvm rw
DeviceAllow=char-nvidia-frontend rw"""


class ServiceUnit(Struct, frozen=True, kw_only=True):
    """One service: its command, and the folders that it needs outside the system's.

    `before` are commands that run before each start. A process with `watchdog_s` reports its
    readiness and its progress (`fleet.utils.service_manager`); with `notify_access` "all" a child
    of it may do so. A `is_oneshot` service ends by itself, and a timer starts it.
    """

    description: str
    command: Sequence[str]
    user: str
    before: Sequence[Sequence[str]] = ()
    after: Sequence[str] = ()
    writable: Sequence[Path] = ()
    readable: Sequence[Path] = ()
    reload: str | None = None
    watchdog_s: int | None = None
    notify_access: str = "main"
    start_s: int | str = 180
    stop_s: int = 30
    is_oneshot: bool = False
    has_gpu: bool = False

    def render(self) -> str:
        """Return the text of the unit file."""
        commands = [f"ExecStartPre={quote(command)}" for command in self.before]
        commands.append(f"ExecStart={quote(self.command)}")
        if self.reload:
            commands.append(f"ExecReload={self.reload}")
        return SERVICE.format(
            description=_literal(self.description),
            after=" ".join(("network-online.target", *self.after)),
            process=self._life_cycle(),
            commands="\n".join(commands),
            user=_literal(self.user),
            environment_file=ENVIRONMENT_FILE,
            folders="\n".join(folder_lines(self.writable, self.readable)),
            max_open_files=MAX_OPEN_FILES,
            devices=GPU_DEVICES if self.has_gpu else NO_DEVICES,
            install="" if self.is_oneshot else INSTALL,
        )

    def _life_cycle(self) -> str:
        if self.is_oneshot:
            return "Type=oneshot"
        text = RESTARTED.format(start_s=self.start_s, stop_s=self.stop_s)
        if self.watchdog_s is None:
            return f"Type=exec\n{text}"
        access = f"NotifyAccess={self.notify_access}"
        return f"Type=notify\n{access}\nWatchdogSec={self.watchdog_s}\n{text}"


def quote(command: Sequence[str]) -> str:
    """Return a command line for a unit file; `%`, `$` and a backslash stand for themselves."""
    return _literal(shlex.join(command)).replace("\\", r"\\").replace("$", "$$")


def unit_text(text: str) -> str:
    """Return `text`. Raises ConfigError when it would be several lines of a unit file."""
    if HIDDEN_CHARACTER.search(text) or "\n" in text:
        raise ConfigError(f"{text[:200]!r}: expected no line break or control character; rename it")
    return text


def folder_lines(writable: Iterable[Path], readable: Iterable[Path]) -> list[str]:
    """Return the settings that let a service use these folders, and no other folder of a user.

    systemd creates a folder below `STATE`, and gives it to the service's user.
    """
    hidden = []
    lines = []
    for folder in writable:
        if folder.is_relative_to(STATE):
            lines.append(f"StateDirectory={_escaped(folder.relative_to(STATE))}")
        elif _is_hidden(folder):
            hidden.append(f"BindPaths={_quoted(folder)}")
        else:
            lines.append(f"ReadWritePaths={_quoted(folder)}")
    hidden += [f"BindReadOnlyPaths={_quoted(each)}" for each in readable if _is_hidden(each)]
    protect_home = "ProtectHome=tmpfs" if hidden else "ProtectHome=yes"
    return [*lines, "StateDirectoryMode=0700", protect_home, *dict.fromkeys(hidden)]


def _is_hidden(folder: Path) -> bool:
    return any(folder.is_relative_to(hidden) for hidden in HIDDEN)


def _literal(text: str) -> str:
    """Return a text of one line in which ``%`` stands for itself."""
    return unit_text(text).replace("%", "%%")


def _quoted(path: Path) -> str:
    """Return a path for a setting whose words may be quoted; it knows no escapes like ``\\x20``."""
    text = _literal(str(path))
    if SPECIAL.search(text) is None:
        return text
    return f'"{QUOTABLE.sub(_with_backslash, text)}"'


def _with_backslash(match: re.Match[str]) -> str:
    return "\\" + match[0]


def _escaped(path: Path) -> str:
    """Return a path for ``StateDirectory=``, which knows escapes, and splits words at a colon."""
    return SPECIAL.sub(lambda match: f"\\x{ord(match[0]):02x}", _literal(str(path)))


def program_folders() -> list[Path]:
    """Return the folders of this Python, its packages and this project."""
    project = Path(__file__).resolve().parents[2]
    return [Path(sys.prefix), Path(sys.base_prefix), project]


def service_user(folder: Path, user: str | None, option: str = "--user") -> str:
    """Return `user`, the value of `option`, by default the owner of the folder of a service.

    Raises:
        ConfigError: systemd accepts no such user, or the folder belongs to root or does not exist.
    """
    if user:
        return _checked_user(user)
    try:
        owner = folder.stat().st_uid
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; name a folder that exists") from None
    if owner == 0:
        chown = ("chown", "--recursive", "USER", str(folder))
        raise ConfigError(
            f"{folder} belongs to root, and no service should run as root; "
            f"give the folder to another user ({shlex.join(chown)}), or pass {option}"
        )
    return user_name(owner)


def _checked_user(user: str) -> str:
    is_number = user.isascii() and user.isdecimal()
    if not USER.fullmatch(user) or (is_number and int(user) in NO_USERS):
        raise ConfigError(
            f"user {user[:80]!r}: expected a name as in /etc/passwd, or the number of a user"
        )
    return user


def write_units(out: Path, units: Mapping[str, str]) -> None:
    """Write unit files, by name, into a folder; files of the same names are replaced.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in units.items():
            write_file(out / name, text.encode(), mode=0o644)
    except OSError as error:
        raise ConfigError(
            f"cannot write units into {out}: {error.strerror}; choose another --out"
        ) from None
