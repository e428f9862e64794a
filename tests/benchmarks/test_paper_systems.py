"""The paper's systems on the tiny model: real processes, TLS and links, and correct rows."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

from benchmarks.drivers.client import Channel, ClientDriver
from benchmarks.drivers.cloud import CloudDriver
from benchmarks.drivers.cloud_models import WholeCloudModel
from benchmarks.drivers.wire import Hidden, NextToken, Prompt, decode_to_cloud, encode, pieces
from benchmarks.fidelity import greedy_answers
from benchmarks.graphs import EdgeGraphs
from benchmarks.paper import measure as measuring
from benchmarks.paper.measure import (
    LATENCY,
    TABLE,
    latency_cases,
    measure_rows,
    slow_cases,
    table_cases,
)
from benchmarks.paper.models import PaperModels
from benchmarks.paper.rig import LOOPBACK, Rig
from benchmarks.paper.rows import Link, Row, RowFile
from benchmarks.paper.sizes import PAPER_LINK, SIZES, SLOW_LINK, Size
from benchmarks.paper.systems import NAIVE_SPLIT, OWN, SYSTEMS
from benchmarks.partitions import CloudPartitions
from cloud_broker_worker.worker.worker import Worker
from fleet.bundles.manifest import Bundle
from fleet.errors import DecodeError, FleetError
from fleet.protocol import topics
from fleet.protocol.report import WorkerStatus, encode_status
from fleet.transport.in_memory import InMemoryBroker
from onnx_export.architecture import model_info
from onnx_export.bundle import list_files
from onnx_export.streamed_model import load_whole_model, open_model
from onnx_export.tokenizer import write_tokenizer
from onnx_export.weights import EMBEDDING
from tests.onnx_export.test_models import MODELS
from tests.tiny import VOCAB_SIZE, make_tiny_checkpoint, make_tiny_tokenizer

TOKENS = 12
PROMPT = "How warm is it?"
EXACT = ("verified", "collaborative@1.0", "cached_split_fp16")
SPLITS = ("cached_split_fp16", "cached_split_fp32", NAIVE_SPLIT)
SYSTEMS_TESTED = ("standalone", "collaborative@1.0", "verified", *SPLITS)
SIZE = Size(
    name="tiny",
    table_samples=1,
    table_tokens=TOKENS,
    naive_samples=1,
    links=(PAPER_LINK,),
    latency_samples=0,
    latency_tokens=TOKENS,
    latency_repeats=0,
    scored_samples=0,
)


@pytest.fixture(scope="module")
def models(
    tiny_bundle: Bundle,
    tiny_checkpoint: Path,
    tiny_heads: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> PaperModels:
    folder = tmp_path_factory.mktemp("paper")
    return PaperModels(
        tiny_bundle, lambda _: None, model=str(tiny_checkpoint), heads=tiny_heads, folder=folder
    )


def fill(models: PaperModels, rows: RowFile[Row], samples: measuring.Samples) -> None:
    """Measure a minimum of systems and samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "OWN", SYSTEMS_TESTED)
        patch.setattr(measuring, "DATASETS", ("alpaca",))
        measure_rows(
            SIZE,
            models.bundle,
            samples=samples,
            rows=rows,
            run="run",
            progress=lambda _: None,
            parts=(TABLE, LATENCY),
            models=models,
        )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows") / "rows.jsonl"


@pytest.fixture(scope="module")
def rows(models: PaperModels, path: Path) -> dict[str, Row]:
    """One of each system."""
    found: RowFile[Row] = RowFile(path, Row)
    fill(models, found, lambda dataset, count: [PROMPT] * count)
    assert len(found) == len(SYSTEMS_TESTED)
    return {row.system: row for row in found}


def test_what_must_be_exact_gives_the_same_tokens(rows: dict[str, Row]) -> None:
    assert len({rows[name].token_ids for name in EXACT}) == 1
    assert len(rows["verified"].token_ids) == TOKENS


def test_tokens_are_counted_by_where_they_are_from(rows: dict[str, Row]) -> None:
    assert all(sum(row.tokens_from.values()) == len(row.token_ids) for row in rows.values())
    assert (
        rows["collaborative@1.0"].tokens_from == rows[NAIVE_SPLIT].tokens_from == {"cloud": TOKENS}
    )
    assert "cloud" not in rows["standalone"].tokens_from


