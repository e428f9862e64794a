"""The trade between agreement and offload as a picture: plain SVG, which every browser shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from fleet.exits.thresholds import Point

WIDTH: Final = 720
HEIGHT: Final = 440
LEFT: Final = 64
RIGHT: Final = 190
TOP: Final = 40
BOTTOM: Final = 52
COLOURS: Final = ("#0b6e4f", "#c1440e", "#3a5a98", "#8a2be2", "#7a6c00", "#444444")
AXES: Final = "overall agreement with the full model", "offload rate (tokens from the cloud)"


def plot_curves(title: str, curves: Mapping[str, Sequence[Point]], marks: Mapping[str, Point] | None = None) -> str:
    """An SVG of curves by name, offload rate over agreement, and of single points by name."""
    low = min([0.8, *(point.agreement for curve in curves.values() for point in curve)])

    def place(point: Point) -> tuple[float, float]:
        x = LEFT + (point.agreement - low) / (1 - low) * (WIDTH - LEFT - RIGHT)
        return x, TOP + (1 - point.offload_rate) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 22, title, size=15),
    ]
    for step in range(6):
        rate, agreement = step / 5, low + (1 - low) * step / 5
        x, y = place(Point(agreement, rate, ()))
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(text(LEFT - 8, y + 4, f"{rate:.0%}", anchor="end"))
        parts.append(text(x, HEIGHT - BOTTOM + 18, f"{agreement:.3f}", anchor="middle"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, AXES[0], anchor="middle"))
    parts.append(text(16, HEIGHT / 2, AXES[1], anchor="middle", turn=-90))
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        line = " ".join("{:.1f},{:.1f}".format(*place(point)) for point in sorted(curve, key=lambda p: p.agreement))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<rect x="{WIDTH - RIGHT + 14}" y="{TOP + 20 * i}" width="12" height="12" fill="{colour}"/>')
        parts.append(text(WIDTH - RIGHT + 32, TOP + 10 + 20 * i, name))
    for i, (name, point) in enumerate((marks or {}).items()):
        x, y = place(point)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="none" stroke="black" stroke-width="1.5"/>')
        parts.append(text(x + 8, y - 8 - 2 * i, name))
    return "\n".join([*parts, "</svg>", ""])


def text(x: float, y: float, words: str, anchor: str = "start", size: int = 12, turn: int = 0) -> str:
    """One line of text, turned by `turn` degrees around its own place."""
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{turned}>{escape(words)}</text>'
