"""Hosts and ports, in both families of addresses."""

from __future__ import annotations

import socket
import urllib.request
from contextlib import closing

import pytest

from fleet.errors import ConfigError
from fleet.monitoring.http_endpoint import HttpEndpoint
from fleet.server.supervisor import check_port
from fleet.utils.host_address import bind_probe, check_reachable, free_port, host_port

HOSTS = ("127.0.0.1", "::1", "localhost")


@pytest.mark.parametrize("host", HOSTS)
def test_a_port_in_use_is_found_in_both_families(host: str) -> None:
    check_port(host, free_port(host))
    with closing(bind_probe(host, 0)) as holder:
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError, match=r"in use; stop what uses it .* with --port"):
            check_port(host, port)


def test_advice_fits_the_cause() -> None:
    with pytest.raises(ConfigError, match="check the host's name") as raised:
        check_port("no-such-host.invalid", 1)
    assert "choose another" not in str(raised.value)


@pytest.mark.parametrize("host", HOSTS)
def test_metrics_are_served_in_both_families(host: str) -> None:
    with HttpEndpoint(host, 0) as endpoint:
        assert endpoint.url.startswith(f"http://{host_port(host, 1)[:-1]}")
        with urllib.request.urlopen(f"{endpoint.url}/healthz", timeout=10) as response:
            assert response.status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_to_listen_on_is_none_to_connect_to(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--host {host} is an address to listen on.*--listen"):
        check_reachable(host)
    for name in ("192.168.1.10", "::1", "gateway.local"):
        check_reachable(name)


def test_an_ipv6_address_is_in_brackets() -> None:
    assert host_port("::1", 8883) == "[::1]:8883"
    assert host_port("localhost", 8883) == "localhost:8883"
    assert socket.has_ipv6