def test_a_split_waits_once_a_token(rows: dict[str, Row]) -> None:
    assert {rows[name].round_trips for name in SPLITS} == {TOKENS}
    assert all(0 < rows[name].round_trips <= TOKENS for name in ("collaborative@1.0", "verified"))
    assert rows["standalone"].round_trips == 0
    assert (
        rows[NAIVE_SPLIT].traffic.messages_up == rows[NAIVE_SPLIT].traffic.messages_down == TOKENS
    )


def test_bytes_are_the_hidden_states_and_a_little_more(
    rows: dict[str, Row], tiny_bundle: Bundle
) -> None:
    hidden = tiny_bundle.manifest.model.hidden_size
    num_prompt = rows[NAIVE_SPLIT].prompt_tokens
    positions = num_prompt + TOKENS - 1
    for name, width in (("cached_split_fp16", 2), ("cached_split_fp32", 4)):
        above = rows[name].traffic.bytes_up - positions * hidden * width
        assert 0 < above < 400 * TOKENS
    history = sum(range(num_prompt, positions)) * hidden * 4
    more = rows[NAIVE_SPLIT].traffic.bytes_up - rows["cached_split_fp32"].traffic.bytes_up
    assert more == pytest.approx(history, rel=0.1)
    assert rows["collaborative@1.0"].traffic.bytes_up > positions * hidden * 2


def test_work_is_counted_on_the_side_where_it_is_done(
    rows: dict[str, Row], tiny_bundle: Bundle
) -> None:
    model = tiny_bundle.manifest.model
    split = tiny_bundle.manifest.split_layer
    positions = rows["verified"].prompt_tokens + TOKENS - 1
    for name in SPLITS:
        assert rows[name].layer_positions_edge == positions * split
        assert rows[name].layer_positions_cloud == positions * (model.num_layers - split)
        assert rows[name].head_calls == TOKENS
    ours = rows["collaborative@1.0"]
    assert (
        ours.layer_positions_edge >= positions * split
    )  # steps behind wrong guesses are work, too
    assert ours.layer_positions_cloud >= positions * (model.num_layers - split)
    assert ours.head_calls >= TOKENS * 2  # the exit that is not the last is off
    assert ours.head_calls_cloud >= TOKENS
    assert rows["verified"].layer_positions_edge > rows["standalone"].layer_positions_edge > 0
    assert rows["standalone"].layer_positions_cloud == 0


def test_every_row_has_times_of_both_sides(rows: dict[str, Row]) -> None:
    assert all(0 < row.ttft_ms <= row.total_ms for row in rows.values())
    assert all(row.edge_s > 0 for row in rows.values())
    assert [name for name, row in rows.items() if row.cloud_s == 0] == ["standalone"]


def test_nothing_is_measured_twice(models: PaperModels, rows: dict[str, Row], path: Path) -> None:
    def samples(dataset: str, count: int) -> Sequence[str]:
        pytest.fail(f"{count} prompts of {dataset} are measured again")

    before = path.read_bytes()
    fill(models, RowFile(path, Row), samples)
    assert path.read_bytes() == before


def test_a_worker_that_dies_ends_the_measurement_though_the_agent_goes_on(
    models: PaperModels,
) -> None:
    name = "collaborative@1.0"
    with Rig(models, [SYSTEMS[name]], lambda _: None) as rig:
        os.kill(rig.cloud_pid(name), signal.SIGKILL)
        with pytest.raises(
            FleetError, match="the worker ended with status -9 while it was measured"
        ):
            rig.answer(name, PROMPT, TOKENS, LOOPBACK)


def test_a_cloud_only_service_streams_the_models_own_answer(
    models: PaperModels, tiny_bundle: Bundle, tiny_graphs: EdgeGraphs
) -> None:
    broker = InMemoryBroker()
    embedding = tiny_bundle.path("edge/embedding.npy")
    (expected,) = greedy_answers(*tiny_graphs.model(), [PROMPT], lambda _: None)
    with broker.connect("edge-1") as device, broker.connect("cloud-1") as cloud:
        served = CloudDriver(cloud, WholeCloudModel(models.whole(), embedding), "1")
        answer = ClientDriver(device, tiny_bundle).cloud_only(PROMPT, TOKENS, "cloud-1")
    assert list(answer["token_ids"]) == expected.answer[:TOKENS]
    positions = len(expected.prompt) + TOKENS - 1
    assert served.counts() == {
        "layer_positions": positions * tiny_bundle.manifest.model.num_layers,
        "head_calls": TOKENS,
        "pid": None,
    }
    assert (answer["round_trips"], answer["layer_positions"]) == (1, 0)


