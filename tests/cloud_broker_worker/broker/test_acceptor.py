"""Silent connections at the listener, and file descriptors."""

from __future__ import annotations

import asyncio
import resource
import socket
from contextlib import ExitStack

import pytest

from cloud_broker_worker.broker import acceptor
from cloud_broker_worker.broker.acceptor import (
    MAX_SILENT,
    MAX_SILENT_PER_ADDRESS,
    SELECT_LIMIT,
    SilentConnections,
    above_select,
)
from fleet.utils.host_address import peer_network
from tests.brokers import HOST, Site
from tests.cloud_broker_worker.broker import raw


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_a_whole_ipv6_network_counts_as_one_address(address: str, network: str) -> None:
    assert peer_network(address) == network


def test_the_oldest_silent_connection_of_an_address_makes_room() -> None:
    async def scenario() -> None:
        silent = SilentConnections()
        tasks = [asyncio.create_task(asyncio.sleep(0)) for _ in range(MAX_SILENT_PER_ADDRESS + 2)]
        other = asyncio.create_task(asyncio.sleep(0))
        assert silent.add(other, "192.0.2.1") is None
        assert [silent.add(task, "192.0.2.2") for task in tasks[:-2]] == [None] * (len(tasks) - 2)
        silent.discard(tasks[0])  # its CONNECT came
        assert silent.add(tasks[-2], "192.0.2.2") is None
        assert silent.add(tasks[-1], "192.0.2.2") is tasks[1]
        await asyncio.gather(other, *tasks)

    asyncio.run(scenario())


def test_silent_connections_of_many_addresses_have_a_limit_in_all() -> None:
    async def scenario() -> None:
        silent = SilentConnections()
        tasks = [asyncio.create_task(asyncio.sleep(0)) for _ in range(MAX_SILENT + 1)]
        oldest = [silent.add(task, f"10.0.{i // 256}.{i % 256}") for i, task in enumerate(tasks)]
        assert oldest == [None] * MAX_SILENT + [tasks[0]]
        for task in tasks:
            silent.discard(task)
        assert not silent._by_network
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_silent_connections_keep_no_client_out(
    embedded_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor, "MAX_SILENT_PER_ADDRESS", 5)
    with ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection((HOST, embedded_site.port)))
            for _ in range(20)
        ]
        with raw.connected(embedded_site.identity("d1")) as client:
            assert silent[0].recv(1) == b""  # the oldest ones were closed
            client.sendall(raw.PINGREQ)
            assert raw.receive(client, 2) == raw.PINGRESP
        silent[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            silent[-1].recv(1)


def test_a_clients_connection_leaves_low_file_descriptors_to_select() -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= SELECT_LIMIT:
        pytest.skip("the limit of file descriptors is lower")
    left, right = socket.socketpair()
    with above_select(left) as moved, right:
        assert moved.fileno() >= SELECT_LIMIT
        assert left.fileno() == -1
        moved.send(b"same connection")
        assert right.recv(20) == b"same connection"
