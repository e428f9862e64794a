"""An export that loses too many tokens in 4 bits has more bits where they help most."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fleet.bundles.manifest import read_manifest
from fleet.errors import ExportError
from onnx_export import parity
from onnx_export.bundle import export_bundle
from onnx_export.config import ExportConfig
from onnx_export.sensitivity import (
    ProductScore,
    choose_raised,
    describe_raised,
    first_share,
    product_scores,
)
from onnx_export.streamed_model import open_model
from tests.onnx_export.traces import shared_traces
from tests.tiny import make_tiny_checkpoint

DOWN = "model.layers.1.mlp.down_proj.weight"
KINDS = ("q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj")


def off_grid(folder: Path, *names: str) -> Path:
    """Return a tiny checkpoint; weights whose name ends with one of `names` are on no grid."""
    make_tiny_checkpoint(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    torch.manual_seed(3)
    for name, tensor in tensors.items():
        if name.endswith(names):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def product(layer: int, kind: str, num_weights: int, score: float) -> ProductScore:
    names = tuple(f"model.layers.{layer}.mlp.{name}.weight" for name in kind.split("+"))
    return ProductScore(names, num_weights, score)


def test_the_scores_show_which_products_lose_by_four_bits(tmp_path: Path) -> None:
    model = open_model(str(off_grid(tmp_path / "model", DOWN)), "tiny")
    window = torch.arange(3, 40)[None].numpy()
    scores = product_scores(model, 2, window)
    assert [each.kind for each in scores] == [*KINDS, *KINDS]
    worst = max(scores, key=lambda each: each.score)
    assert (worst.names, worst.num_weights) == ((DOWN,), 64 * 128)
    others = [each.score for each in scores if each is not worst]
    assert max(others) < 1e-6 < worst.score


def test_weights_on_a_finer_grid_have_no_score(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    blocks = tensors[DOWN].view(64, -1, 32)
    blocks.copy_((torch.randn_like(blocks) * 20).round().clamp(-127, 127) * 0.01)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = open_model(str(folder), "tiny")
    scores = product_scores(model, 2, torch.arange(3, 40)[None].numpy())
    assert DOWN not in {name for each in scores for name in each.names}
    assert len(scores) == 7


def test_products_that_lose_most_for_each_weight_are_raised_first() -> None:
    scores = [
        product(0, "down_proj", 100, 2.0),
        product(0, "gate_proj+up_proj", 400, 4.0),
        product(1, "down_proj", 100, 3.0),
        product(1, "gate_proj+up_proj", 400, 1.0),
    ]
    raised = choose_raised(scores, 0.5)
    assert [each.score for each in raised] == [3.0, 2.0]
    assert describe_raised(raised) == "down_proj 2"
    assert len(choose_raised(scores, 0.0)) == 4
    assert choose_raised(scores, 1.0) == []


def test_the_share_that_may_stay_follows_from_the_agreement() -> None:
    assert first_share(0.9, 0.95) == pytest.approx(0.16)
    assert first_share(0.75, 0.95) == pytest.approx(0.0256)
    assert first_share(0.97, 0.95) == 0.25


@pytest.fixture(scope="module", autouse=True)
def traces() -> Iterator[None]:
    with shared_traces():
        yield


def test_an_export_raises_bits_until_the_agreement_is_met(tmp_path: Path) -> None:
    model = off_grid(tmp_path / "model", "down_proj.weight")
    lines: list[str] = []
    out = tmp_path / "bundle"
    options = ExportConfig(out=out, exits=(2,), model=str(model), exit_head="shared", accept=0.9)
    export_bundle(options, lines.append)
    manifest = read_manifest(out)
    figures = manifest.parity
    assert manifest.quantization == "balanced"
    assert min(figures["same_as_pytorch.2"], figures[parity.WHOLE]) >= 0.9
    steps = [line for line in lines if "bits " in line]
    assert "bits a weight, agreement 0." in steps[0]
    assert steps[1].startswith("measuring")
    assert steps[2].startswith("8 bits for ")
    assert f"{figures['bits']:.3g} bits a weight" in steps[-1]


def test_an_lm_head_that_is_too_coarse_has_8_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {**parity.LIMITS["balanced"], "logprob": 0.01}
    monkeypatch.setattr(parity, "LIMITS", {**parity.LIMITS, "balanced": limits})
    model = make_tiny_checkpoint(tmp_path / "model")
    lines: list[str] = []
    out = tmp_path / "bundle"
    options = ExportConfig(out=out, exits=(2,), model=str(model), exit_head="shared", top_k=4)
    export_bundle(options, lines.append)
    (line,) = [line for line in lines if "LM head's first step" in line]
    assert line.startswith("8 bits for ")
    figures = read_manifest(out).parity
    assert max(figures["logprob.2"], figures["lm_head.logprob"]) <= 0.01


def test_a_limit_that_more_bits_do_not_meet_fails_with_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "LEAST_AGREEMENT", 1.1)
    model = make_tiny_checkpoint(tmp_path / "model")
    lines: list[str] = []
    out = tmp_path / "bundle"
    options = ExportConfig(out=out, exits=(2,), model=str(model), exit_head="shared")
    with pytest.raises(ExportError, match=r"whole is .*at least 1; .*--accept"):
        export_bundle(options, lines.append)
    assert any(line.startswith("8 bits for 8 of 8 products") for line in lines)
    assert list(tmp_path.iterdir()) == [model]
