"""How often a peer may ask, with a clock that we turn."""

from __future__ import annotations

import pytest

from provisioning.rate_limit import MAX_PEERS, RateLimit, peer_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_is_allowed_and_then_so_many_a_minute() -> None:
    clock = Clock()
    limit = RateLimit(10, 3, clock)
    assert [limit.wait_s("a") for _ in range(3)] == [0, 0, 0]
    assert limit.wait_s("a") == pytest.approx(6)
    clock.now = 5.9
    assert limit.wait_s("a") == pytest.approx(0.1)
    clock.now = 6.1
    assert limit.wait_s("a") == 0
    assert limit.wait_s("a") > 0


def test_what_is_given_back_does_not_count() -> None:
    limit = RateLimit(10, 1, Clock())
    for _ in range(5):
        assert limit.wait_s("a") == 0
        limit.give_back("a")
    limit.give_back("a")
    limit.give_back("stranger")
    assert limit.wait_s("a") == 0
    assert limit.wait_s("a") > 0


def test_who_was_quiet_has_no_more_than_a_burst() -> None:
    clock = Clock()
    limit = RateLimit(10, 2, clock)
    assert limit.wait_s("a") == 0
    clock.now = 3600
    assert [limit.wait_s("a") > 0 for _ in range(3)] == [False, False, True]


def test_one_peer_does_not_use_up_anothers() -> None:
    limit = RateLimit(10, 1, Clock())
    assert (limit.wait_s("a"), limit.wait_s("b")) == (0, 0)
    assert limit.wait_s("a") > 0


def test_many_peers_do_not_fill_the_memory() -> None:
    limit = RateLimit(10, 1, Clock())
    for i in range(MAX_PEERS + 10):
        limit.wait_s(str(i))
    assert limit.wait_s("0") == 0, "it was forgotten"
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
    assert peer_of(address) == peer
