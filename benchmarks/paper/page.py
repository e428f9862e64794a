"""The generated sections of docs/benchmarks.md, from a summary in benchmarks/data/paper.json.

    python -m benchmarks.paper.page               # write the page and its pictures again
    python -m benchmarks.paper.page --rows DIR    # from rows of 'fleet bench paper --out DIR'

A section stands between `<!-- paper:NAME -->` and `<!-- end -->`; the text outside is written by
hand.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer

from benchmarks.paper.report import Summary, conditions, encode, sheets
from fleet.errors import ConfigError
from fleet.utils.cli_runtime import run_command
from fleet.utils.path_options import path_option

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs/benchmarks.md"
DATA: Final = ROOT / "benchmarks/data/paper.json"
BLOCK: Final = re.compile(r"(<!-- paper:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
EMPTY: Final = "*Nothing is kept here yet.*"
PICTURES: Final = {"table": ("time", "bytes"), "latency": ("latency",), "accuracy": ("accuracy",)}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def read_summary(path: Path = DATA) -> Summary | None:
    """Read the summary; return None when there is none yet.

    Raises:
        ConfigError: the file is something else.
    """
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Summary)
    except msgspec.MsgspecError as error:
        raise ConfigError(
            f"{path}: expected a summary of this version, got something else ({error})"
        ) from None


def fill_page(page: str, summary: Summary | None) -> str:
    """Return the page with the summary's tables in its sections."""
    sections = blocks(summary) if summary is not None else {}
    return BLOCK.sub(lambda match: f"{match[1]}{sections.get(match[2], EMPTY)}\n{match[3]}", page)


def blocks(summary: Summary) -> dict[str, str]:
    """Return Markdown by name of the section; sections without figures are left out."""
    from benchmarks.paper.plots import pictures

    drawn = pictures(summary)
    sections = {"conditions": conditions(summary.run)}
    for part, tables in sheets(summary).items():
        shown = [f"![{name}](paper-{name}.svg)" for name in PICTURES.get(part, ()) if name in drawn]
        if tables:
            sections[part] = "\n\n".join([*shown, *(table.markdown() for table in tables)])
    return sections


@app.command()
def run(
    rows: Annotated[Path | None, path_option(help="Folder of 'fleet bench paper'.")] = None,
) -> None:
    """Write the page's generated sections and its pictures."""
    from benchmarks.paper.plots import draw_figures

    if rows is not None:
        from benchmarks.paper.results import Results

        DATA.write_bytes(encode(Results.open(rows).summary()))
    summary = read_summary()
    PAGE.write_text(fill_page(PAGE.read_text(), summary))
    if summary is not None:
        draw_figures(summary, PAGE.parent)


if __name__ == "__main__":
    run_command("benchmarks.paper.page", app)
