"""Hosts and ports, in both families of addresses."""

from __future__ import annotations

import re
import socket
import urllib.request
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from fleet.errors import ConfigError
from fleet.identity.identity import IdentityConfig
from fleet.identity.service_client import check_url
from fleet.monitoring.http_endpoint import HttpEndpoint
from fleet.server.fleet_options import FleetOptions, resolve_config
from fleet.server.supervisor import check_port
from fleet.utils.host_address import (
    bind_probe,
    check_host,
    check_reachable,
    free_port,
    host_port,
)
from fleet.utils.text_files import decode_json

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


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0", "0x0", "00.0.0.0", "::ffff:0.0.0.0"])
def test_an_address_to_listen_on_is_none_to_connect_to(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--host {host} is an address to listen on.*--listen"):
        check_reachable(host)
    for name in ("192.168.1.10", "::1", "gateway.local"):
        check_reachable(name)


def test_an_ipv6_address_is_in_brackets() -> None:
    assert host_port("::1", 8883) == "[::1]:8883"
    assert host_port("localhost", 8883) == "localhost:8883"
    assert socket.has_ipv6


@pytest.mark.parametrize(
    "host", [*HOSTS, "fe80::1%eth0", "my_pi.local", "fleet.example.", "192.168.1.30", "1.pi", "4b"]
)
def test_a_name_or_an_address_alone_is_a_host(host: str) -> None:
    check_host(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "[::1]",
        "https://pi",
        "pi:8883",
        "a b",
        "pi\n",
        "a..b",
        "a" * 64,
        "b\u00fccher.example",
        "192.168.1.300",
        "192.168.001.010",
        "10.0.0",
        "1.2.3.4.5",
        "0x7f.1",
        "224.0.0.1",
        "ff02::1",
        "255.255.255.255",
        "-pi",
        "pi-.local",
    ],
)
def test_a_host_with_anything_else_is_refused_wherever_it_is_given(
    host: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="expected a name or an address alone"):
        resolve_config(tmp_path, FleetOptions(host=host))
    fields = {"name": "pi", "role": "device", "host": host, "port": 1}
    with pytest.raises(ConfigError, match=r"identity\.json .*expected a name or an address alone"):
        decode_json(msgspec.json.encode(fields), "identity.json", IdentityConfig)


@pytest.mark.parametrize("host", ["192.168.1.300", "10.0.0", "-pi", "[ff02::1]"])
def test_the_host_of_a_service_is_checked_as_well(host: str) -> None:
    with pytest.raises(ConfigError, match=rf"service 'https://.*{re.escape(host.strip('[]'))}"):
        check_url(f"https://{host}:8443")
    assert check_url("https://[::1]:8443") == "https://[::1]:8443"


def test_broker_and_service_need_a_port_each(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"both have port 8443.*--service-port"):
        resolve_config(tmp_path, FleetOptions(port=8443))
