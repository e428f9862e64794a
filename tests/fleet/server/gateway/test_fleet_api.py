"""The fleet's HTTP API: keys, rights, another device for one that is lost, limits, hang-ups."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest

from fleet.protocol import topics
from fleet.protocol.prompt import Reply
from fleet.server.gateway import fleet_backend
from fleet.server.gateway.fleet_backend import ApiLimits
from tests.fleet.server.gateway.api_fleet import APP, WAIT_S, ApiFleet, api_fleet, chat

T = TypeVar("T")
CHAT = "/v1/chat/completions"


@pytest.fixture
def database(tmp_path: Path, ready_sqlite: Path) -> Path:
    """A registry without any row."""
    return Path(shutil.copy(ready_sqlite, tmp_path / "registry.sqlite"))


@pytest.fixture
def fleet(database: Path) -> Iterator[ApiFleet]:
    with api_fleet(database) as started:
        yield started


def with_client(
    fleet: ApiFleet, work: Callable[[aiohttp.ClientSession], Awaitable[T]], key: str | None = None
) -> T:
    async def run() -> T:
        async with fleet.session(key) as session:
            return await work(session)

    return asyncio.run(run())


async def ask(session: aiohttp.ClientSession, model: str, **fields: Any) -> tuple[int, Any, str]:
    """Return the status, the body and the header Retry-After of a chat completion."""
    async with session.post(CHAT, json=chat(model, **fields)) as response:
        return response.status, await response.json(), response.headers.get("Retry-After", "")


def ask_once(
    fleet: ApiFleet, model: str, key: str | None = None, **fields: Any
) -> tuple[int, Any, str]:
    return with_client(fleet, lambda session: ask(session, model, **fields), key)


async def in_thread(work: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.to_thread(work, *arguments)


def test_a_device_answers_under_the_name_of_the_keys_app(fleet: ApiFleet) -> None:
    device = fleet.device("kitchen")

    async def work(session: aiohttp.ClientSession) -> Any:
        asking = asyncio.create_task(ask(session, "kitchen"))
        prompt = await in_thread(device.next_prompt)
        device.finish(prompt)
        return prompt, await asking

    (app, _), (status, body, _) = with_client(fleet, work)
    assert (app, status) == (APP, 200)
    assert body["choices"][0]["message"]["content"] == "kitchen:done"
    assert body["model"] == "kitchen"
    fleet.wait_idle()
    assert device.cancelled.empty()


def test_models_are_only_what_the_key_may_prompt(fleet: ApiFleet) -> None:
    fleet.registry.identities.disallow(APP, ["home"])
    fleet.registry.identities.allow(APP, ["attic"])
    fleet.registry.identities.tag("attic", {"floor": "2"})
    fleet.follow()

    async def names(session: aiohttp.ClientSession) -> tuple[list[str], list[str]]:
        async with session.get("/v1/models") as response:
            openai = [each["id"] for each in (await response.json())["data"]]
        async with session.get("/api/tags") as response:
            return openai, [each["name"] for each in (await response.json())["models"]]

    openai, ollama = with_client(fleet, names)
    assert openai == ["fleet", "attic", "group:home", "tag:floor=2"]
    assert len(ollama) == len(openai)
    assert ask_once(fleet, "kitchen")[0] == 404


@pytest.mark.parametrize("key", ["", "sk-other", f"fleet-{'0' * 16}-{'0' * 64}"])
def test_a_missing_or_unknown_key_is_refused(fleet: ApiFleet, key: str) -> None:
    status, body, _ = ask_once(fleet, "fleet", key)
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    assert "fleet key create APP" in body["error"]["message"]


def test_a_new_key_works_at_once_and_an_expired_one_does_not(fleet: ApiFleet) -> None:
    expired = str(fleet.registry.api_keys.create(APP, expires_at=1.0))
    new = str(fleet.registry.api_keys.create(APP, expires_at=9e9))
    assert ask_once(fleet, "ghost", new)[0] == 404
    assert ask_once(fleet, "ghost", expired)[0] == 401


def test_an_offline_device_is_named_with_the_time_to_try_again(fleet: ApiFleet) -> None:
    status, body, retry_after = ask_once(fleet, "kitchen")
    assert (status, retry_after) == (503, "15")
    assert body["error"]["message"].startswith("offline now: kitchen")


def test_a_server_without_a_link_says_so(fleet: ApiFleet) -> None:
    fleet.device("kitchen")
    fleet.link.drop()
    status, body, retry_after = ask_once(fleet, "kitchen")
    assert (status, bool(retry_after)) == (503, True)
    assert "no connection to the broker" in body["error"]["message"]


def test_another_device_answers_for_one_that_is_busy(fleet: ApiFleet) -> None:
    attic = fleet.device("attic")
    kitchen = fleet.device("kitchen")

    async def work(session: aiohttp.ClientSession) -> Any:
        asking = asyncio.create_task(ask(session, "group:home"))
        attic.refuse(await in_thread(attic.next_prompt), "busy")
        kitchen.finish(await in_thread(kitchen.next_prompt))
        return await asking

    status, body, _ = with_client(fleet, work)
    assert (status, body["choices"][0]["message"]["content"]) == (200, "kitchen:done")


def test_the_refusal_of_a_bad_prompt_is_final(fleet: ApiFleet) -> None:
    attic = fleet.device("attic")
    kitchen = fleet.device("kitchen")

    async def work(session: aiohttp.ClientSession) -> Any:
        asking = asyncio.create_task(ask(session, "fleet"))
        attic.refuse(await in_thread(attic.next_prompt), "bad_prompt")
        return await asking

    assert with_client(fleet, work)[0] == 400
    assert kitchen.prompts.empty()


def test_a_busy_device_without_another_is_reported_with_retry_after(fleet: ApiFleet) -> None:
    kitchen = fleet.device("kitchen")

    async def work(session: aiohttp.ClientSession) -> Any:
        asking = asyncio.create_task(ask(session, "fleet"))
        kitchen.refuse(await in_thread(kitchen.next_prompt), "busy")
        return await asking

    status, body, retry_after = with_client(fleet, work)
    assert (status, body["error"]["code"], retry_after) == (429, "rate_limit_exceeded", "1")


@pytest.mark.parametrize("loss", ["link", "restart"])
def test_another_device_answers_for_one_that_is_lost_before_its_first_token(
    fleet: ApiFleet, loss: str
) -> None:
    attic = fleet.device("attic")
    kitchen = fleet.device("kitchen")

    async def work(session: aiohttp.ClientSession) -> Any:
        asking = asyncio.create_task(ask(session, "fleet", stream=False))
        await in_thread(attic.next_prompt)
        if loss == "link":
            attic.link.drop()
        else:
            attic.announce(epoch=2)
        kitchen.finish(await in_thread(kitchen.next_prompt))
        return await asking

    status, body, _ = with_client(fleet, work)
    assert (status, body["choices"][0]["message"]["content"]) == (200, "kitchen:done")


def test_a_device_that_is_lost_after_its_first_token_goes_on_when_it_is_back(
    fleet: ApiFleet,
) -> None:
    attic = fleet.device("attic")

    async def work(session: aiohttp.ClientSession) -> Any:
        asking = asyncio.create_task(ask(session, "fleet"))
        prompt = await in_thread(attic.next_prompt)
        attic.begin(prompt)
        await in_thread(attic.link.drop)
        fleet.wait_online("attic", online=False)
        attic.link.restore()
        attic.finish(prompt)
        return await asking

    status, body, _ = with_client(fleet, work)
    assert (status, body["choices"][0]["message"]["content"]) == (200, "attic:done")


def test_prompts_go_to_the_device_with_the_least_work(fleet: ApiFleet) -> None:
    attic = fleet.device("attic")
    kitchen = fleet.device("kitchen")
    attic.report_load(num_running=2, num_waiting=1)

    async def work(session: aiohttp.ClientSession) -> None:
        state = fleet.backend.directory.states
        while not state(["attic"])["attic"].num_waiting:
            await asyncio.sleep(0.001)
        asking = [asyncio.create_task(ask(session, "fleet")) for _ in range(2)]
        for _ in asking:
            kitchen.finish(await in_thread(kitchen.next_prompt))
        await asyncio.gather(*asking)

    with_client(fleet, work)
    assert attic.prompts.empty()


def test_a_device_that_does_not_reply_by_the_deadline_is_abandoned(
    fleet: ApiFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_backend, "LATE_S", 0.0)
    kitchen = fleet.device("kitchen")
    options = {"deadline_ms": 1}
    status, body, _ = with_client(fleet, lambda session: ask(session, "kitchen", fleet=options))
    assert (status, "did not respond" in body["error"]["message"]) == (503, True)
    _, request = kitchen.next_prompt()
    assert kitchen.cancelled.get(timeout=WAIT_S) == request


CHANGES: dict[str, Callable[[ApiFleet], object]] = {
    "key revoked": lambda fleet: fleet.registry.api_keys.revoke(fleet.key.split("-")[1]),
    "app suspended": lambda fleet: fleet.registry.identities.suspend(APP),
    "app disallowed": lambda fleet: fleet.registry.identities.disallow(APP, ["home"]),
    "device suspended": lambda fleet: fleet.registry.identities.suspend("kitchen"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stream_ends_with_an_error_when_its_rights_end(fleet: ApiFleet, change: str) -> None:
    kitchen = fleet.device("kitchen")

    async def work(session: aiohttp.ClientSession) -> list[bytes]:
        async with session.post(CHAT, json=chat("kitchen", stream=True)) as response:
            lines = response.content
            first = await lines.readline()
            CHANGES[change](fleet)
            await in_thread(fleet.follow)
            return [first, *(await lines.read()).splitlines()]

    async def with_device(session: aiohttp.ClientSession) -> list[bytes]:
        streaming = asyncio.create_task(work(session))
        kitchen.begin(await in_thread(kitchen.next_prompt))
        return await streaming

    lines = with_client(fleet, with_device)
    assert b'"error"' in b"".join(lines[1:])
    assert b"[DONE]" not in b"".join(lines)
    kitchen.cancelled.get(timeout=WAIT_S)
    fleet.wait_idle()


def test_another_key_of_the_app_is_not_affected(fleet: ApiFleet) -> None:
    kitchen = fleet.device("kitchen")
    other = fleet.registry.api_keys.create(APP)

    async def work(session: aiohttp.ClientSession) -> Any:
        asking = asyncio.create_task(ask(session, "kitchen"))
        prompt = await in_thread(kitchen.next_prompt)
        fleet.registry.api_keys.revoke(other.id)
        await in_thread(fleet.follow)
        kitchen.finish(prompt)
        return await asking

    assert with_client(fleet, work)[0] == 200


@pytest.mark.parametrize("has_begun", [True, False])
def test_an_answer_is_cancelled_when_its_client_hangs_up(fleet: ApiFleet, has_begun: bool) -> None:
    kitchen = fleet.device("kitchen")

    async def work(session: aiohttp.ClientSession) -> tuple[str, str]:
        asking = asyncio.create_task(ask(session, "kitchen", stream=has_begun))
        prompt = await in_thread(kitchen.next_prompt)
        if has_begun:
            kitchen.begin(prompt)
        asking.cancel()
        return prompt

    _, request = with_client(fleet, work)
    assert kitchen.cancelled.get(timeout=WAIT_S) == request
    fleet.wait_idle()


@pytest.mark.parametrize("limits", [ApiLimits(max_per_key=1), ApiLimits(max_active=1)])
def test_answers_in_progress_are_limited(database: Path, limits: ApiLimits) -> None:
    with api_fleet(database, limits) as fleet:
        kitchen = fleet.device("kitchen")

        async def work(session: aiohttp.ClientSession) -> Any:
            asking = asyncio.create_task(ask(session, "kitchen"))
            prompt = await in_thread(kitchen.next_prompt)
            refused = await ask(session, "kitchen")
            kitchen.finish(prompt)
            await asking
            asking = asyncio.create_task(ask(session, "kitchen"))
            kitchen.finish(await in_thread(kitchen.next_prompt))
            return refused, await asking

        (refused, body, retry_after), (status, _, _) = with_client(fleet, work)
    assert (refused, retry_after, status) == (429, "1", 200)
    assert "in progress" in body["error"]["message"]


def test_a_device_that_has_restarted_in_mid_answer_ends_the_stream(fleet: ApiFleet) -> None:
    kitchen = fleet.device("kitchen")

    async def work(session: aiohttp.ClientSession) -> bytes:
        async with session.post(CHAT, json=chat("kitchen", stream=True)) as response:
            return await response.read()

    async def with_device(session: aiohttp.ClientSession) -> bytes:
        streaming = asyncio.create_task(work(session))
        app, request = await in_thread(kitchen.next_prompt)
        kitchen.begin((app, request))
        reply = b'{"seq": 0, "text": "again", "generation": "another"}'
        kitchen.link.publish(topics.device_reply("kitchen", app, request), reply, qos=1)
        return await streaming

    assert b"has restarted" in with_client(fleet, with_device)
    fleet.wait_idle()


def test_nothing_but_the_api_is_served(fleet: ApiFleet) -> None:
    async def work(session: aiohttp.ClientSession) -> list[int]:
        statuses = []
        for path in ("/v1/ca", "/v1/join", "/metrics"):
            async with session.get(path) as response:
                statuses.append(response.status)
        return statuses

    assert with_client(fleet, work) == [404, 404, 404]


def test_a_reverse_proxy_may_forward_its_own_host(fleet: ApiFleet) -> None:
    async def work(session: aiohttp.ClientSession) -> int:
        async with session.get("/v1/models", headers={"Host": "fleet.example"}) as response:
            return response.status

    assert with_client(fleet, work) == 200


def test_a_page_of_another_site_gets_no_answer(fleet: ApiFleet) -> None:
    async def work(session: aiohttp.ClientSession) -> tuple[int, bool]:
        headers = {"Origin": "https://example.org"}
        async with session.get("/v1/models", headers=headers) as response:
            return response.status, "Access-Control-Allow-Origin" in response.headers

    assert with_client(fleet, work) == (403, False)


def test_a_device_that_does_not_stop_to_send_is_cut_off(
    fleet: ApiFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.transport.open_requests.MAX_ANSWER_BYTES", 5000)
    device = fleet.device("kitchen")

    async def work(session: aiohttp.ClientSession) -> Any:
        asking = asyncio.create_task(ask(session, "kitchen"))
        prompt = await in_thread(device.next_prompt)
        device.begin(prompt)
        for seq in range(1, 100):
            device.reply(prompt, Reply(seq=seq, text="x" * 100))
        return await asking

    status, body, _ = with_client(fleet, work)
    assert status == 503
    assert "sent more than 5,000 bytes" in body["error"]["message"]
    assert device.cancelled.get(timeout=WAIT_S)
    fleet.wait_idle()


def test_what_a_device_writes_into_an_error_is_not_in_the_log(
    fleet: ApiFleet, caplog: pytest.LogCaptureFixture
) -> None:
    device = fleet.device("kitchen")

    async def work(session: aiohttp.ClientSession) -> Any:
        asking = asyncio.create_task(ask(session, "kitchen"))
        device.refuse(await in_thread(device.next_prompt), "a\nforged line")
        return await asking

    status, body, _ = with_client(fleet, work)
    assert (status, body["error"]["code"]) == (500, "internal")
    assert caplog.text == ""
