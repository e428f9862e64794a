"""`fleet export`: the command line of the export."""

from __future__ import annotations

import typer

from fleet.utils.optional_imports import needs


def export(context: typer.Context) -> None:
    """Export a model as a bundle for devices and cloud workers."""
    with needs("export"):
        from onnx_export.__main__ import app
    app(args=context.args, prog_name="fleet export", standalone_mode=False)
