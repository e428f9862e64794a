"""What sessions keep in memory, leased from one budget: KV cache and uploaded hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fleet.codec import Float16
from fleet.errors import FleetError


class PoolFullError(FleetError):
    """The budget does not hold another lease of that size."""

    code = "busy"


@dataclass(frozen=True)
class KvShape:
    """Sizes of what one position takes."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    dtype: torch.dtype = torch.float32

    @property
    def num_bytes(self) -> int:
        """Bytes a position: its keys and values in every layer, and its hidden state."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize + 2 * self.hidden_size


class KvLease:
    """One session's memory.

    `keys` and `values` [layers, kv_heads, capacity, head_dim], of which positions [0, length) have run;
    `hidden_states` [capacity, hidden] float16, as the device uploaded them.
    """

    def __init__(self, shape: KvShape, capacity: int) -> None:
        size = shape.num_layers, shape.num_kv_heads, capacity, shape.head_dim
        self.keys = torch.empty(size, dtype=shape.dtype)
        self.values = torch.empty(size, dtype=shape.dtype)
        self.hidden_states: Float16 = np.empty((capacity, shape.hidden_size), np.float16)
        self.length = 0

    @property
    def capacity(self) -> int:
        return len(self.hidden_states)

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.hidden_states.nbytes


class KvPool:
    """Gives leases until `budget_bytes` are out."""

    def __init__(self, shape: KvShape, budget_bytes: int) -> None:
        self.shape = shape
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.leases: set[KvLease] = set()

    def num_bytes(self, max_positions: int) -> int:
        """What a lease of `max_positions` takes."""
        return max_positions * self.shape.num_bytes

    def fits(self, num_bytes: int) -> bool:
        """Whether so many bytes are free."""
        return self.used_bytes + num_bytes <= self.budget_bytes

    def lease(self, max_positions: int) -> KvLease:
        """Raises PoolFullError when the budget does not hold it."""
        wanted = self.num_bytes(max_positions)
        if not self.fits(wanted):
            raise PoolFullError(
                f"a cache of {max_positions} positions needs {wanted} bytes; "
                f"{self.budget_bytes - self.used_bytes} of {self.budget_bytes} are free"
            )
        lease = KvLease(self.shape, max_positions)
        self.leases.add(lease)
        self.used_bytes += lease.num_bytes
        return lease

    def release(self, lease: KvLease) -> None:
        """Takes a lease back; one that is back already is left alone."""
        if lease in self.leases:
            self.leases.remove(lease)
            self.used_bytes -= lease.num_bytes

    def check_integrity(self) -> None:
        """Raises RuntimeError when the books do not balance: for tests, after every scenario."""
        total = sum(lease.num_bytes for lease in self.leases)
        if total != self.used_bytes or total > self.budget_bytes:
            raise RuntimeError(f"{self.used_bytes} bytes booked, {total} leased, {self.budget_bytes} allowed")
        for lease in self.leases:
            if not 0 <= lease.length <= lease.capacity:
                raise RuntimeError(f"a lease of {lease.capacity} positions holds {lease.length}")
