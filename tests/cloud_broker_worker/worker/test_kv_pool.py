"""The memory budget of sessions."""

from __future__ import annotations

import pytest

from cloud_broker_worker.worker.kv_pool import KvPool, KvShape
from fleet.errors import PoolFullError

SHAPE = KvShape(num_layers=2, num_kv_heads=2, head_dim=16, hidden_size=64)


def test_a_cache_and_a_store_are_taken_from_one_budget() -> None:
    pool = KvPool(SHAPE, 1_000_000)
    lease = pool.lease(100)
    store = pool.store()
    pool.grow_store(store, 100)
    assert lease.num_bytes == 100 * (2 * 2 * 2 * 16 * 4)
    assert store.num_bytes == 100 * (2 * 64)
    assert pool.used_bytes == lease.num_bytes + store.num_bytes
    pool.check_integrity()


def test_what_does_not_fit_is_refused_with_both_sizes_and_takes_nothing() -> None:
    pool = KvPool(SHAPE, 10 * SHAPE.cache_bytes)
    with pytest.raises(
        PoolFullError, match=rf"11 positions need {11 * SHAPE.cache_bytes} bytes; .* are free"
    ):
        pool.lease(11)
    assert pool.used_bytes == 0


def test_what_is_given_back_can_be_leased_again_and_giving_it_back_twice_changes_nothing() -> None:
    pool = KvPool(SHAPE, 10 * (SHAPE.cache_bytes + SHAPE.hidden_bytes))
    for _ in range(2):
        lease = pool.lease(10)
        store = pool.store()
        pool.grow_store(store, 10)
        for _ in range(2):
            pool.free_lease(lease)
            pool.free_store(store)
        pool.check_integrity()
    assert pool.used_bytes == 0


def test_books_that_do_not_balance_are_found() -> None:
    pool = KvPool(SHAPE, 1_000_000)
    lease = pool.lease(10)
    lease.length = 11
    with pytest.raises(RuntimeError, match="a lease of 10 positions holds 11"):
        pool.check_integrity()


def test_a_cache_and_a_store_that_grow_keep_their_positions() -> None:
    pool = KvPool(SHAPE, 1_000_000)
    lease = pool.lease(4)
    lease.layers[1][:] = 7.0
    lease.length = 3
    store = pool.store()
    pool.grow_store(store, 2)
    store.rows[:] = 5.0
    pool.grow_lease(lease, 10)
    pool.grow_store(store, 10)
    assert (lease.capacity, store.capacity, lease.length) == (10, 10, 3)
    assert bool((lease.layers[1][:, :, :3] == 7.0).all())
    assert bool((store.rows[:2] == 5.0).all())
    pool.check_integrity()
