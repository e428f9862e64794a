"""A TLS server's addresses, and the limit of open files."""

from __future__ import annotations

import re
import resource
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.errors import ConfigError
from fleet.monitoring.http_endpoint import HttpEndpoint
from fleet.transport.tls_server import TlsServer
from provisioning.authority import CertificateAuthority
from tests.brokers import HOST, WAIT_S


class IdleServer(TlsServer):
    """A server that accepts connections and does nothing else."""

    async def _serve(self, listener: socket.socket, context: ssl.SSLContext) -> None:
        del listener, context
        await self._until_stopped()


@pytest.mark.parametrize(
    ("host", "peer"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("localhost", "localhost"),
        ("::", "::1"),
        ("::", "127.0.0.1"),
    ],
)
def test_a_server_listens_on_the_addresses_of_its_host(
    host: str, peer: str, tmp_path: Path
) -> None:
    tls = CertificateAuthority.create(tmp_path / "ca").server_tls(tmp_path / "server", HOST)
    with IdleServer("server", host, 0, tls) as server:
        socket.create_connection((peer, server.port), WAIT_S).close()


@pytest.mark.parametrize("host", ["absent.invalid", "https://127.0.0.1", "a..b", "192.0.2.1"])
def test_a_host_that_is_no_address_is_named(host: str, tmp_path: Path) -> None:
    tls = CertificateAuthority.create(tmp_path / "ca").server_tls(tmp_path / "server", HOST)
    says = rf"cannot listen on .*{re.escape(host)}.*; check the host's name and this machine's addr"
    with pytest.raises(ConfigError, match=says), IdleServer("server", host, 0, tls):
        pass
    with pytest.raises(ConfigError, match=r"cannot serve metrics on .*; check the host's name"):
        HttpEndpoint(host, 0)


def test_a_process_that_starts_a_server_may_open_as_many_files_as_the_system_permits() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    code = (
        "import resource as r; from fleet.utils.file_limit import raise_file_limit;"
        f"r.setrlimit(r.RLIMIT_NOFILE, (256, {hard}));"
        "raise_file_limit(); print(*r.getrlimit(r.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(hard)] * 2
