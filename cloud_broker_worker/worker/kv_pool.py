"""The memory of sessions, leased from one budget: KV caches and uploaded hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from fleet.errors import PoolFullError
from fleet.protocol.hidden_states import Float16

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class KvShape:
    """Sizes of the memory for one position."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    dtype: torch.dtype = torch.float32

    @property
    def cache_bytes(self) -> int:
        """Bytes of a position's keys and values in every layer."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def hidden_bytes(self) -> int:
        """Bytes of a position's hidden state in float16."""
        return 2 * self.hidden_size


class KvLease:
    """The cache of one session, of which positions [0, length) have run.

    `layers` are keys and values [2, kv_heads, capacity, head_dim] each. Memory is not touched
    before it is written, so that a short session in a long lease needs little.
    """

    def __init__(self, shape: KvShape, capacity: int) -> None:
        size = shape.num_layers, 2, shape.num_kv_heads, capacity, shape.head_dim
        self.layers = torch.empty(size, dtype=shape.dtype).unbind()
        self.capacity = capacity
        self.length = 0

    @property
    def num_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


class HiddenStore:
    """The hidden states of one session: `rows` [capacity, hidden] float16, as the device uploaded
    them.

    Memory is not touched before it is written. An evicted cache is built again from it.
    """

    def __init__(self, shape: KvShape, capacity: int) -> None:
        self.rows: Float16 = np.empty((capacity, shape.hidden_size), np.float16)

    @property
    def capacity(self) -> int:
        return len(self.rows)

    @property
    def num_bytes(self) -> int:
        return self.rows.nbytes


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

    def lease(self, num_positions: int) -> KvLease:
        """Return a cache.

        Raises:
            PoolFullError: the budget or the machine does not hold it.
        """
        lease = self._allocate(KvLease, num_positions, self.shape.cache_bytes)
        self.leases.add(lease)
        return lease

    def store(self, num_positions: int) -> HiddenStore:
        """Return a store of hidden states.

        Raises:
            PoolFullError: the budget or the machine does not hold it.
        """
        store = self._allocate(HiddenStore, num_positions, self.shape.hidden_bytes)
        self.stores.add(store)
        return store

    def _allocate(
        self, kind: Callable[[KvShape, int], T], num_positions: int, position_bytes: int
    ) -> T:
        needed = num_positions * position_bytes
        text = f"{num_positions} positions need {needed} bytes"
        if needed > self.free_bytes:
            raise PoolFullError(f"{text}; {self.free_bytes} of {self.budget_bytes} are free")
        try:
            allocated = kind(self.shape, num_positions)
        except (MemoryError, RuntimeError) as error:  # PyTorch raises the latter
            reason = str(error)[:200]
            raise PoolFullError(f"{text}, which this machine does not have: {reason}") from None
        self.used_bytes += needed
        return allocated

    def free_lease(self, lease: KvLease) -> None:
        """Free a cache; one that is free already is left alone."""
        if lease in self.leases:
            self.leases.remove(lease)
            self.used_bytes -= lease.num_bytes

    def free_store(self, store: HiddenStore) -> None:
        """Free a store; one that is free already is left alone."""
        if store in self.stores:
            self.stores.remove(store)
            self.used_bytes -= store.num_bytes

    def check_integrity(self) -> None:
        """Raise RuntimeError when the sizes do not add up; tests call it after every scenario."""
        total = sum(lease.num_bytes for lease in self.leases)
        total += sum(store.num_bytes for store in self.stores)
        if total != self.used_bytes or total > self.budget_bytes:
            raise RuntimeError(
                f"{self.used_bytes} bytes recorded, {total} leased, {self.budget_bytes} allowed"
            )
        for lease in self.leases:
            if not 0 <= lease.length <= lease.capacity:
                raise RuntimeError(f"a lease of {lease.capacity} positions holds {lease.length}")
