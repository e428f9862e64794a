"""Requests to enrol names with their roles. A file can contain many of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from fleet.errors import ConfigError, FleetError
from fleet.protocol.access import ANY_DEVICE, Role
from fleet.protocol.topics import NAME, check_name
from fleet.utils.text_files import read_text

COLUMNS: Final = ("name", "group", "tags", "role", "allow")
SAVE_AS: Final = "save it as CSV with commas between the columns, in UTF-8"
MAX_TAGS: Final = 32


class Enrolment(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A name and its role.

    A device may have a group and tags. `targets` are the devices, groups and tags that an app may
    send prompts to.
    """

    name: str
    role: Role = Role.DEVICE
    group: str | None = None
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    targets: tuple[str, ...] = ()

    def check(self) -> None:
        """Check the fields of this enrolment; the registry checks them against others.

        Raises:
            TopicError: a name may not stand in a topic.
            ConfigError: a field does not fit the role, or there are too many tags.
        """
        check_name(self.name)
        for target in self.targets:
            if not is_tag(target):
                check_name(target, "target")
        self._check_role()
        if self.group is not None:
            check_name(self.group, "group")
        self._check_tags()

    def _check_tags(self) -> None:
        if len(self.tags) > MAX_TAGS:
            raise ConfigError(
                f"{self.name!r} has {len(self.tags)} tags: expected at most {MAX_TAGS}"
            )
        for key, value in self.tags.items():
            check_name(key, "key of a tag")
            check_name(value, "value of a tag")

    def _check_role(self) -> None:
        """Check that only apps have targets, and only devices a group and tags.

        The name that stands for any device in the HTTP API cannot be that of one.
        """
        if self.name == ANY_DEVICE and self.role is Role.DEVICE:
            raise ConfigError(
                f"the name {ANY_DEVICE!r} stands for any device in the HTTP API; choose another"
            )
        if self.targets and self.role is not Role.APP:
            raise ConfigError(
                "only an app is allowed devices or groups; "
                f"{self.name!r} is to be {self.role.with_article}: leave --allow out"
            )
        if self.group is not None and self.role is not Role.DEVICE:
            raise ConfigError(
                "only a device belongs to a group; "
                f"{self.name!r} is to be {self.role.with_article}: leave --group out"
            )
        if self.tags and self.role is not Role.DEVICE:
            raise ConfigError(
                f"only a device has tags; {self.name!r} is to be {self.role.with_article}: "
                "leave --tag out"
            )


def check_enrolments(enrolments: Sequence[Enrolment]) -> None:
    """Check each of them, and that no name occurs twice. Raises ConfigError or TopicError."""
    seen: set[str] = set()
    for enrolment in enrolments:
        enrolment.check()
        if enrolment.name in seen:
            raise ConfigError(f"{enrolment.name!r} occurs twice; give each name once")
        seen.add(enrolment.name)


def parse_role(role: str) -> Role:
    """Parse the name of a role. Raises ConfigError, which lists the known roles."""
    if role not in set(Role):
        raise ConfigError(f"unknown role {role[:80]!r}: expected one of {', '.join(Role)}")
    return Role(role)


def is_tag(text: str) -> bool:
    """Whether `text` is a tag like ``floor=1``."""
    key, equals, value = text.partition("=")
    return bool(equals and NAME.fullmatch(key) and NAME.fullmatch(value))


def parse_tags(tags: Iterable[str]) -> dict[str, str]:
    """Parse tags of the form ``key=value``.

    Raises:
        ConfigError: a tag has another form, or a key occurs twice.
        TopicError: a key or a value is no valid name.
    """
    parsed: dict[str, str] = {}
    for tag in tags:
        key, equals, value = tag.partition("=")
        if not equals or key in parsed:
            raise ConfigError(
                f"tag {tag[:80]!r}: expected key=value, for example floor=1, and each key once"
            )
        parsed[check_name(key, "key of a tag")] = check_name(value, "value of a tag")
    return parsed


def format_tags(tags: Mapping[str, str]) -> list[str]:
    """Return tags in the form ``key=value``, as on the command line."""
    return [f"{key}={value}" for key, value in tags.items()]


def read_enrolments(path: Path) -> list[Enrolment]:
    """Read a CSV file with the columns name, group, tags, role and allow; only name is required.

    Several tags or targets in one cell are separated by spaces. Empty rows are skipped.

    Raises:
        ConfigError: the file cannot be read, or a row is invalid; the message names the line.
        TopicError: a name may not stand in a topic.
    """
    enrolments = _read_rows(path)
    if not enrolments:
        raise ConfigError(f"{path} has no rows; expected one for each name")
    try:
        check_enrolments(enrolments)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return enrolments


def _read_rows(path: Path) -> list[Enrolment]:
    text = read_text(path, "give --from the path of a CSV file")
    try:
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        columns = _columns(path, next(rows, []))
        return [
            _enrolment(path, rows.line_num, columns, row) for row in rows if "".join(row).strip()
        ]
    except csv.Error as error:
        raise ConfigError(f"{path} is no CSV file: {error}; {SAVE_AS}") from None


def _columns(path: Path, header: Sequence[str]) -> list[str]:
    """Return the columns of a file by its header, in small letters, without empty ones at its end.

    Raises:
        ConfigError: a column is unknown, or occurs twice, or there is no name.
    """
    columns = [column.strip().lower() for column in header]
    while columns and not columns[-1]:
        del columns[-1]
    is_known = set(columns) <= set(COLUMNS) and len(set(columns)) == len(columns)
    if "name" not in columns or not is_known:
        raise ConfigError(
            f"{path}: expected the columns {', '.join(COLUMNS)}, of which only name is required, "
            f"got {', '.join(header)[:200] or 'none'}; {SAVE_AS}"
        )
    return columns


def _enrolment(path: Path, line: int, columns: Sequence[str], row: Sequence[str]) -> Enrolment:
    """Parse a row. Raises an error whose message names the line."""
    try:
        if "".join(row[len(columns) :]).strip():
            raise ConfigError("more cells than columns")
        values = dict(zip(columns, row, strict=False))
        cells = {column: values.get(column, "").strip() for column in COLUMNS}
        enrolment = Enrolment(
            name=cells["name"],
            role=parse_role(cells["role"] or Role.DEVICE),
            group=cells["group"] or None,
            tags=parse_tags(cells["tags"].split()),
            targets=tuple(dict.fromkeys(cells["allow"].split())),
        )
        enrolment.check()
    except FleetError as error:
        raise type(error)(f"{path}, line {line}: {error}") from None
    return enrolment
