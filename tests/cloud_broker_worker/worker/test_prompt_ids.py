"""Prompts that come as token ids: the worker computes the hidden states that a device would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.engine import PROMPT_PIECE, PROMPT_SHARE, WorkerEngine
from cloud_broker_worker.worker.lower_layers import LowerLayers
from cloud_broker_worker.worker.session import Session, SessionKey
from cloud_broker_worker.worker.upper_layers import UpperLayers
from fleet.bundles.manifest import Bundle
from fleet.errors import BundleError
from fleet.protocol.codec import TOKEN_DTYPE, pack_chunk, pack_token_ids
from fleet.protocol.hidden_states import CONTEXT_DTYPES, Float16
from fleet.protocol.messages import (
    ChoiceRules,
    Close,
    Context,
    Continuation,
    Gap,
    Opened,
    Refused,
    ToDevice,
    Verified,
)
from fleet.protocol.report import DeviceStatus
from tests.cloud_broker_worker.worker.conftest import DEVICE, Bench, TinyModel
from tests.conftest import MakeTinyBundle

IDS = np.random.default_rng(5).integers(3, 384, 150).tolist()
NUM_PROMPT = 20
OTHER = "edge-2"


class PromptBench(Bench):
    """A bench whose engine has the lower layers, too."""

    def __init__(
        self, layers: UpperLayers, lower: LowerLayers | None, whole: TinyModel, upload_layer: int
    ) -> None:
        self.lower = lower
        self.upload_layer = upload_layer
        super().__init__(layers, whole)

    def start(self, **settings: Any) -> WorkerEngine:
        config = WorkerConfig(**{"num_threads": 1, "run_ahead_positions": 0} | settings)
        self.engine = WorkerEngine(
            self.layers, "worker-1", config, lambda: self.now, lower_layers=self.lower
        )
        return self.engine

    def rows(self, num_positions: int) -> Float16:
        """Return what a device uploads for the first ids."""
        return self.whole.upload(IDS[:num_positions], self.upload_layer)

    def prompt(self, start: int, stop: int, device: str = DEVICE, **names: str) -> list[ToDevice]:
        """Send the ids of positions [start, stop)."""
        session = names.get("session", "s1")
        ids = np.array(IDS[start:stop], TOKEN_DTYPE)
        chunk = pack_token_ids(self.branch(session, device), start, ids)
        return self.send(Context(session, chunk), device)

    def state(self, device: str = DEVICE, session: str = "s1") -> Session:
        return self.engine.sessions[SessionKey(device, session)]

    def run_until_idle(self) -> dict[SessionKey, ToDevice]:
        responses: dict[SessionKey, ToDevice] = {}
        while (step := self.engine.step()) is not None:
            responses |= dict(step)
        return responses

    def check_token(self, num_positions: int, device: str = DEVICE, session: str = "s1") -> None:
        """Ask for the token after the first positions; it is the whole model's."""
        self.ask(num_positions - 1, device=device, session=session, request=num_positions)
        verdict = self.run_until_idle()[SessionKey(device, session)]
        assert isinstance(verdict, Verified), verdict
        logprobs = self.whole.logits(self.rows(num_positions), self.upload_layer)
        best = logprobs[-1].log_softmax(-1)
        assert verdict.token_id == int(best.argmax())
        assert verdict.logprobs[-1] == pytest.approx(float(best.max()), abs=5e-3)


@pytest.fixture(scope="module")
def bundle(make_tiny_bundle: MakeTinyBundle) -> Bundle:
    return make_tiny_bundle((1, 2, 3, 4), split=2, upload_layer=(1, 2, 3))


@pytest.fixture(scope="module")
def upper(bundle: Bundle) -> UpperLayers:
    return UpperLayers(bundle, num_threads=1)


@pytest.fixture(scope="module")
def lower(bundle: Bundle) -> LowerLayers:
    return LowerLayers(bundle, 1, bundle.manifest.upload_layers)


@pytest.fixture
def bench(upper: UpperLayers, lower: LowerLayers, whole: TinyModel) -> Iterator[PromptBench]:
    bench = PromptBench(upper, lower, whole, upload_layer=1)
    yield bench
    bench.engine.check_integrity()


def opened(messages: list[ToDevice]) -> Opened:
    (message,) = messages
    assert isinstance(message, Opened), message
    return message


def test_a_worker_with_the_lower_layers_accepts_ids_and_others_do_not(
    bench: PromptBench, upper: UpperLayers, whole: TinyModel
) -> None:
    assert opened(bench.open()).dtypes == (*CONTEXT_DTYPES, "tokens")
    plain = PromptBench(upper, None, whole, 1)
    assert opened(plain.open()).dtypes == CONTEXT_DTYPES
    assert plain.prompt(0, 5) == [Gap("s1", 0, 0)]
    assert plain.state().received == 0


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_token_after_ids_is_the_whole_models_at_every_upload_layer(
    bench: PromptBench, layer: int
) -> None:
    bench.upload_layer = layer
    bench.open(upload_layer=layer)
    assert bench.prompt(0, NUM_PROMPT) == []
    assert (bench.state().received, bench.state().num_ready) == (NUM_PROMPT, 0)
    bench.check_token(NUM_PROMPT)
    np.testing.assert_allclose(
        bench.state().store.rows[:NUM_PROMPT], bench.rows(NUM_PROMPT), rtol=2e-3, atol=2e-3
    )
    assert bench.state().prompt_run is None


