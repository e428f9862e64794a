"""The proxy that the fault tests put between a client and its broker."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise

import pytest

from benchmarks.proxy import Pace, Proxy, Shape
from tests.brokers import HOST, WAIT_S

MESSAGE = bytes(range(256)) * 40


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy in front of an echo server."""
    with socket.create_server((HOST, 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    threading.Thread(target=echo, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        with Proxy(server.getsockname()[1]) as running:
            yield running
        server.shutdown(socket.SHUT_RDWR)


def echo(connection: socket.socket) -> None:
    with connection, suppress(OSError):
        while data := connection.recv(4096):
            connection.sendall(data)


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection((HOST, proxy.port), timeout=WAIT_S)


def receive(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes and (more := connection.recv(num_bytes - len(data))):
        data += more
    return data


def echoes(connection: socket.socket, message: bytes = MESSAGE) -> bool:
    connection.sendall(message)
    return receive(connection, len(message)) == message


def test_bytes_pass_both_ways(proxy: Proxy) -> None:
    with connect(proxy) as one, connect(proxy) as other:
        assert echoes(one)
        assert echoes(other)


def test_bytes_are_counted_each_way(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(MESSAGE)
        assert receive(connection, len(MESSAGE)) == MESSAGE
        assert proxy.num_bytes == {"up": len(MESSAGE), "down": len(MESSAGE)}


def test_small_late_pieces_keep_their_order(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert echoes(connection)
        proxy.shape(
            Shape(latency_s=0.002, jitter_s=0.002, piece_bytes=1000),
            Shape(bytes_per_s=1e6, piece_bytes=7),
        )
        assert echoes(connection)


def test_a_cut_ends_connections_and_accepts_new_ones(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert echoes(connection)
        proxy.cut()
        assert connection.recv(1) == b""
    with connect(proxy) as connection:
        assert echoes(connection)


def test_a_reset_is_one(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert echoes(connection)
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_connections_are_refused_until_it_is_healed(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert echoes(connection)
        proxy.refuse()
        assert connection.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.heal()
    with connect(proxy) as connection:
        assert echoes(connection)


def test_frozen_bytes_arrive_when_it_is_healed(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert echoes(connection)
        proxy.freeze()
        connection.sendall(MESSAGE)
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        proxy.heal()
        connection.settimeout(WAIT_S)
        assert receive(connection, len(MESSAGE)) == MESSAGE


def test_a_half_open_connection_swallows_everything_until_it_is_reset(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert echoes(connection)
        proxy.swallow()
        connection.sendall(MESSAGE)
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        with connect(proxy) as other:
            assert echoes(other)
        proxy.heal()
        connection.settimeout(WAIT_S)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_without_its_target_it_ends_a_connection_at_once() -> None:
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        # The end may come before the connection is made, so connecting may raise as well.
        with (
            Proxy(unused.getsockname()[1]) as proxy,
            pytest.raises(ConnectionResetError),
            connect(proxy) as connection,
        ):
            connection.recv(1)


@pytest.mark.parametrize("seed", range(5))
def test_a_piece_is_late_by_the_latency_and_its_jitter(seed: int) -> None:
    shape = Shape(latency_s=0.2, jitter_s=0.1)
    pace = Pace(seed)
    times = [float(second) for second in range(100)]
    lateness = [pace.due(now, 100, shape) - now for now in times]
    assert all(0.1 <= late <= 0.3 for late in lateness)
    assert max(lateness) - min(lateness) > 0.15


def test_jitter_never_lets_a_piece_overtake() -> None:
    pace = Pace(0)
    due = [pace.due(now / 1000, 1, Shape(latency_s=0.2, jitter_s=0.1)) for now in range(100)]
    assert all(one <= other for one, other in pairwise(due))


def test_a_narrow_link_sends_one_piece_after_the_other() -> None:
    pace = Pace(0)
    shape = Shape(bytes_per_s=1000.0)
    assert [pace.due(10.0, 500, shape) for _ in range(3)] == pytest.approx([10.5, 11.0, 11.5])
    assert pace.due(20.0, 500, shape) == pytest.approx(20.5)


def test_the_same_seed_gives_the_same_delays() -> None:
    shape = Shape(latency_s=0.2, jitter_s=0.1)
    one = Pace(7)
    other = Pace(7)
    assert [one.due(i, 1, shape) for i in range(20)] == [other.due(i, 1, shape) for i in range(20)]
