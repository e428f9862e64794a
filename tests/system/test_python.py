"""Python programs: the same answers as over MQTT and HTTP, and the examples of docs/python.md."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_agent.serving.agent import Agent
from fleet import AsyncFleetClient, FleetClient, FleetError, Mode, PromptRequest
from fleet.bundles.manifest import Bundle
from fleet.errors import ConfigError, IdentityError, LinkError, RefusedPromptError, TopicError
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.transport import async_prompt_client, open_requests
from tests.brokers import free_port, wait_until
from tests.default_bundle import make_default_bundle
from tests.system.python_ways import DEVICE, OTHER_APP, Ways, outcome_of, python_ways

ROOT = Path(__file__).parents[2]
MODES = (Mode.STANDALONE, Mode.COLLABORATIVE, Mode.VERIFIED, Mode.AUTO)
PLAIN = PromptRequest(
    prompt="Say something about rivers.",
    threshold=1.0,
    min_agreement=1.0,
    max_new_tokens=12,
    temperature=1.0,
    seed=4,
)
REQUESTS: dict[str, PromptRequest] = {
    "greedy": replace(PLAIN, temperature=0.0),
    "a seed": PLAIN,
    "the largest seed": replace(PLAIN, seed=(1 << 63) - 1),
    "penalties": replace(
        PLAIN, repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.5
    ),
    "a bias": replace(PLAIN, logit_bias={"70": 5.0, "300": -100.0}),
    "logprobs": replace(PLAIN, logprobs=True, top_logprobs=3, stream=False),
    "choices": replace(PLAIN, n=3, stream=False, logprobs=True),
    "choices with a stop text": replace(PLAIN, n=2, stream=False, stop=("w", "\x15")),
}


@pytest.fixture(scope="module")
def ways(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    with python_ways(tmp_path_factory.mktemp("ways"), tiny_bundle) as started:
        yield started


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS.keys())
def test_each_way_gives_the_same_answer_in_each_mode(ways: Ways, request_: PromptRequest) -> None:
    texts = {}
    for mode in MODES:
        asked = replace(request_, mode=mode)
        outcomes = {name: ask(asked) for name, ask in ways.all().items()}
        if mode is Mode.STANDALONE:
            outcomes["Engine"] = outcome_of(ways.engine.generate(asked))
        assert set(outcomes.values()) == {outcomes["LocalFleet"]}
        texts[mode] = outcomes["LocalFleet"].texts
    # At these limits three modes give the full model's text.
    assert texts[Mode.COLLABORATIVE] == texts[Mode.VERIFIED] == texts[Mode.AUTO]
    assert texts[Mode.STANDALONE] != texts[Mode.VERIFIED]


@pytest.mark.parametrize("mode", MODES)
def test_each_way_ends_the_answer_before_the_same_stop_text(ways: Ways, mode: Mode) -> None:
    whole = ways.local.generate(replace(PLAIN, mode=mode)).text
    asked = replace(PLAIN, mode=mode, stop=("never there", whole[5:8]))
    outcomes = {ask(asked) for ask in ways.all().values()}
    (outcome,) = outcomes
    assert outcome.texts == (whole[: whole.index(whole[5:8])],)
    assert outcome.finish_reasons == ("stop",)


def test_a_stream_has_the_source_of_each_token(ways: Ways) -> None:
    answer = ways.local.generate(PLAIN, mode="collaborative", threshold=0.05)
    sources = [reply.source for reply in answer if reply.token_id is not None]
    assert {source: sources.count(source) for source in answer.sources} == answer.sources
    assert "".join(reply.text for reply in answer) == answer.text
    assert answer.last.full_text == answer.text


def test_a_device_answers_a_conversation_and_a_batch(ways: Ways) -> None:
    device = ways.client.device(DEVICE)
    messages = [{"role": "user", "content": PLAIN.prompt}]
    options = {"max_new_tokens": 6, "mode": "standalone"}
    texts = [device.generate(prompt, **options).text for prompt in "abcdef"]
    assert [answer.text for answer in device.generate_batch("abcdef", **options)] == texts
    expected = device.generate(PLAIN.prompt or "", **options).text
    assert device.chat(messages, **options).text == expected


def test_an_answer_that_is_left_is_cancelled(ways: Ways) -> None:
    answer = ways.client.device(DEVICE).generate(PLAIN, max_new_tokens=400, ignore_eos=True)
    for reply in answer:
        assert not reply.done
        break
    wait_until(lambda: ways.agent.is_idle, "the request has ended")
    assert len(answer.replies) == 1
    with pytest.raises(LinkError, match="left before its end"):
        _ = answer.usage


def test_the_client_on_an_event_loop_gives_the_same_answers(ways: Ways) -> None:
    expected = ways.all()["LocalFleet"](PLAIN)
    short = replace(PLAIN, max_new_tokens=4, mode=Mode.STANDALONE)

    async def work() -> None:
        async with AsyncFleetClient(ways.site.identity(OTHER_APP)) as client:
            device = client.device(DEVICE)
            assert outcome_of(await device.generate(PLAIN).complete()) == expected
            answers = await device.generate_batch([short] * 6)
            assert {answer.text for answer in answers} == {ways.engine.generate(short).text}
            long = device.chat([{"role": "user", "content": "a"}], max_new_tokens=400)
            async for reply in long:
                assert not reply.done
                break
            await asyncio.to_thread(wait_until, lambda: ways.agent.is_idle, "the request has ended")
            with pytest.raises(RefusedPromptError, match="this device holds 512 positions"):
                await device.generate("hello", max_new_tokens=5000).complete()
            with pytest.raises(FleetError, match="512 positions"):
                await device.generate_batch(["a", "b"], max_new_tokens=5000)

    asyncio.run(work())


def test_an_identity_that_cannot_prompt_is_refused(ways: Ways, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"of a device, which may not prompt .*--role app"):
        FleetClient(ways.site.identity(DEVICE))
    with pytest.raises(IdentityError, match=r"no usable identity .*fleet enroll"):
        AsyncFleetClient(tmp_path)


def test_a_broker_that_is_away_is_reported_in_time(ways: Ways) -> None:
    identity = ways.site.identity(OTHER_APP)
    away = Identity(identity.folder, replace(identity.config, port=free_port()))
    with pytest.raises(LinkError, match="no connection to the broker"):
        FleetClient(away, timeout_s=0.5)


def test_a_client_that_is_not_connected_says_so(ways: Ways) -> None:
    identity = ways.site.identity(OTHER_APP)
    with pytest.raises(LinkError, match="use it in 'async with'"):
        AsyncFleetClient(identity).device(DEVICE)
    with FleetClient(identity) as client:
        device = client.device(DEVICE)
        with pytest.raises(TopicError):
            client.device("no name")
    answer = device.generate("hello")
    for _ in range(2):  # an answer that has failed stays so
        with pytest.raises(LinkError, match="closed"):
            _ = answer.text


def test_a_device_that_is_offline_ends_the_wait(
    ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_requests, "OFFLINE_S", 0.0)
    monkeypatch.setattr(async_prompt_client, "REPEAT_S", 0.1)
    identity = ways.site.identity(OTHER_APP)

    async def ask() -> None:
        async with AsyncFleetClient(identity) as client:
            await client.device("attic").generate("hello").complete()

    with ways.site.connect("attic") as attic:
        attic.publish(topics.device_status("attic"), Agent.will(), qos=1, retain=True)
        with pytest.raises(LinkError, match="device attic has gone offline"):
            asyncio.run(ask())
        with FleetClient(identity) as client, pytest.raises(LinkError, match="gone offline"):
            _ = client.device("attic").generate("hello").text


def test_the_examples_of_the_page_run(
    ways: Ways,
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tablet").symlink_to(ways.site.identity(OTHER_APP).folder)
    make_default_bundle(tiny_bundle, tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
        assert capsys.readouterr().out
