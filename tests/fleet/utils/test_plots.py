"""Pictures: equal bytes for equal figures, and one clear line for an error."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from fleet.errors import ConfigError
from fleet.exits.plot import plot_curves
from fleet.exits.thresholds import OperatingPoint
from fleet.utils.plots import check_plot, save


def curve() -> Figure:
    return plot_curves(
        "a < b",
        {"exit 3": [OperatingPoint(0.9, 0.5, (0.8,)), OperatingPoint(1.0, 1.0, (1.0,))]},
        {"it": OperatingPoint(1, 0.6, ())},
    )


@pytest.mark.parametrize("name", ["curve.svg", "curve.png"])
def test_the_same_figure_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    first = save(curve(), tmp_path / name).read_bytes()
    assert first
    assert save(curve(), tmp_path / name).read_bytes() == first


@pytest.mark.parametrize("name", ["curve", "curve.pdf", "no/curve.svg", "folder.svg"])
def test_a_name_of_no_picture_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(
        ConfigError, match=r"expected a file named \*.png or \*.svg in a folder that exists"
    ):
        check_plot(tmp_path / name)


def test_a_picture_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose another --plot"):
        save(curve(), tmp_path / "gone" / "curve.svg")
