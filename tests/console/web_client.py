"""A client of the console that sends any bytes: what an attacker or a script would send."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from http.cookies import SimpleCookie
from typing import Any, Final
from urllib.parse import urlencode

from fleet.registry.store import Registry

WAIT_S: Final = 120.0
SAME_ORIGIN: Final = {"Sec-Fetch-Site": "same-origin"}
FORM: Final = {"Content-Type": "application/x-www-form-urlencoded"}
JSON: Final = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Received:
    """A response."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def error(self) -> dict[str, str]:
        """The error of a response of the API."""
        problem: dict[str, str] = json.loads(self.body)["error"]
        return problem


class WebClient:
    """A client with cookies that follows no redirect and adds no header of a browser."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.port = port
        self.cookies: dict[str, str] = {}
        self._host = host

    def send(
        self, method: str, path: str, body: bytes | str = b"", headers: dict[str, str] | None = None
    ) -> Received:
        """Send one request on a connection of its own."""
        sent = dict(headers or {})
        if self.cookies:
            cookies = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
            sent = {"Cookie": cookies} | sent
        connection = http.client.HTTPConnection(self._host, self.port, timeout=WAIT_S)
        try:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            received = Received(response.status, response.headers, response.read())
        finally:
            connection.close()
        for line in received.headers.get_all("Set-Cookie") or ():
            for name, morsel in SimpleCookie(line).items():
                self.cookies[name] = morsel.value
        return received

    def get(self, path: str, **headers: str) -> Received:
        return self.send("GET", path, headers=headers)

    def post_form(self, path: str, **fields: str) -> Received:
        """Send a form as a page of the console does."""
        return self.send("POST", path, urlencode(fields), FORM | SAME_ORIGIN)

    def post_json(self, path: str, value: Any, method: str = "POST") -> Received:
        """Send a request as the console's script does."""
        return self.send(method, path, json.dumps(value), JSON | SAME_ORIGIN)


def sign_in(registry: Registry, name: str, port: int) -> WebClient:
    """Return a client that has used a link of an operator."""
    client = WebClient(port)
    answer = client.post_form("/sign-in", link=str(registry.operators.make_link(name).secret))
    assert answer.status == 303, answer.text
    return client
