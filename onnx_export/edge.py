"""The device's half of a bundle: graphs with the bits that the agreement with PyTorch needs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from onnx_export import parity
from onnx_export.assembly import Assembly
from onnx_export.config import ExportConfig
from onnx_export.heads import HeadsFile
from onnx_export.sensitivity import (
    ProductScore,
    choose_raised,
    describe_raised,
    first_share,
    product_scores,
)

Progress = Callable[[str], None]
MAX_CHOICES: Final = 2
"""Choices of products for 8 bits, before all of them have 8 bits."""
NEXT_SHARE: Final = 0.25
"""Share of the scores that a choice leaves, relative to the one before."""
RAISING: Final = frozenset(("hidden", "same_as_pytorch"))
"""Kinds of figures that more bits in the layers improve."""
PREVIEWING: Final = frozenset(("logprob", "top1"))
"""Kinds of figures that more bits in the LM head's first step improve."""


@dataclass(frozen=True, kw_only=True)
class Edge:
    """The device's half of a bundle, which is written again when it needs more bits."""

    assembly: Assembly
    config: ExportConfig
    heads: HeadsFile
    windows: list[parity.Ids]
    folder: Path
    progress: Progress

    @property
    def limits(self) -> Mapping[str, float]:
        """The limits of the figures."""
        config = self.config
        return parity.parity_limits(
            config.quantization, self.heads.kind, config.accept, config.exits[-1]
        )

    def write(self) -> dict[str, float]:
        """Write the graphs and return their figures of parity.

        ``balanced`` has 4 bits first, then 8 bits in the LM head's first step if its figures need
        them, then for the most sensitive products, and at last for all of them, until the figures
        are within their limits.
        """
        figures = self._write(())
        if not self._failing(figures) & PREVIEWING:
            return self._write_products(figures)
        self.progress("8 bits for the LM head's first step, which chooses candidates")
        shutil.rmtree(self.folder)
        finer = replace(self, assembly=replace(self.assembly, preview_bits=8))
        return finer._write_products(finer._write(()))

    def _write_products(self, figures: dict[str, float]) -> dict[str, float]:
        """Write the graphs again, with 8 bits for products, while `figures` need them."""
        if not self._needs_bits(figures):
            return figures
        self.progress("measuring the error that 4 bits cause in each product")
        num_layers = self.config.exits[-1]
        scores = product_scores(self.assembly.model, num_layers, self.windows[0])
        share = first_share(self._agreement(figures), self.limits[parity.WHOLE])
        num_raised = 0
        for _ in range(MAX_CHOICES):
            raised = choose_raised(scores, share)
            share *= NEXT_SHARE
            if not num_raised < len(raised) < len(scores):
                continue
            num_raised = len(raised)
            figures = self._write(raised, len(scores))
            if not self._needs_bits(figures):
                return figures
        return self._write(scores, len(scores)) if scores else figures

    def _write(self, raised: Sequence[ProductScore], num_products: int = 0) -> dict[str, float]:
        """Write the graphs, with 8 bits for `raised`, and return their figures."""
        if raised:
            kinds = describe_raised(raised)
            self.progress(f"8 bits for {len(raised)} of {num_products} products: {kinds}")
            shutil.rmtree(self.folder)
        names = frozenset(name for each in raised for name in each.names)
        assembly = replace(self.assembly, raised=names)
        write_edge(assembly, self.config, self.heads, self.folder, self.progress)
        self.progress(f"comparing the graphs with PyTorch on {parity.NUM_TOKENS} tokens of text")
        figures = parity.measure_parity(
            self.folder,
            self.assembly.model,
            self.heads.heads,
            info=self.assembly.info,
            windows=self.windows,
            upload_layer=self.config.upload_layers[-1],
        )
        self.progress(
            f"{figures[parity.BITS]:.3g} bits a weight, agreement {figures[self._deepest]:.3g} at "
            f"exit {self.config.exits[-1]} and {figures[parity.WHOLE]:.3g} in the whole model"
        )
        return figures

    @property
    def _deepest(self) -> str:
        return f"same_as_pytorch.{self.config.exits[-1]}"

    def _agreement(self, figures: Mapping[str, float]) -> float:
        return min(figures[self._deepest], figures[parity.WHOLE])

    def _needs_bits(self, figures: Mapping[str, float]) -> bool:
        """Return whether more bits in the layers improve all figures outside their limits."""
        kinds = self._failing(figures)
        return bool(kinds) and kinds <= RAISING

    def _failing(self, figures: Mapping[str, float]) -> set[str]:
        """Return the kinds of figures outside their limits; other presets do not mend any."""
        names = parity.outside_limits(figures, self.limits)
        is_mended = self.config.quantization == "balanced"
        return {parity.figure_kind(name) for name in names} if is_mended else set()


def write_edge(
    assembly: Assembly, config: ExportConfig, heads: HeadsFile, folder: Path, progress: Progress
) -> None:
    """Write the graphs of the blocks and the LM head, and the tables of token weights."""
    folder.mkdir()
    starts = (0, *config.exits[:-1])
    for i, (start, stop) in enumerate(zip(starts, config.exits, strict=True)):
        progress(f"exporting layers [{start}, {stop}) as {config.quantization}")
        path = folder / f"block_{i}.onnx"
        if assembly.write_block((start, stop), heads.heads[stop], path):
            progress(f"layers [{start}, {stop}) come from an earlier export")
    progress(f"exporting the LM head as {config.quantization}")
    top_k = config.top_k_of(assembly.info.vocab_size)
    assembly.write_lm_head(top_k, folder / "lm_head.onnx")
    assembly.write_tables(folder)