def test_a_client_sends_a_text_to_continue_if_the_model_has_no_template(
    models: PaperModels, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    folder = tmp_path / "raw"
    shutil.copytree(tiny_bundle.folder, folder, ignore=shutil.ignore_patterns("tokenizer"))
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    write_tokenizer(tokenizer, "tiny", VOCAB_SIZE, folder)
    manifest = structs.replace(tiny_bundle.manifest, files=tuple(list_files(folder)))
    broker = InMemoryBroker()
    embedding = tiny_bundle.path("edge/embedding.npy")
    with broker.connect("edge-1") as device, broker.connect("cloud-1") as cloud:
        CloudDriver(cloud, WholeCloudModel(models.whole(), embedding), "1")
        client = ClientDriver(device, Bundle(folder, manifest))
        answer = client.cloud_only("How", 2, "cloud-1")
    assert (answer["prompt_tokens"], len(answer["token_ids"])) == (3, 2)


def test_the_whole_model_in_the_cloud_scales_gemmas_embedding(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model", **MODELS["gemma3"])
    stream = open_model(str(checkpoint), "tiny")
    info = model_info("tiny", stream.skeleton, max_positions=64)
    manifest = structs.replace(tiny_bundle.manifest, model=info)
    whole = CloudPartitions(manifest, lambda _: None, str(checkpoint), tmp_path).bundle(0)
    embedding = tmp_path / "embedding.npy"
    np.save(embedding, stream.read(EMBEDDING).numpy())
    prompt = tuple(range(5, 25))
    own = list(WholeCloudModel(whole, embedding).answer("session", Prompt(prompt, TOKENS)))
    model = load_whole_model(str(checkpoint), "tiny")
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1
    )
    assert own == expected[0, len(prompt) :].tolist()


def test_a_waiting_device_learns_that_its_worker_has_ended() -> None:
    broker = InMemoryBroker()
    with broker.connect("edge-1") as device, broker.connect("cloud-1") as cloud:
        status = topics.worker_status("cloud-1")
        cloud.publish(
            status,
            encode_status(WorkerStatus(online=True, epoch=1, bundle_ids=(), version="1")),
            qos=1,
            retain=True,
        )
        session = Channel(device).open("cloud-1")
        cloud.publish(status, Worker.will(), qos=1, retain=True)
        with pytest.raises(FleetError, match="cloud-1 went offline during an answer"):
            session.token()


def test_a_long_history_goes_up_in_pieces_that_are_whole_positions() -> None:
    rows = np.arange(3000 * 64, dtype=np.float32).reshape(3000, 64)
    sent = [decode_to_cloud(encode(piece)) for piece in pieces(rows, 5, 4000, "float32")]
    assert all(isinstance(piece, Hidden) for piece in sent)
    hidden = [piece for piece in sent if isinstance(piece, Hidden)]
    assert len(hidden) == 2
    assert [piece.is_last for piece in hidden] == [False, True]
    assert all(b.start - a.start == len(a.rows(64)) for a, b in pairwise(hidden))
    assert np.array_equal(np.concatenate([piece.rows(64) for piece in hidden]), rows)


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(DecodeError, match="expected a prompt or hidden states"):
        decode_to_cloud(encode(NextToken(1)))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_naive_split_is_measured_less_often(size: Size) -> None:
    cases = [*table_cases(size), *slow_cases(size), *latency_cases(size)]
    assert len({case.key for case in cases}) == len(cases)
    assert {case.system for case in cases} == set(OWN)
    assert (
        0
        < sum(case.system == NAIVE_SPLIT for case in cases)
        < sum(case.system == "verified" for case in cases)
    )
    naive = {case.link for case in cases if case.system == NAIVE_SPLIT}
    assert naive == {
        PAPER_LINK,
        SLOW_LINK,
        min(size.links, key=lambda link: (link.rtt_ms, -link.mbit_s)),
    }
    assert Link(100.0, 10.0) not in naive