def test_the_rows_are_those_that_the_devices_graphs_give_bit_for_bit(
    bench: PromptBench, lower: LowerLayers
) -> None:
    bench.open(max_positions=200)
    bench.prompt(0, 150)
    bench.run_until_idle()
    device = lower.begin(150, 0)
    assert np.array_equal(bench.state().store.rows[:150], device(IDS))


def test_hidden_states_may_follow_before_the_rows_of_the_prompt_are_there(
    bench: PromptBench,
) -> None:
    bench.open()
    bench.prompt(0, NUM_PROMPT)
    bench.context(bench.rows(25)[NUM_PROMPT:], start=NUM_PROMPT)
    assert bench.state().received == 25
    assert bench.ask(24) == []
    bench.check_token(25)


@pytest.mark.parametrize("cut", [(7, 13), (1, 2), (13, 19)])
def test_ids_in_any_order_with_losses_and_repetitions_give_the_same_token(
    bench: PromptBench, cut: tuple[int, int]
) -> None:
    first, second = cut
    bench.open()
    assert bench.prompt(second, NUM_PROMPT) == [Gap("s1", 0, 0)]
    bench.prompt(0, first)
    bench.step()
    assert bench.prompt(second, NUM_PROMPT) == [Gap("s1", 0, first)]
    bench.prompt(0, second)
    bench.step()
    bench.prompt(first, NUM_PROMPT)
    bench.prompt(0, NUM_PROMPT)
    bench.check_token(NUM_PROMPT)


def test_a_prompt_that_grows_while_it_runs_and_after_it_has_run(bench: PromptBench) -> None:
    bench.open(max_positions=200)
    bench.prompt(0, 100)
    bench.step()
    bench.prompt(100, 120)
    bench.run_until_idle()
    bench.prompt(120, 150)
    bench.check_token(150)


@pytest.mark.parametrize(
    "changes",
    [
        {"crc32": 1},
        {"count": 3},
        {"data": np.array([384] * 5, TOKEN_DTYPE).tobytes()},
        {"dtype": "token"},
    ],
    ids=["checksum", "count", "id out of range", "dtype"],
)
def test_spoiled_ids_are_refused_like_spoiled_hidden_states(
    bench: PromptBench, changes: dict[str, Any]
) -> None:
    bench.open()
    chunk = pack_token_ids(0, 0, np.array(IDS[:5], TOKEN_DTYPE))
    assert bench.send(Context("s1", replace(chunk, **changes))) == [Gap("s1", 0, 0)]
    bench.prompt(0, NUM_PROMPT)
    bench.check_token(NUM_PROMPT)


def test_an_id_beyond_the_vocabulary_is_refused_though_its_checksum_is_right(
    bench: PromptBench,
) -> None:
    bench.open()
    chunk = pack_token_ids(0, 0, np.array([5, 384], TOKEN_DTYPE))
    assert bench.send(Context("s1", chunk)) == [Gap("s1", 0, 0)]
    assert bench.state().received == 0


def test_ids_after_positions_without_ids_start_the_session_afresh(bench: PromptBench) -> None:
    bench.open()
    bench.context(bench.rows(10))
    bench.prompt(0, 8)  # a repetition adds nothing, and changes nothing
    assert bench.state().received == 10
    assert bench.prompt(10, NUM_PROMPT) == [Gap("s1", 0, 0)]
    bench.prompt(0, NUM_PROMPT)
    bench.check_token(NUM_PROMPT)


def test_ids_may_follow_hidden_states_that_came_with_their_tokens(bench: PromptBench) -> None:
    bench.open(rules=ChoiceRules(presence_penalty=0.001, prompt_length=NUM_PROMPT))
    tokens = np.array(IDS[:10], TOKEN_DTYPE)
    bench.send(Context("s1", pack_chunk(0, 0, bench.rows(10), tokens=tokens)))
    assert bench.prompt(10, NUM_PROMPT) == []
    assert bench.state().tokens == IDS[:NUM_PROMPT]
    bench.check_token(NUM_PROMPT)


def test_an_evicted_cache_is_built_again_from_the_rows(bench: PromptBench) -> None:
    bench.open()
    bench.prompt(0, NUM_PROMPT)
    bench.check_token(NUM_PROMPT)
    session = bench.state()
    bench.engine.session_store.evict(session)
    bench.context(bench.rows(22)[NUM_PROMPT:], start=NUM_PROMPT)
    bench.check_token(22)
    assert session.prompt_run is None


def test_a_withdrawn_request_starts_the_prompt_again(bench: PromptBench) -> None:
    bench.open(max_positions=200)
    bench.prompt(0, 150)
    bench.step()
    ids = np.array(IDS[:NUM_PROMPT], TOKEN_DTYPE)
    bench.send(Context("s1", pack_token_ids(2, 0, ids)))
    assert (bench.state().num_ids, bench.state().num_computed) == (NUM_PROMPT, 0)
    bench.check_token(NUM_PROMPT)


