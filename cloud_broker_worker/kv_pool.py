"""KV caches of all sessions, leased from one budget."""

from __future__ import annotations

import torch

from fleet.errors import FleetError


class PoolFullError(FleetError):
    """The budget does not hold another cache of that size."""

    code = "busy"


class KvLease:
    """One session's cache: `keys` and `values` [layers, kv_heads, capacity, head_dim]; [0, length) is filled."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        self.keys = torch.empty(shape, dtype=dtype)
        self.values = torch.empty(shape, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.nbytes


class KvPool:
    """Gives leases until `budget_bytes` are out."""

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, budget_bytes: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._shape = num_layers, num_kv_heads, head_dim
        self._dtype = dtype
        self._leases: set[KvLease] = set()

    def num_bytes(self, max_positions: int) -> int:
        """What a lease of `max_positions` takes."""
        layers, heads, head_dim = self._shape
        return 2 * layers * heads * max_positions * head_dim * self._dtype.itemsize

    def lease(self, max_positions: int) -> KvLease:
        """Raises PoolFullError when the budget does not hold it."""
        wanted = self.num_bytes(max_positions)
        if self.used_bytes + wanted > self.budget_bytes:
            raise PoolFullError(
                f"a cache of {max_positions} positions needs {wanted} bytes; "
                f"{self.budget_bytes - self.used_bytes} of {self.budget_bytes} are free"
            )
        layers, heads, head_dim = self._shape
        lease = KvLease((layers, heads, max_positions, head_dim), self._dtype)
        self._leases.add(lease)
        self.used_bytes += lease.num_bytes
        return lease

    def release(self, lease: KvLease) -> None:
        """Takes a lease back; one that is back already is left alone."""
        if lease in self._leases:
            self._leases.remove(lease)
            self.used_bytes -= lease.num_bytes

    def check_integrity(self) -> None:
        """Raises RuntimeError when the books do not balance: for tests, after every scenario."""
        total = sum(lease.num_bytes for lease in self._leases)
        if total != self.used_bytes or total > self.budget_bytes:
            raise RuntimeError(f"{self.used_bytes} bytes booked, {total} leased, {self.budget_bytes} allowed")
        for lease in self._leases:
            if not 0 <= lease.length <= lease.capacity:
                raise RuntimeError(f"a lease of {lease.capacity} positions holds {lease.length}")
