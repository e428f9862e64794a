"""The parity report as a table."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from onnx_export import parity


def parity_table(figures: Mapping[str, float], limits: Mapping[str, float]) -> Table:
    """One row a figure: its name, its value, its limit."""
    table = Table(title=f"parity, {parity.NUM_TOKENS} tokens", title_justify="left")
    for header in ("figure", "value", "limit"):
        table.add_column(header, justify="left" if header == "figure" else "right")
    for name, value in figures.items():
        style = None if parity.within(name, value, limits) else "red"
        table.add_row(name, f"{value:.3g}", parity.limit_text(name, limits), style=style)
    return table
