"""Sessions whose hidden states come from several layers, in one worker and in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from msgspec import UNSET
from msgspec.structs import replace

from cloud_broker_worker.worker.session import SessionKey
from cloud_broker_worker.worker.upper_layers import Chunk, UpperLayers
from fleet.bundles.manifest import Bundle
from fleet.errors import BundleError, ConfigError
from fleet.protocol.hidden_states import Float16
from fleet.protocol.messages import Opened, Refused, ToDevice, Verified
from tests.cloud_broker_worker.worker.conftest import DEVICE, Bench, LayersAt, TinyModel

LAYERS = (1, 2, 3)
IDS = [list(range(10, 47)), [7, 300, 12, 99, 5], list(range(200, 290))]


@pytest.fixture
def bench(layers_at: LayersAt, whole: TinyModel) -> Iterator[Bench]:
    bench = Bench(layers_at(*LAYERS), whole)
    yield bench
    bench.engine.check_integrity()


def upload(whole: TinyModel, layer: int, num_positions: int = 5) -> Float16:
    token_ids = np.random.default_rng(layer).integers(3, 384, num_positions).tolist()
    return whole.upload(token_ids, layer)


def test_sessions_join_a_batch_at_their_layers_and_each_equals_the_whole_model(
    layers_at: LayersAt, whole: TinyModel
) -> None:
    layers = layers_at(*LAYERS)
    pool = layers.new_pool(1 << 24)
    order = (3, 1, 2)
    rows = [whole.upload(ids, layer) for ids, layer in zip(IDS, order, strict=True)]
    leases = [
        pool.lease(len(each), layer - LAYERS[0]) for each, layer in zip(rows, order, strict=True)
    ]
    for begin, end in ((0.0, 0.5), (0.5, 1.0)):
        chunks = []
        for lease, each in zip(leases, rows, strict=True):
            start = int(begin * len(each))
            stop = int(end * len(each))
            chunks.append(Chunk(lease, each[start:stop], start, stop, [stop - 1]))
        logits = layers(chunks)
        for got, chunk, each, layer in zip(logits, chunks, rows, order, strict=True):
            expected = whole.logits(each, layer)[chunk.stop - 1]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_session_has_caches_for_its_own_layers_only(layers_at: LayersAt) -> None:
    pool = layers_at(*LAYERS).new_pool(1 << 24)
    whole, upper = pool.lease(64), pool.lease(64, first_layer=2)
    assert (len(whole.layers), len(upper.layers)) == (3, 1)
    assert pool.used_bytes == whole.num_bytes + upper.num_bytes == 4 * upper.num_bytes
    pool.grow_lease(upper, 128)
    assert upper.num_bytes * 3 == whole.num_bytes * 2
    pool.free_lease(upper)
    pool.free_lease(whole)
    assert pool.used_bytes == 0


def test_two_devices_with_other_splits_are_served_in_one_step(
    bench: Bench, whole: TinyModel
) -> None:
    rows = {layer: upload(whole, layer) for layer in LAYERS}
    for layer in LAYERS:
        (opened,) = bench.open(f"s{layer}", f"edge-{layer}", upload_layer=layer)
        assert isinstance(opened, Opened)
        bench.context(rows[layer], session=f"s{layer}", device=f"edge-{layer}")
        bench.ask(4, session=f"s{layer}", device=f"edge-{layer}")
    verdicts = bench.step()
    for layer in LAYERS:
        verdict = verdicts[SessionKey(f"edge-{layer}", f"s{layer}")]
        assert isinstance(verdict, Verified)
        assert verdict.token_id == int(whole.logits(rows[layer], layer)[-1].argmax())
    shape = bench.engine.pool.shape
    cache_bytes = sum(shape.without(layer - 1).cache_bytes for layer in LAYERS)
    assert bench.engine.pool.used_bytes == 64 * (cache_bytes + 3 * shape.hidden_bytes)


def test_without_a_layer_a_session_begins_at_the_bundles_lowest(
    bench: Bench, whole: TinyModel
) -> None:
    rows = upload(whole, LAYERS[0])
    bench.open()
    bench.context(rows)
    bench.ask(4)
    assert bench.token().token_id == int(whole.logits(rows, LAYERS[0])[-1].argmax())


def test_a_session_that_is_opened_at_another_layer_starts_again(
    bench: Bench, whole: TinyModel
) -> None:
    bench.open(upload_layer=1)
    bench.context(upload(whole, 1))
    (opened,) = bench.open(upload_layer=3)
    assert isinstance(opened, Opened)
    assert opened.received == 0
    assert bench.engine.sessions[SessionKey(DEVICE, "s1")].first_layer == 2


def test_the_budget_counts_a_sessions_own_layers(bench: Bench) -> None:
    shape = bench.engine.pool.shape
    num_bytes = 64 * (shape.without(2).cache_bytes + shape.hidden_bytes)
    bench.start(kv_budget_bytes=num_bytes, max_device_share=1.0)
    assert refusal(bench.open(upload_layer=1)).code == "busy"
    assert isinstance(bench.open(upload_layer=3)[0], Opened)


def refusal(messages: list[ToDevice]) -> Refused:
    (refused,) = messages
    assert isinstance(refused, Refused)
    return refused


def test_a_layer_where_no_session_can_begin_is_refused(bench: Bench) -> None:
    refused = refusal(bench.open(upload_layer=4))
    assert (refused.code, refused.retry_after_ms) == ("split_mismatch", 0)
    assert refused.message == (
        "this worker continues after layer 1 or 2 or 3, the device uploads after 4; "
        "use another split or worker"
    )


def test_a_worker_loads_the_layers_from_a_higher_one_on(
    cloud_bundle: Callable[..., Bundle], whole: TinyModel
) -> None:
    bundle = cloud_bundle(*LAYERS)
    layers = UpperLayers(bundle, num_threads=1, from_layer=3)
    bench = Bench(layers, whole)
    assert refusal(bench.open()).code == "split_mismatch"
    assert refusal(bench.open(upload_layer=2)).message.startswith(
        "this worker continues after layer 3, the device uploads after 2"
    )
    rows = upload(whole, 3)
    bench.open(upload_layer=3)
    bench.context(rows)
    bench.ask(4)
    assert bench.token().token_id == int(whole.logits(rows, 3)[-1].argmax())
    assert layers.weight_bytes < UpperLayers(bundle, num_threads=1).weight_bytes
    with pytest.raises(ConfigError, match=r"--from-layer 4: expected one of the upload .* 1, 2, 3"):
        UpperLayers(bundle, num_threads=1, from_layer=4)


def test_a_bundle_without_layers_for_a_worker_is_refused(
    cloud_bundle: Callable[..., Bundle],
) -> None:
    bundle = cloud_bundle(3)
    manifest = replace(bundle.manifest, exits=(4,), upload_layer=4, uploads=UNSET)
    with pytest.raises(BundleError, match="has no layers for a worker: its devices hold the whole"):
        UpperLayers(Bundle(bundle.folder, manifest), num_threads=1)
