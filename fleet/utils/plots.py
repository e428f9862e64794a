"""Figures of matplotlib as files, with equal bytes for equal figures."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib.figure import Figure

from fleet.errors import ConfigError

SUFFIXES: Final = (".png", ".svg")
COLOURS: Final = ("#0b6e4f", "#c1440e", "#3a5a98", "#8a2be2", "#7a6c00", "#444444", "#1797a8")


def check_plot(path: Path) -> None:
    """Raise ConfigError, before the work, when `path` is no picture in a folder that exists."""
    if path.suffix not in SUFFIXES or path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(
            f"--plot {path}: expected a file named *.png or *.svg in a folder that exists"
        )


def save(figure: Figure, path: Path) -> Path:
    """Write the figure in the format of the file's suffix; raises ConfigError."""
    try:
        with mpl.rc_context({"svg.hashsalt": "fleet", "svg.fonttype": "none"}):
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another --plot") from None
    return path
