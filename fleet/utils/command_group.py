"""A group of commands whose help lists them by section, with whole descriptions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter

DEFAULT_SECTION: Final = "Commands"
USAGE_ERROR: Final[Any] = typer.BadParameter.__base__  # of the click that typer uses
TEXT_AS_OPTION: Final = re.compile(r"No such option: -(?!-[a-z-]+$).*", re.DOTALL)
HINT: Final = "; put -- before a text that begins with a minus"
WHOLE: Final = 1000  # characters of a description: more than any has


class CommandGroup(TyperGroup):
    """A group of commands; the section of each is its `rich_help_panel`."""

    def invoke(self, ctx: Context) -> Any:
        """Run the command that the arguments name; an unknown option may be meant as a text."""
        try:
            return super().invoke(ctx)
        except USAGE_ERROR as error:
            # The group around this one sees the same error.
            if TEXT_AS_OPTION.fullmatch(error.message) and not error.message.endswith(HINT):
                error.message += HINT
            raise

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write each section in the order of its first command."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.commands[name]
            section = getattr(command, "rich_help_panel", None)
            title = section if isinstance(section, str) else DEFAULT_SECTION
            row = (name, command.get_short_help_str(WHOLE))
            sections.setdefault(title, []).append(row)
        width = max((len(name) for name in self.commands), default=0)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), text) for name, text in rows])
