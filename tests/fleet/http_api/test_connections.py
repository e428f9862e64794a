"""Connections of clients that mean harm, and requests that no handler sees."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

import pytest

from edge_agent.local_api.api_keys import ApiKeys
from edge_agent.local_api.device_backend import DeviceBackend
from fleet.http_api.api_address import ApiAddress
from fleet.http_api.api_server import ApiServer
from fleet.transport import http_listener
from fleet.utils.rate_limited_log import RateLimitedLog

HOST: Final = "127.0.0.1"
KEY: Final = "a key of 20 letters."
WAIT_S: Final = 10.0


@pytest.fixture
def server() -> Iterator[ApiServer]:
    """An API without a device, which needs no key."""
    with ApiServer(ApiAddress(HOST, 0), DeviceBackend(lambda: None, ApiKeys())) as running:
        yield running


@pytest.fixture
def locked() -> Iterator[ApiServer]:
    """An API that needs a key."""
    backend = DeviceBackend(lambda: None, ApiKeys((KEY,)))
    with ApiServer(ApiAddress(HOST, 0), backend, needs_key=True) as running:
        yield running


def connect(server: ApiServer) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=WAIT_S)


def reply(server: ApiServer, request: bytes) -> bytes:
    """The response to a request, up to the end of the connection."""
    with connect(server) as client:
        client.sendall(request)
        return received(client)


def received(client: socket.socket) -> bytes:
    data = b""
    while chunk := client.recv(65536):
        data += chunk
    return data


def get(server: ApiServer, *lines: bytes, path: bytes = b"/") -> bytes:
    head = b"\r\n".join((b"GET " + path + b" HTTP/1.1", b"Connection: close", *lines))
    return reply(server, head + b"\r\n\r\n")


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX"])
def test_a_connection_without_a_whole_header_is_closed(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(http_listener, "FIRST_REQUEST_S", 0.05)
    with connect(server) as client:
        client.sendall(begun)
        assert received(client) == b""


def test_silent_connections_keep_no_client_out_and_leave_files_to_others(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_listener, "MAX_CONNECTIONS", 10)
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(server)) for _ in range(20)]
        assert b" 200 OK" in get(server, b"Host: 127.0.0.1")
        assert received(silent[0]) == b""
        silent[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            silent[-1].recv(1)


def test_a_connection_with_a_request_is_not_closed_for_a_new_one(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_listener, "MAX_CONNECTIONS", 2)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: 100-continue\r\n"
    with connect(server) as busy:
        busy.sendall(head + b"Connection: close\r\nContent-Length: 2\r\n\r\n")
        assert b"100 Continue" in busy.recv(1000)
        with connect(server) as other:
            assert received(other) == b""
        busy.sendall(b"{}")
        assert b"'model'" in received(busy)
    assert b" 200 OK" in get(server, b"Host: 127.0.0.1")


def test_a_server_uses_a_share_of_the_files_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (300, 300))
    assert http_listener.max_connections() == 75


@pytest.mark.parametrize(
    "lines",
    [
        (b"Host: 127.0.0.1", b"Origin: http://["),
        (b"Host: 127.0.0.1", "Origin: http://a\u2100b".encode()),
        (b"Host: [::1",),
        (b"Host: [zz]:80",),
        ("Host: a\u2100b".encode(),),
    ],
)
def test_a_host_or_an_origin_that_is_no_address_is_refused(
    server: ApiServer, caplog: pytest.LogCaptureFixture, lines: tuple[bytes, ...]
) -> None:
    assert b" 403 " in get(server, *lines).splitlines()[0]
    assert caplog.records == []


@pytest.mark.parametrize("header", [b"Bearer \xff\xfe", b"Bearer", b"Basic x", b"Bearer  "])
def test_a_key_that_is_none_is_refused(
    locked: ApiServer, caplog: pytest.LogCaptureFixture, header: bytes
) -> None:
    response = get(locked, b"Host: x", b"Authorization: " + header, path=b"/v1/models")
    assert b" 401 " in response.splitlines()[0]
    assert b"WWW-Authenticate: Bearer" in response
    assert caplog.records == []


@pytest.mark.parametrize("scheme", [b"bearer ", b"BEARER\t", b"Bearer  "])
def test_the_scheme_of_a_key_has_no_case(locked: ApiServer, scheme: bytes) -> None:
    header = b"Authorization: " + scheme + KEY.encode()
    response = get(locked, b"Host: x", header, path=b"/v1/models")
    assert b" 401 " not in response.splitlines()[0]


def test_another_method_is_refused_with_those_that_are_allowed(server: ApiServer) -> None:
    response = get(server, b"Host: 127.0.0.1", path=b"/api/chat")
    assert b" 405 " in response.splitlines()[0]
    assert b"Allow: POST" in response


def test_requests_that_are_none_add_one_line_to_the_log(
    server: ApiServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = RateLimitedLog(logging.getLogger("tests"), 600.0)
    monkeypatch.setattr(http_listener, "log", limited)
    post = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    for request in (
        post + b"Content-Length: -5\r\n\r\n",
        post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        b"GET /" + b"x" * 9_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        post + b"Connection: close\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
    ):
        head, _, body = reply(server, request).partition(b"\r\n\r\n")
        assert b" 400 " in head.splitlines()[0]
        assert json.loads(body)["error"]["code"] == "undecodable"
    (record,) = caplog.records
    assert record.exc_info is None
    assert "a request of 127.0.0.1 gets the status 400: " in record.message
