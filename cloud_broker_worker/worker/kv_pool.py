"""The memory of sessions: KV caches and uploaded hidden states, leased from one budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from fleet.errors import PoolFullError
from fleet.protocol.hidden_states import Float16

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class KvShape:
    """Sizes of the memory for one position in all layers of the cloud's half."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    dtype: torch.dtype = torch.float32

    @property
    def cache_bytes(self) -> int:
        """Bytes of a position's keys and values in every layer."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def without(self, num_layers: int) -> KvShape:
        """Return the shape without the lowest layers."""
        return replace(self, num_layers=self.num_layers - num_layers)

    @property
    def hidden_bytes(self) -> int:
        """Bytes of a position's hidden state in float16."""
        return 2 * self.hidden_size


class KvLease:
    """The cache of one session. It holds positions [0, length).

    `layers` has keys and values [2, kv_heads, capacity, head_dim] of each layer from `first_layer`
    on. Memory is not touched before it is written.
    """

    def __init__(self, shape: KvShape, capacity: int, first_layer: int = 0) -> None:
        self.shape = shape
        self.first_layer = first_layer
        self.layers = _empty_layers(shape, capacity)
        self.capacity = capacity
        self.length = 0

    @property
    def num_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def grow(self, capacity: int) -> None:
        """Copy the positions that have run into a cache of `capacity` positions."""
        layers = _empty_layers(self.shape, capacity)
        for layer, previous in zip(layers, self.layers, strict=True):
            layer[:, :, : self.length] = previous[:, :, : self.length]
        self.layers = layers
        self.capacity = capacity


def _empty_layers(shape: KvShape, capacity: int) -> tuple[torch.Tensor, ...]:
    size = shape.num_layers, 2, shape.num_kv_heads, capacity, shape.head_dim
    return torch.empty(size, dtype=shape.dtype).unbind()


class HiddenStore:
    """The hidden states of one session: `rows` [capacity, hidden] float16, as the device uploaded
    them.

    An evicted cache is built again from these rows.
    """

    def __init__(self, shape: KvShape, capacity: int) -> None:
        self.rows: Float16 = np.empty((capacity, shape.hidden_size), np.float16)

    @property
    def capacity(self) -> int:
        return len(self.rows)

    @property
    def num_bytes(self) -> int:
        return self.rows.nbytes

    def grow(self, capacity: int) -> None:
        """Copy the rows into a store of `capacity` positions."""
        rows = np.empty((capacity, self.rows.shape[1]), np.float16)
        rows[: self.capacity] = self.rows
        self.rows = rows


class KvPool:
    """A pool of caches and stores within `budget_bytes`."""

    def __init__(self, shape: KvShape, budget_bytes: int) -> None:
        self.shape = shape
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.leases: set[KvLease] = set()
        self.stores: set[HiddenStore] = set()

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self.used_bytes

    def lease(self, num_positions: int, first_layer: int = 0) -> KvLease:
        """Return a new cache for `num_positions` in the layers from `first_layer` on.

        Raises:
            PoolFullError: the budget or the machine lacks the memory.
        """
        shape = self.shape.without(first_layer)
        lease = self._allocate(
            lambda: KvLease(shape, num_positions, first_layer), num_positions, shape.cache_bytes
        )
        self.leases.add(lease)
        return lease

    def grow_lease(self, lease: KvLease, num_positions: int) -> None:
        """Let a cache hold `num_positions`. Raise PoolFullError as `lease` does."""
        num_new = num_positions - lease.capacity
        self._allocate(lambda: lease.grow(num_positions), num_new, lease.shape.cache_bytes)

    def store(self) -> HiddenStore:
        """Return a new, empty store of hidden states."""
        store = HiddenStore(self.shape, 0)
        self.stores.add(store)
        return store

    def grow_store(self, store: HiddenStore, num_positions: int) -> None:
        """Let a store hold `num_positions`.

        Raises:
            PoolFullError: the budget or the machine lacks the memory.
        """
        num_new = num_positions - store.capacity
        self._allocate(lambda: store.grow(num_positions), num_new, self.shape.hidden_bytes)

    def _allocate(self, allocate: Callable[[], T], num_positions: int, position_bytes: int) -> T:
        needed = num_positions * position_bytes
        text = f"{num_positions} positions need {needed} bytes"
        if needed > self.free_bytes:
            raise PoolFullError(f"{text}; {self.free_bytes} of {self.budget_bytes} are free")
        try:
            allocated = allocate()
        except (MemoryError, RuntimeError) as error:  # PyTorch raises RuntimeError
            reason = str(error)[:200]
            raise PoolFullError(f"{text}, which this machine does not have: {reason}") from None
        self.used_bytes += needed
        return allocated

    def free_lease(self, lease: KvLease) -> None:
        """Free a cache; do nothing if it is free already."""
        if lease in self.leases:
            self.leases.remove(lease)
            self.used_bytes -= lease.num_bytes

    def free_store(self, store: HiddenStore) -> None:
        """Free a store; do nothing if it is free already."""
        if store in self.stores:
            self.stores.remove(store)
            self.used_bytes -= store.num_bytes

    def check_integrity(self) -> None:
        """Raise RuntimeError if the sizes do not add up. Tests call it after each scenario."""
        total = sum(lease.num_bytes for lease in self.leases)
        total += sum(store.num_bytes for store in self.stores)
        if total != self.used_bytes or total > self.budget_bytes:
            raise RuntimeError(
                f"{self.used_bytes} bytes recorded, {total} leased, {self.budget_bytes} allowed"
            )
        for lease in self.leases:
            if not 0 <= lease.length <= lease.capacity:
                raise RuntimeError(f"a lease of {lease.capacity} positions holds {lease.length}")
