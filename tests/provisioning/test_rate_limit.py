"""The rate limit of peers, with a manual clock."""

from __future__ import annotations

import pytest

from provisioning.rate_limit import MAX_PEERS, RateLimit, peer_key


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_is_allowed_and_then_a_rate_per_minute() -> None:
    clock = Clock()
    limit = RateLimit(10, 3, clock)
    assert [limit.wait_s("a") for _ in range(3)] == [0, 0, 0]
    assert limit.wait_s("a") == pytest.approx(6)
    clock.now = 5.9
    assert limit.wait_s("a") == pytest.approx(0.1)
    clock.now = 6.1
    assert limit.wait_s("a") == 0
    assert limit.wait_s("a") > 0


def test_a_refunded_request_does_not_count() -> None:
    limit = RateLimit(10, 1, Clock())
    for _ in range(5):
        assert limit.wait_s("a") == 0
        limit.refund("a")
    limit.refund("a")
    limit.refund("stranger")
    assert limit.wait_s("a") == 0
    assert limit.wait_s("a") > 0


def test_an_idle_peer_accumulates_at_most_a_burst() -> None:
    clock = Clock()
    limit = RateLimit(10, 2, clock)
    assert limit.wait_s("a") == 0
    clock.now = 3600
    assert [limit.wait_s("a") > 0 for _ in range(3)] == [False, False, True]


def test_peers_have_separate_limits() -> None:
    limit = RateLimit(10, 1, Clock())
    assert (limit.wait_s("a"), limit.wait_s("b")) == (0, 0)
    assert limit.wait_s("a") > 0


def test_many_peers_do_not_fill_the_memory() -> None:
    limit = RateLimit(10, 1, Clock())
    for i in range(MAX_PEERS + 10):
        limit.wait_s(str(i))
    assert limit.wait_s("0") == 0, "it was dropped"
    assert limit.wait_s(str(MAX_PEERS + 9)) > 0


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8::1:2:3:4", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_an_ipv6_network_is_one_peer(address: str, peer: str) -> None:
    assert peer_key(address) == peer
