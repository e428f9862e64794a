"""The API of operators: bad input, statuses, and work that takes too long."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import urllib3

from fleet.errors import BusyError, DeadlineError
from fleet.http_api import request_body
from fleet.operator_api.catalogue import OPERATIONS
from fleet.operator_api.operation import PREFIX, OperatorRole
from fleet.server.console import api_routes
from fleet.server.console.blocking_calls import MAX_CALLS, BlockingCalls
from tests.brokers import WAIT_S
from tests.fleet.operator_api.api_fleet import KEYS, ApiOfTests, make_fleet, serving

JSON: Final = {"Content-Type": "application/json", "Connection": "close"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiOfTests]:
    with serving(make_fleet(tmp_path_factory.mktemp("api") / "fleet")) as opened:
        yield opened


def ask(
    server: ApiOfTests, method: str, path: str, body: object = None, **headers: str
) -> tuple[int, Any]:
    """Send a request as an admin; return the status and the body."""
    key = {"Authorization": f"Bearer {KEYS[OperatorRole.ADMIN]}"}
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    response = urllib3.request(
        method,
        server.url + PREFIX + path,
        body=data,
        headers=key | JSON | headers,
        retries=False,
        timeout=WAIT_S,
    )
    assert response.headers["Content-Type"].startswith("application/json")
    return response.status, response.json()


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("GET", "/devices?sorted=name", None, 400, "unknown field 'sorted': leave it out"),
        ("GET", "/devices?limit=1&limit=2", None, 400, "'limit' is given twice"),
        ("GET", "/devices/kitchen?device=attic", None, 400, "'device' is given twice"),
        ("GET", "/devices?limit=0", None, 400, "limit: expected a whole number from 1 to 10,000"),
        ("GET", "/devices?limit=many", None, 400, "limit: expected a whole number"),
        ("GET", "/devices?online=maybe", None, 400, "online: expected true or false"),
        ("GET", "/devices?sort=size", None, 400, "sort: expected one of "),
        ("GET", "/statistics/devices?since=-1", None, 400, "since: expected a number"),
        ("GET", "/statistics/devices?since=nan", None, 400, "since: expected a number"),
        ("GET", "/rollouts/first", None, 400, "rollout: expected a whole number"),
        ("GET", "/devices/oven", None, 404, "unknown device 'oven'"),
        ("GET", "/devices/a%2Fb%00%3Cscript%3E", None, 404, "unknown device"),
        ("GET", "/nothing", None, 404, "see docs/operator-api.json"),
        ("PUT", "/devices", {}, 405, "see docs/operator-api.json"),
        ("POST", "/keys", b"", 400, "expected the field 'app'"),
        ("POST", "/keys", b"{", 400, "expected a JSON object"),
        ("POST", "/keys", [1], 400, "expected a JSON object"),
        ("POST", "/keys", b"\xff", 400, "expected a JSON object"),
        ("POST", "/keys", b"[" * 100_000, 400, "expected a JSON object"),
        ("POST", "/keys", {"app": 5}, 400, "app: expected a text"),
        ("POST", "/keys", {"app": "phone", "life": 5}, 400, "unknown field 'life'"),
        ("POST", "/keys", {"app": "phone", "life_s": 0}, 400, "life_s: expected a number"),
        ("POST", "/keys", {"app": "phone", "life_s": "60"}, 400, "life_s: expected a number"),
        ("POST", "/keys?app=phone", {"app": "phone"}, 400, "put it into the body"),
        ("PUT", "/devices/kitchen/group", {}, 400, "expected the field 'group'"),
        ("PUT", "/devices/kitchen/group", {"device": "attic"}, 400, "'device' is given twice"),
        (
            "POST",
            "/identities",
            {"enrolments": [{"name": "new", "grup": "house"}]},
            400,
            "unknown field 'enrolments[0].grup'",
        ),
        ("POST", "/identities", {"enrolments": []}, 400, "enrolments: expected a list of at least"),
        ("POST", "/rollouts", {"bundle": "bbbb", "plan": {"canary": 0}}, 400, "plan.canary"),
        ("PATCH", "/settings/all", {"settings": {"triggers": 5}}, 400, "triggers"),
        ("POST", "/rollouts/resume", {}, 409, "cannot resume roll-out 1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(
    server: ApiOfTests, method: str, path: str, body: object, status: int, says: str
) -> None:
    got, answer = ask(server, method, path, body)
    assert says in answer["error"]["message"]
    assert got == status
    assert answer["error"].keys() == {"code", "message"}


def test_a_field_without_a_value_is_left_out_as_a_form_sends_it(server: ApiOfTests) -> None:
    status, page = ask(server, "GET", "/devices?search=&online=&group=house&limit=1")
    assert (status, page["total"], page["next_page"]) == (200, 2, "attic")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(
    server: ApiOfTests, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_routes, "MAX_BODY_BYTES", 1000)
    body = b'{"app": "' + b"a" * 2000 + b'"}'
    if chunked:
        status, answer = ask(server, "POST", "/keys", body, **{"Transfer-Encoding": "chunked"})
    else:
        status, answer = ask(server, "POST", "/keys", body)
    assert (status, answer["error"]["code"]) == (413, "oversized")


def test_a_body_that_does_not_arrive_ends_in_time(
    server: ApiOfTests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_body, "BODY_S", 0.05)
    status, answer = ask(server, "POST", "/keys", b"", **{"Content-Length": "10"})
    assert (status, answer["error"]["code"]) == (400, "undecodable")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_a_body_of_a_form_is_refused(server: ApiOfTests, kind: str) -> None:
    """A page of another site may send these, and JSON only after it has asked."""
    status, answer = ask(server, "POST", "/keys", {"app": "phone"}, **{"Content-Type": kind})
    assert status == 400
    assert "expected a body of the type application/json" in answer["error"]["message"]


def test_a_response_is_not_kept(server: ApiOfTests) -> None:
    key = {"Authorization": f"Bearer {KEYS[OperatorRole.VIEWER]}"}
    response = urllib3.request("GET", f"{server.url}{PREFIX}/workers", headers=key)
    assert response.headers["Cache-Control"] == "no-store"


def test_a_registry_that_is_gone_is_an_error_of_the_server(tmp_path: Path) -> None:
    home = make_fleet(tmp_path / "fleet")
    with serving(home) as server:
        (home.folder / "registry.sqlite").write_bytes(b"no database" * 1000)
        status, answer = ask(server, "GET", "/workers")
        assert (status, answer["error"]["code"]) == (503, "registry")
        assert str(tmp_path) not in answer["error"]["message"]


def test_each_operation_has_its_own_route_and_refuses_unknown_fields() -> None:
    routes = {(each.method, each.path) for each in OPERATIONS}
    assert len(routes) == len(OPERATIONS)
    for each in OPERATIONS:
        assert each.request.__struct_config__.forbid_unknown_fields, each.path
        assert each.path_fields <= set(each.request.__struct_fields__), each.path


def test_a_call_that_takes_too_long_ends_with_an_error() -> None:
    release = threading.Event()
    calls = BlockingCalls(timeout_s=0.01)
    with pytest.raises(DeadlineError, match="look before you repeat it"):
        asyncio.run(calls.run(lambda: release.wait(WAIT_S)))
    release.set()
    calls.close()


def test_more_calls_than_the_limit_are_refused_and_later_ones_run() -> None:
    release = threading.Event()
    calls = BlockingCalls()

    async def fill() -> bool:
        tasks = [
            asyncio.create_task(calls.run(lambda: release.wait(WAIT_S))) for _ in range(MAX_CALLS)
        ]
        await asyncio.sleep(0)  # each of them begins
        with pytest.raises(BusyError):
            await calls.run(lambda: True)
        release.set()
        await asyncio.gather(*tasks)
        return await calls.run(lambda: True)

    assert asyncio.run(fill())
    calls.close()
