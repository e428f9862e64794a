"""Answers through the fleet's server: servers that fail, lie, or fall silent."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from fleet.errors import (
    CredentialsError,
    FleetError,
    LinkError,
    OfflineError,
    RefusedPromptError,
    ServiceAwayError,
    ServiceError,
)
from fleet.operator_api import remote_prompts
from fleet.operator_api.remote_access import RemoteAccess
from fleet.operator_api.remote_prompts import RemotePrompts, events_in
from fleet.protocol.prompt import PromptRequest, Reply
from tests.brokers import WAIT_S

KEY = "fleet-operator-of-the-tests-operator"
HEADERS = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
FIRST = b'event: reply\ndata: {"seq":0,"text":"a"}\n\n'
LAST = b'event: reply\ndata: {"seq":1,"done":true}\n\n'
PROMPT = PromptRequest(prompt="hi")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def error_body(status: int, code: str) -> bytes:
    body = b'{"error":{"code":"%s","message":"it says so"}}' % code.encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


@contextmanager
def server_of(*pieces: bytes, stays: bool = False) -> Iterator[RemotePrompts]:
    """Serve one request with `pieces`, then close the connection unless it `stays`."""
    ended = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            received = b""
            while not received.endswith(b"}"):  # the end of the prompt
                received += connection.recv(1 << 16)
            for piece in pieces:
                connection.sendall(piece)
            if stays:
                ended.wait(WAIT_S)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with RemoteAccess(url, KEY) as access:
            yield RemotePrompts(access)
        ended.set()
        thread.join(WAIT_S)


def answer(prompts: RemotePrompts) -> list[Reply]:
    return list(prompts.ask("kitchen", PROMPT))


def test_events_may_come_in_any_pieces_among_comments() -> None:
    stream = b": waiting\n\n" + FIRST + b"event: news\ndata: {}\n\n" + b": waiting\n\n" + LAST
    for size in (1, 7, len(stream)):
        pieces = [chunk(stream[i : i + size]) for i in range(0, len(stream), size)]
        with server_of(HEADERS, *pieces, chunk(b"")) as prompts:
            assert [(reply.text, reply.done) for reply in answer(prompts)] == [
                ("a", False),
                ("", True),
            ]


@pytest.mark.parametrize(
    ("pieces", "kind", "says"),
    [
        ((HEADERS, chunk(FIRST)), ServiceAwayError, "ended in the midst"),
        ((HEADERS, chunk(FIRST), chunk(b"")), ServiceAwayError, "ended in the midst"),
        ((HEADERS, b"nonsense\r\n"), ServiceAwayError, "ended in the midst"),
        ((HEADERS, chunk(b"event: reply\ndata: []\n\n")), ServiceError, "another version"),
        ((HEADERS, chunk(b"event: problem\ndata: \xff\n\n")), ServiceError, "another version"),
        ((b"HTTP/1.1 404 X\r\nContent-Length: 2\r\n\r\nhi",), ServiceError, "answered 404"),
        ((error_body(401, "bad_credentials"),), CredentialsError, "it says so"),
        ((error_body(503, "offline"),), OfflineError, "it says so"),
        ((error_body(400, "bad_prompt"),), RefusedPromptError, "it says so"),
        ((error_body(413, "oversized"),), RefusedPromptError, "it says so"),
        ((b"",), ServiceAwayError, "no connection to"),
    ],
)  # fmt: skip
def test_a_failure_has_its_class_and_says_what_happened(
    pieces: tuple[bytes, ...], kind: type[FleetError], says: str
) -> None:
    with server_of(*pieces) as prompts, pytest.raises(kind, match=says):
        answer(prompts)


def test_an_error_in_the_midst_is_that_of_the_server() -> None:
    problem = b'event: problem\ndata: {"code":"offline","message":"it went away"}\n\n'
    with server_of(HEADERS, chunk(FIRST + problem), chunk(b"")) as prompts:
        replies = prompts.ask("kitchen", PROMPT)
        assert next(replies).text == "a"
        with pytest.raises(OfflineError, match="it went away"):
            next(replies)


def test_a_server_that_falls_silent_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_prompts, "FIRST_S", 0.2)
    with server_of(stays=True) as prompts, pytest.raises(ServiceAwayError, match="in time"):
        answer(prompts)
    with (
        server_of(HEADERS, chunk(FIRST), stays=True) as prompts,
        pytest.raises(ServiceAwayError, match="ended in the midst"),
    ):
        answer(prompts)


def test_an_answer_without_an_end_is_left_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.transport.prompt_client.REPLY_TIMEOUT_S", -1.0)
    waiting = chunk(b": waiting\n\n")
    with server_of(HEADERS, waiting, stays=True) as prompts:
        replies = prompts.ask("kitchen", PromptRequest(prompt="hi", deadline_ms=1))
        with closing(replies), pytest.raises(LinkError, match="its deadline is over"):
            next(replies)


def test_an_event_without_an_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_prompts, "MAX_EVENT_BYTES", 100)
    with pytest.raises(LinkError, match="at most 100 bytes"):
        list(events_in([b"data: ", b"x" * 200]))
