"""What sessions keep in memory, leased from one budget: KV caches and uploaded hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from fleet.errors import FleetError
from fleet.protocol.hidden_states import Float16

T = TypeVar("T")


class PoolFullError(FleetError):
    """The budget, or the machine, does not hold another session of that size."""

    code = "busy"


@dataclass(frozen=True, kw_only=True)
class KvShape:
    """Sizes of what one position takes."""

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
    """One session's cache: `layers`, each keys and values [2, kv_heads, capacity, head_dim]; positions [0, length)
    have run.

    Its memory is not touched before it is written, so that a short session in a long lease takes little.
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
    """One session's hidden states: `rows` [capacity, hidden] float16, as the device uploaded them; untouched at first.

    From them a cache that was taken away is built again.
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
    """Gives caches and stores until `budget_bytes` are out."""

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
        """A cache; raises PoolFullError when the budget or the machine does not hold it."""
        lease = self._allocate(KvLease, num_positions, self.shape.cache_bytes)
        self.leases.add(lease)
        return lease

    def store(self, num_positions: int) -> HiddenStore:
        """A store of hidden states; raises PoolFullError when the budget or the machine does not hold it."""
        store = self._allocate(HiddenStore, num_positions, self.shape.hidden_bytes)
        self.stores.add(store)
        return store

    def _allocate(
        self, kind: Callable[[KvShape, int], T], num_positions: int, position_bytes: int
    ) -> T:
        wanted = num_positions * position_bytes
        text = f"{num_positions} positions need {wanted} bytes"
        if wanted > self.free_bytes:
            raise PoolFullError(f"{text}; {self.free_bytes} of {self.budget_bytes} are free")
        try:
            allocated = kind(self.shape, num_positions)
        except (MemoryError, RuntimeError) as error:  # what PyTorch says when memory is short
            raise PoolFullError(
                f"{text}, which this machine does not have: {str(error)[:200]}"
            ) from None
        self.used_bytes += wanted
        return allocated

    def take_back(self, lease: KvLease) -> None:
        """Frees a cache; one that is back already is left alone."""
        if lease in self.leases:
            self.leases.remove(lease)
            self.used_bytes -= lease.num_bytes

    def drop(self, store: HiddenStore) -> None:
        """Frees a store; one that is back already is left alone."""
        if store in self.stores:
            self.stores.remove(store)
            self.used_bytes -= store.num_bytes

    def check_integrity(self) -> None:
        """Raises RuntimeError when the books do not balance: for tests, after every scenario."""
        total = sum(lease.num_bytes for lease in self.leases) + sum(
            store.num_bytes for store in self.stores
        )
        if total != self.used_bytes or total > self.budget_bytes:
            raise RuntimeError(
                f"{self.used_bytes} bytes booked, {total} taken, {self.budget_bytes} allowed"
            )
        for lease in self.leases:
            if not 0 <= lease.length <= lease.capacity:
                raise RuntimeError(f"a lease of {lease.capacity} positions holds {lease.length}")