def test_a_kept_session_with_a_prompt_that_has_not_run_is_continued(bench: PromptBench) -> None:
    bench.open(max_positions=200)
    bench.prompt(0, 100)
    bench.step()
    bench.send(Close("s1", keep=True))
    assert bench.engine.step() is None  # nothing runs for an answer that has ended
    continues = Continuation(session="s1", branch=0, num_positions=90)
    assert opened(bench.open("s2", continues=continues, max_positions=200)).received == 90
    bench.context(bench.rows(100)[90:], start=90, session="s2")
    bench.check_token(100, session="s2")


def test_nothing_runs_for_a_device_that_went_away_until_it_is_back(bench: PromptBench) -> None:
    bench.open(max_positions=200)
    bench.prompt(0, 150)
    bench.step()
    bench.engine.observe(DEVICE, DeviceStatus(online=False, epoch=0))
    assert bench.engine.step() is None
    assert bench.state().prompt_run is None
    bench.check_token(150)


def test_devices_share_the_lower_layers_piece_by_piece(bench: PromptBench) -> None:
    for device in (DEVICE, OTHER, "edge-3"):
        bench.open(device=device, max_positions=200)
        bench.prompt(0, 150, device=device)
    computed = []
    for _ in range(6):
        bench.engine.step()
        computed.append([bench.state(d).num_computed for d in (DEVICE, OTHER, "edge-3")])
    assert computed == [
        [16, 0, 0],
        [16, 16, 0],
        [16, 16, 16],
        [32, 16, 16],
        [32, 32, 16],
        [32, 32, 32],
    ]


def test_many_prompts_of_one_device_get_no_more_than_one_of_another(bench: PromptBench) -> None:
    for session in ("s1", "s2", "s3"):
        bench.open(session, max_positions=200)
        bench.prompt(0, 150, session=session)
    bench.open(device=OTHER, max_positions=200)
    bench.prompt(0, 150, device=OTHER)
    for _ in range(8):
        bench.engine.step()
    own = sum(bench.state(session=session).num_computed for session in ("s1", "s2", "s3"))
    assert own == bench.state(OTHER).num_computed == 64
    bench.run_until_idle()
    for session in ("s1", "s2", "s3"):
        bench.check_token(150, session=session)


def test_a_request_waits_for_at_most_one_piece_of_a_prompt(bench: PromptBench) -> None:
    bench.open(device=OTHER)
    bench.context(bench.rows(5), device=OTHER)
    bench.open(max_positions=200)
    bench.prompt(0, 150)
    waits = []
    for request in range(5):
        bench.ask(4, request=request, device=OTHER)
        num_steps = 1
        while not (bench.engine.step() or []):
            num_steps += 1
        waits.append(num_steps)
        assert bench.state().num_computed <= 16 * (request + 1)
        bench.engine.sessions[SessionKey(OTHER, "s1")].rewind(5, 0)
        bench.context(bench.rows(5), device=OTHER)
    assert max(waits) <= 2


def test_one_device_alone_runs_larger_pieces(bench: PromptBench) -> None:
    bench.open(max_positions=200)
    bench.prompt(0, 150)
    bench.engine.step()
    assert bench.state().num_computed == PROMPT_PIECE


def test_prompts_that_need_too_much_memory_wait_for_each_other(
    bench: PromptBench, lower: LowerLayers
) -> None:
    budget = 3 * bench.session_bytes(200)
    assert lower.num_bytes(150, 0) < budget // PROMPT_SHARE < 2 * lower.num_bytes(150, 0)
    bench.start(kv_budget_bytes=budget)
    for device in (DEVICE, OTHER):
        bench.open(device=device, max_positions=200)
        bench.prompt(0, 150, device=device)
    for _ in range(10):
        bench.engine.step()
    assert (bench.state().num_computed, bench.state(OTHER).num_computed) == (150, 0)
    for device in (DEVICE, OTHER):
        bench.check_token(150, device=device)


def test_a_prompt_that_fails_ends_its_own_session_only(
    bench: PromptBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.open()
    bench.prompt(0, 5)
    bench.open(device=OTHER)
    bench.prompt(0, NUM_PROMPT, device=OTHER)
    begin = LowerLayers.begin

    def fail_once(self: LowerLayers, capacity: int, first_layer: int) -> Any:
        monkeypatch.setattr(LowerLayers, "begin", begin)
        raise MemoryError("no room")

    monkeypatch.setattr(LowerLayers, "begin", fail_once)
    refused = bench.run_until_idle()[SessionKey(DEVICE, "s1")]
    assert isinstance(refused, Refused)
    assert (refused.code, "no room" in refused.message) == ("internal", True)
    bench.check_token(NUM_PROMPT, device=OTHER)


def test_a_bundle_without_graphs_has_no_lower_layers(bundle: Bundle, tmp_path: Any) -> None:
    with pytest.raises(BundleError):
        LowerLayers(Bundle(tmp_path, bundle.manifest), 1, bundle.manifest.upload_layers)
