"""Fewer bits: close to float32, and independent of the other sessions in the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cloud_broker_worker.worker import packed_linear
from cloud_broker_worker.worker.config import Weights
from cloud_broker_worker.worker.packed_linear import (
    NUM_CANDIDATES,
    Int4Linear,
    Int8Linear,
    PackedLinear,
    TwoStepHead,
    pack_layers,
    packed_layer,
    weight_bytes,
)
from cloud_broker_worker.worker.upper_layers import UpperLayers
from fleet.bundles.manifest import Bundle
from tests.cloud_broker_worker.worker.conftest import TinyModel
from tests.cloud_broker_worker.worker.test_upper_layers import IDS, Sequence

MakeLayer = Callable[[Tensor], nn.Module]
LIMITS: list[tuple[Weights, float]] = [("bfloat16", 0.02), ("int8", 0.02), ("int4", 0.2)]
HEAD_LIMIT = 0.1  # of the logits of tokens that a head in two steps does not choose
FORMATS: tuple[Weights, ...] = ("float32", "bfloat16", "int8", "int4")


def int4_head(weight: Tensor) -> nn.Module:
    """An LM head in two steps, the first one in 4 bits."""
    head = packed_layer("lm_head", weight, None, "int4")
    assert isinstance(head, TwoStepHead)
    return head


def bfloat16_head(weight: Tensor) -> nn.Module:
    """An LM head in two steps, both with the same weights in bfloat16."""
    head = packed_layer("lm_head", weight, None, "bfloat16")
    assert isinstance(head, TwoStepHead)
    return head


def pack(model: nn.Module, weights: Weights) -> None:
    pack_layers(model, weights, dict(model.state_dict()).__getitem__)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(0, 33), (1, 33), (17, 33), (2, 5, 33)])
def test_a_packed_layer_is_the_layer(has_bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(33, 96, bias=has_bias)})
    x = torch.randn(shape)
    with torch.inference_mode():
        expected = model["layer"](x)
        num_bytes = weight_bytes(model)
        pack(model, "float32")
        assert isinstance(model["layer"], PackedLinear)
        torch.testing.assert_close(model["layer"](x), expected, rtol=1e-5, atol=1e-5)
    assert weight_bytes(model) == num_bytes


@pytest.mark.parametrize(("kind", "limit"), [(Int8Linear, 0.01), (Int4Linear, 0.09)])
def test_a_layer_with_fewer_bits_is_close_to_the_layer(kind: type[nn.Module], limit: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 64)
    x = torch.randn(2, 5, 64)
    out = kind(weight)(x)
    expected = x @ weight.T
    assert out.shape == expected.shape
    assert out.dtype == torch.float32
    assert (out - expected).norm() / expected.norm() < limit


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_a_layer_in_bfloat16_is_close_to_the_layer_however_it_is_stored(
    stored: torch.dtype, has_bias: bool
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(33, 96, bias=has_bias).to(stored)})
    x = torch.randn(2, 5, 33)
    with torch.inference_mode():
        expected = copy.deepcopy(model["layer"]).float()(x)
        num_values = sum(parameter.numel() for parameter in model.parameters())
        pack(model, "bfloat16")
        out = model["layer"](x)
    assert out.dtype == torch.float32
    assert (out - expected).norm() / expected.norm() < 0.01
    assert weight_bytes(model) == 2 * num_values


@pytest.mark.parametrize("has_onednn", [True, False])
def test_a_processor_without_onednns_bfloat16_computes_the_same(
    has_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_linear, "has_onednn", lambda _: has_onednn)
    torch.manual_seed(0)
    weight = torch.randn(96, 64).bfloat16()
    x = torch.randn(5, 64)
    with torch.inference_mode():
        out = PackedLinear(weight, None)(x)
    torch.testing.assert_close(out, x.bfloat16().float() @ weight.float().T, rtol=0.01, atol=0.1)


def test_the_steps_of_an_lm_head_in_bfloat16_hold_its_weights_once() -> None:
    weight = torch.randn(96, 64).bfloat16()
    head = packed_layer("lm_head", weight, None, "bfloat16")
    pointers = {
        tensor.data_ptr()
        for module in head.modules()
        for tensor in vars(module).values()
        if isinstance(tensor, Tensor)
    }
    assert pointers == {weight.data_ptr()}


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_layer_that_is_quantised_in_pieces_is_the_layer_that_is_quantised_at_once(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(208, 64)
    at_once = packed_layer("layer", weight, None, weights).state_dict()
    monkeypatch.setattr(packed_linear, "PACKED_ROWS", 64)
    in_pieces = packed_layer("layer", weight, None, weights).state_dict()
    for name, tensor in at_once.items():
        assert torch.equal(tensor, in_pieces[name]), name


HEADS = [int4_head, bfloat16_head]


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear, *HEADS])
def test_a_layer_with_fewer_bits_gives_no_rows_for_none(kind: MakeLayer) -> None:
    assert kind(torch.randn(96, 64))(torch.empty(0, 64)).shape == (0, 96)


@pytest.mark.parametrize("make_head", HEADS)
@pytest.mark.parametrize("vocab_size", [16, 1008])
def test_the_best_tokens_of_a_head_in_two_steps_have_their_own_logits(
    vocab_size: int, make_head: MakeLayer
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(vocab_size, 64).bfloat16()
    x = torch.randn(20, 64)
    logits = make_head(weight)(x)
    expected = x @ weight.float().T
    best = expected.topk(min(NUM_CANDIDATES // 2, vocab_size)).indices
    torch.testing.assert_close(
        logits.gather(1, best), expected.gather(1, best), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert (logits - expected).norm() / expected.norm() < 0.09


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear, int4_head])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 64), (576, 192), (160, 1008)])
def test_each_row_of_a_batch_is_computed_as_it_is_alone(
    kind: MakeLayer, num_threads: int, num_in: int, num_out: int
) -> None:
    torch.manual_seed(0)
    layer = kind(torch.randn(num_out, num_in))
    x = torch.randn(70, num_in)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        alone = torch.cat([layer(row[None]) for row in x])
        for num_rows in range(1, 71):
            assert torch.equal(layer(x[:num_rows]), alone[:num_rows]), num_rows
    finally:
        torch.set_num_threads(threads_before)


@pytest.mark.parametrize(("weights", "limit"), LIMITS)
def test_a_prompt_in_pieces_gives_with_fewer_bits_what_it_gives_at_once(
    cloud_bundle: Callable[[int], Bundle], whole: TinyModel, weights: Weights, limit: float
) -> None:
    layers = UpperLayers(cloud_bundle(2), 1, weights)
    rows = whole.upload(IDS[0], 2)
    sequence = Sequence(layers, rows)
    assert layers([sequence.chunk(0, 20, num_outputs=0)]).shape == (0, 384)
    logits = layers([sequence.chunk(20)])
    at_once = layers([Sequence(layers, rows).chunk()])
    assert (logits - at_once).norm() / at_once.norm() < limit


@pytest.mark.parametrize(("weights", "limit"), LIMITS)
def test_the_best_logits_with_fewer_bits_are_close_to_those_in_float32(
    cloud_bundle: Callable[[int], Bundle], whole: TinyModel, weights: Weights, limit: float
) -> None:
    layers = UpperLayers(cloud_bundle(2), 1, weights)
    rows = whole.upload(IDS[0], 2)
    logits = layers([Sequence(layers, rows).chunk(num_outputs=len(rows))])
    expected = whole.logits(rows, 2)
    assert (logits - expected).norm() / expected.norm() < max(limit, HEAD_LIMIT)
    best = expected.topk(8).indices
    logits = logits.gather(1, best)
    expected = expected.gather(1, best)
    assert (logits - expected).norm() / expected.norm() < limit


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_with_fewer_bits_another_session_changes_no_logits_either(
    cloud_bundle: Callable[[int], Bundle], whole: TinyModel, weights: Weights
) -> None:
    layers = UpperLayers(cloud_bundle(2), 1, weights)
    first, *others = [Sequence(layers, whole.upload(ids, 2)) for ids in IDS]
    alone = layers([first.chunk(num_outputs=5)])
    again = Sequence(layers, first.rows)
    together = layers([*(other.chunk() for other in others), again.chunk(num_outputs=5)])[-5:]
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-2)


def test_each_layer_takes_the_fewest_bits_that_hold_it_and_the_lm_head_two_steps() -> None:
    model = nn.ModuleDict({
        "narrow": nn.Linear(48, 32, bias=False), "wide": nn.Linear(64, 32, bias=False),
        "odd": nn.Linear(33, 32, bias=False), "biased": nn.Linear(64, 32),
        "lm_head": nn.Linear(64, 32, bias=False),
    })  # fmt: skip
    pack(model, "int4")
    kinds = {name: type(module) for name, module in model.items()}
    assert kinds == {
        "narrow": Int8Linear, "wide": Int4Linear, "odd": PackedLinear, "biased": PackedLinear,
        "lm_head": TwoStepHead,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("num_in", "kind"), [(64, TwoStepHead), (48, Int8Linear), (33, PackedLinear)]
)
def test_an_lm_head_that_four_bits_cannot_hold_is_read_whole(
    num_in: int, kind: type[nn.Module]
) -> None:
    model = nn.ModuleDict({"lm_head": nn.Linear(num_in, 32, bias=False)})
    pack(model, "int8")
    assert isinstance(model["lm_head"], kind)
