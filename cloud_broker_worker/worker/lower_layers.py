"""The bundle's own lower layers, which give a prompt the hidden states that a device gives it.

No other module of a worker uses ONNX Runtime, and this one is imported only if a worker accepts
prompts as token ids.
"""

from __future__ import annotations

from collections.abc import Sequence

from fleet.bundles.manifest import Bundle
from fleet.graphs.cascade import Cascade
from fleet.graphs.ort_runtime import check_instruction_set
from fleet.graphs.partition import Partition
from fleet.protocol.hidden_states import Float16, to_float16


class PromptRun:
    """One prompt in the lower layers, from its first token on."""

    def __init__(self, partition: Partition, capacity: int) -> None:
        self._cascade = Cascade(partition, capacity)

    @property
    def num_positions(self) -> int:
        """The number of positions that have run."""
        return self._cascade.num_tokens

    def __call__(self, token_ids: Sequence[int]) -> Float16:
        """Run the next tokens; return their hidden states [n, hidden] as a device uploads them."""
        cascade = self._cascade
        start = cascade.num_tokens
        cascade.append(token_ids)
        for block in range(cascade.num_blocks):
            cascade.fill(block)
        return to_float16(cascade.hidden_states(cascade.num_blocks - 1, start))


class LowerLayers:
    """The graphs of a bundle up to each of its upload layers.

    `first_layer` in the methods is a session's: 0 is the lowest of the upload layers.
    """

    def __init__(self, bundle: Bundle, num_threads: int, upload_layers: Sequence[int]) -> None:
        """Load the graphs.

        Raises:
            BundleError: they do not load, or this machine lacks instructions that they need.
        """
        manifest = bundle.manifest
        check_instruction_set(manifest)
        deepest = Partition(bundle, num_threads, "cpu", upload_layers[-1])
        self._partitions = {
            layer - manifest.upload_layer: deepest.move(layer) for layer in upload_layers
        }

    def begin(self, capacity: int, first_layer: int) -> PromptRun:
        """Return a new run for at most `capacity` positions."""
        return PromptRun(self._partitions[first_layer], capacity)

    def num_bytes(self, num_positions: int, first_layer: int) -> int:
        """Return the memory of a run over `num_positions`."""
        return Cascade.num_bytes(self._partitions[first_layer], num_positions)
