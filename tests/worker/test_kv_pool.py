"""The memory budget of sessions."""

from __future__ import annotations

import pytest

from cloud_broker_worker.kv_pool import KvPool, KvShape, PoolFullError

SHAPE = KvShape(num_layers=2, num_kv_heads=2, head_dim=16, hidden_size=64)


def test_a_lease_takes_its_keys_values_and_hidden_states_from_the_budget() -> None:
    pool = KvPool(SHAPE, 1_000_000)
    lease = pool.lease(100)
    assert pool.used_bytes == lease.num_bytes == pool.num_bytes(100) == 100 * (2 * 2 * 2 * 16 * 4 + 2 * 64)
    pool.check_integrity()


def test_what_does_not_fit_is_refused_with_both_sizes_and_takes_nothing() -> None:
    pool = KvPool(SHAPE, 10 * SHAPE.num_bytes)
    with pytest.raises(PoolFullError, match=rf"11 positions needs {11 * SHAPE.num_bytes} bytes; .* are free"):
        pool.lease(11)
    assert pool.used_bytes == 0


def test_a_lease_given_back_can_be_leased_again_and_giving_it_back_twice_changes_nothing() -> None:
    pool = KvPool(SHAPE, 10 * SHAPE.num_bytes)
    lease = pool.lease(10)
    pool.release(lease)
    pool.release(lease)
    pool.lease(10)
    pool.check_integrity()


def test_books_that_do_not_balance_are_found() -> None:
    pool = KvPool(SHAPE, 1_000_000)
    lease = pool.lease(10)
    lease.length = 11
    with pytest.raises(RuntimeError, match="a lease of 10 positions holds 11"):
        pool.check_integrity()
