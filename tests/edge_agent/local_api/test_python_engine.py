"""An engine in Python: answers without a network, and errors that name the next step."""

from __future__ import annotations

import gc
import shutil
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent import AgentConfig, Engine
from fleet.bundles.manifest import Bundle
from fleet.errors import BundleError, ConfigError, PromptError, RefusedPromptError
from fleet.protocol.prompt import PromptRequest
from tests.brokers import wait_until
from tests.default_bundle import make_default_bundle
from tests.fleet.utils.test_memory_release import resident_kb

CONFIG = AgentConfig(num_threads=1)


@pytest.fixture(scope="module")
def engine(tiny_bundle: Bundle) -> Iterator[Engine]:
    with Engine.load(tiny_bundle.folder, CONFIG) as started:
        yield started


def test_an_answer_is_a_stream_of_tokens_from_the_exits(engine: Engine) -> None:
    answer = engine.generate("hello", mode="standalone", max_new_tokens=6, threshold=0.05)
    tokens = [reply for reply in answer if reply.token_id is not None]
    assert len(tokens) == answer.usage.tokens == 6
    assert {reply.source for reply in tokens} == answer.sources.keys() <= {"exit:1", "exit:2"}
    assert answer.token_ids == [reply.token_id for reply in tokens]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the pages of a mapping")
def test_an_engine_maps_no_page_of_the_embedding_after_an_answer(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_bundle.folder, tmp_path / "bundle")
    embedding = folder / "edge/embedding.npy"
    with Engine.load(folder, CONFIG) as engine:
        replies = iter(engine.generate("hello", max_new_tokens=400, ignore_eos=True))
        next(replies)
        assert resident_kb(embedding) > 0
        for _ in replies:
            pass
        wait_until(lambda: resident_kb(embedding) == 0, "no page is mapped")


def test_a_batch_larger_than_the_queue_is_complete_and_in_order(engine: Engine) -> None:
    prompts = [f"number {i}" for i in range(3 * CONFIG.max_queued_requests)]
    expected = [engine.generate(prompt, max_new_tokens=2).text for prompt in prompts]
    answers = engine.generate_batch(prompts, max_new_tokens=2)
    assert [answer.text for answer in answers] == expected


def test_a_batch_ends_with_the_first_error(engine: Engine) -> None:
    long = PromptRequest(prompt="hello", max_new_tokens=5000)
    with pytest.raises(RefusedPromptError, match="512 positions"):
        engine.generate_batch(["hello", long], max_new_tokens=5000)
    with pytest.raises(PromptError, match="the prompt is empty"):
        engine.generate_batch(["hello", " "])


def test_options_replace_those_of_a_request(engine: Engine) -> None:
    request = PromptRequest(prompt="hello", max_new_tokens=6, temperature=1.0, seed=3)
    assert engine.generate(request, max_new_tokens=2).usage.tokens == 2
    assert engine.generate(request).text == engine.generate(request, seed=3).text


def test_an_answer_that_is_left_frees_the_engine(engine: Engine) -> None:
    for _ in engine.generate("hello", max_new_tokens=400, ignore_eos=True):
        break
    with engine.generate("hello", max_new_tokens=400, ignore_eos=True) as answer:
        next(iter(answer))
    wait_until(lambda: engine._agent.is_idle, "both requests have ended")


BAD_OPTIONS: dict[str, tuple[dict[str, object], str]] = {
    "an unknown mode": ({"mode": "fast"}, "mode: expected one of standalone, .*got 'fast'"),
    "an unknown option": ({"temprature": 1.0}, "unknown field `temprature`; its fields are"),
    "no number": (
        {"temperature": float("nan")},
        "expected fields that JSON can have: Out of range",
    ),
    "no JSON": ({"stop": object()}, "expected fields that JSON can have: .*; correct them"),
    "a long number": ({"seed": 1 << 70}, "seed: expected a whole number from 0 to"),
    "several in a stream": ({"n": 2}, "expected 'stream' false with 'n' 2, .*; set it"),
}


@pytest.mark.parametrize(("options", "error"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_a_bad_option_is_refused_before_the_answer_begins(
    engine: Engine, options: dict[str, object], error: str
) -> None:
    with pytest.raises(PromptError, match=error) as caught:
        engine.generate("hello", **options)
    assert "\n" not in str(caught.value)


def test_what_needs_a_worker_or_more_positions_is_refused_when_it_is_read(engine: Engine) -> None:
    for exact in ({"mode": "verified"}, {"mode": "auto", "min_agreement": 1.0}):
        answer = engine.generate("hello", **exact)
        with pytest.raises(RefusedPromptError, match=r"\(no_cloud\): .* or a fleet"):
            _ = answer.text
    with pytest.raises(RefusedPromptError, match=r"holds 512 positions .*; send a shorter prompt"):
        _ = engine.generate("hello " * 1000).text


def test_a_closed_engine_says_so_and_an_open_answer_ends(tiny_bundle: Bundle) -> None:
    engine = Engine.load(tiny_bundle, CONFIG)
    replies = iter(engine.generate("hello", max_new_tokens=400, ignore_eos=True))
    next(replies)
    engine.close()
    engine.close()
    assert [*replies][-1].finish_reason == "cancelled"
    with pytest.raises(PromptError, match=r"closed; load it again with Engine\.load"):
        engine.generate("hello")


def test_an_engine_that_is_forgotten_is_closed(tiny_bundle: Bundle) -> None:
    answer = Engine.load(tiny_bundle, CONFIG).generate("hello", max_new_tokens=2)
    assert answer.usage.tokens == 2  # the answer keeps its engine
    engine = Engine.load(tiny_bundle, CONFIG)
    agent = weakref.ref(engine._agent)
    del engine
    gc.collect()
    assert agent() is None


def test_the_default_bundle_is_that_of_the_demo(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_default_bundle(tiny_bundle, tmp_path, monkeypatch)
    with Engine.load(config=CONFIG) as engine:
        assert engine.generate("hello", max_new_tokens=1).last.bundle_id == (
            tiny_bundle.manifest.bundle_id
        )


def test_a_default_bundle_that_cannot_be_made_names_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"  # the export would import PyTorch before it fails
    python.write_text("#!/bin/sh\necho building; echo no disk space >&2; exit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(BundleError, match=r"cannot be made here \(no disk space\); name"):
        Engine.load()
    assert capfd.readouterr().err == "building\n"


def test_a_bundle_or_a_setting_that_does_not_fit_is_refused(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=r"expected 'default' or the folder .*got 'nonsense'"):
        Engine.load("nonsense")
    with pytest.raises(BundleError, match="no usable bundle in"):
        Engine.load(tmp_path)
    with pytest.raises(ConfigError, match="split 9: expected 'auto' or one of 2"):
        Engine.load(tiny_bundle, AgentConfig(split=9))
    with pytest.raises(ConfigError, match="num_threads: expected a whole number from 1 to 256"):
        Engine.load(tiny_bundle, AgentConfig(num_threads=0))
