"""The parity report as a table."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from onnx_export import parity


def parity_table(figures: Mapping[str, float], limits: Mapping[str, float]) -> Table:
    """Return a table with one row a figure: its name, its value, its limit."""
    table = Table(
        title=f"exported graphs against PyTorch, {parity.NUM_TOKENS} tokens", title_justify="left"
    )
    table.add_column("figure", justify="left")
    table.add_column("value", justify="right")
    table.add_column("limit", justify="right")
    for name, value in figures.items():
        limit = parity.limit_text(name, limits)
        style = None if parity.meets_limit(name, value, limits) else "red"
        table.add_row(name, f"{value:.3g}", limit, style=style)
    return table
