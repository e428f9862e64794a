"""Targets of desired settings: all devices, a group, or one device."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple, Self

from fleet.errors import ConfigError
from fleet.protocol.topics import check_name


class Scope(StrEnum):
    """The scope of settings; a narrower scope overrides a wider one."""

    ALL = "all"
    GROUP = "group"
    DEVICE = "device"


class Target(NamedTuple):
    """A scope and its name: a device's, a group's, or "" for all."""

    scope: Scope
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``all``, ``group:NAME`` or ``device:NAME``.

        Raises:
            ConfigError: it has another form.
            TopicError: the name is not valid.
        """
        scope, colon, name = text.partition(":")
        if text == Scope.ALL:
            return cls(Scope.ALL)
        if not colon or scope not in (Scope.GROUP, Scope.DEVICE):
            raise ConfigError(
                f"target {text[:80]!r}: expected all, group:NAME or device:NAME, such as "
                "device:kitchen"
            )
        return cls(Scope(scope), check_name(name, "group" if scope == Scope.GROUP else "name"))

    def __str__(self) -> str:
        return self.scope if self.scope is Scope.ALL else f"{self.scope}:{self.name}"
