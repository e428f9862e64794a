"""One export from a model to a bundle's folder, which appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fleet.bundles.calibration_file import find_calibration, read_calibration
from fleet.bundles.manifest import SCHEMA_VERSION, FileEntry, Manifest, hash_file, write_manifest
from fleet.errors import ConfigError, ExportError
from fleet.exits.calibration import Calibration
from onnx_export import parity
from onnx_export.architecture import check_exits, check_model, model_info
from onnx_export.assembly import Assembly
from onnx_export.atomic_folder import staged
from onnx_export.checkpoint import DEFAULT_NAME, load_pretrained, resolve_model
from onnx_export.cloud import write_cloud
from onnx_export.config import (
    DEFAULT_MODEL,
    DEFAULT_THRESHOLD,
    SHARED_HEAD,
    ExportConfig,
    require_packages,
    show,
)
from onnx_export.fingerprints import tool_versions
from onnx_export.graph_cache import PartCache, default_parts
from onnx_export.heads import (
    SHIPPED_HEADS,
    HeadsFile,
    fingerprint,
    heads_digest,
    load_heads,
    shared_heads,
)

LARGEST_INLINE_BYTES = 1 << 20
"""Beyond this the weights go into a file beside the graph, which ONNX Runtime maps into memory instead of copying."""

Progress = Callable[[str], None]
Report = Callable[[Mapping[str, float], Mapping[str, float]], None]


def export_bundle(
    config: ExportConfig, progress: Progress = lambda _: None, report: Report = lambda *_: None
) -> Manifest:
    """Exports a model into ``config.out`` and returns the manifest.

    `progress` hears one line a stage; `report` gets the figures of :mod:`onnx_export.parity` and their limits.

    Raises:
        ConfigError: a value that makes no sense, `out` is in use, or an extra is missing.
        ExportError: the model or the exits cannot be exported, the graphs differ from PyTorch, or the disk is full.
        HeadsError: the exit heads do not fit.
    """
    require_packages()
    config.check()
    try:
        with staged(config.out, progress) as folder:
            manifest = build(config, folder, progress, report)
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f"cannot write the bundle {config.out}: {reason}; nothing is left of it, make room and export again"
        ) from error
    progress(f"bundle {manifest.bundle_id} in {config.out}")
    return manifest


def build(config: ExportConfig, folder: Path, progress: Progress, report: Report) -> Manifest:
    """Fills an empty `folder` with a bundle."""
    model, tokenizer = load_model(config, progress)
    name = DEFAULT_NAME if config.model == DEFAULT_MODEL else Path(config.model).name
    info = model_info(name, model, config.max_positions)
    top_k = min(config.top_k, info.vocab_size)
    heads = read_heads(config, model, progress)
    parts = PartCache(config.parts) if config.parts else default_parts()
    assembly = Assembly(model, info, config.quantization, parts)
    write_edge(
        assembly, config, heads=heads, top_k=top_k, folder=folder / "edge", progress=progress
    )
    windows = parity.text_windows(tokenizer, info.max_positions)
    progress(f"comparing the graphs with PyTorch on {parity.NUM_TOKENS} tokens of text")
    figures = parity.measure(folder / "edge", model, heads.heads, info, windows)
    limits = parity.limits(config.quantization, heads.kind)
    report(figures, limits)
    parity.check(figures, limits)
    progress(f"writing layers [{config.upload}, {info.num_layers}) for the cloud")
    write_cloud(model, config.upload, folder / "cloud")
    write_tokenizer(tokenizer, folder / "tokenizer")
    digest = heads_digest(heads.heads)
    thresholds, calibration = choose_thresholds(config, digest)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model=info,
        exits=config.exits,
        split_layer=config.split,
        upload_layer=config.upload,
        exit_head=heads.kind,
        heads_sha256=digest,
        calibration=calibration,
        quantization=config.quantization,
        top_k=top_k,
        thresholds=thresholds,
        parity=figures,
        tools=tool_versions(),
        files=tuple(list_files(folder)),
    )
    write_manifest(folder, manifest)
    return manifest


def choose_thresholds(
    config: ExportConfig, heads_sha256: str
) -> tuple[tuple[float, ...], Calibration | None]:
    """Thresholds for the exits, and the calibration that they come from, if they come from one.

    Raises:
        ConfigError: the calibration that was given cannot be read or holds for another edge.
    """
    if config.thresholds:
        return config.thresholds, None
    edge = config.exits, config.quantization, heads_sha256
    if config.calibration is not None:
        given = read_calibration(config.calibration)
        if not given.fits(*edge):
            raise ConfigError(
                f"{config.calibration} holds for exits {show(given.exits)}, {given.quantization} and heads "
                f"{given.heads_sha256[:12]}, not for exits {show(config.exits)}, {config.quantization} and heads "
                f"{heads_sha256[:12]}; calibrate the new bundle with 'fleet heads calibrate'"
            )
        return given.thresholds, given.calibration
    shipped = find_calibration(SHIPPED_HEADS.parent.glob("*.calibration.json"), *edge)
    if shipped is not None:
        return shipped.thresholds, shipped.calibration
    return (DEFAULT_THRESHOLD,) * len(config.exits), None


def load_model(config: ExportConfig, progress: Progress) -> tuple[Any, Any]:
    """The model in float32 on the CPU and its tokenizer, after checking that it can be exported."""
    source = resolve_model(config.model, progress)
    progress(f"loading {config.model}")
    description = load_pretrained(AutoConfig, source, config.model)
    check_model(description)
    check_exits(config.exits, description.num_hidden_layers)
    tokenizer = load_pretrained(AutoTokenizer, source, config.model)
    check_tokenizer(tokenizer, config.model)
    model, loaded = load_pretrained(
        AutoModelForCausalLM,
        source,
        config.model,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    if unused := sorted(loaded["unexpected_keys"]):
        progress(
            f"{len(unused)} weights of the checkpoint have no place in the model, such as {unused[0]}: left out"
        )
    if missing := sorted(loaded["missing_keys"]):
        raise ExportError(
            f"model {config.model!r} lacks {len(missing)} of its weights, such as {missing[0]}; "
            "expected a whole causal language model"
        )
    return model.eval().requires_grad_(False), tokenizer


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raises ExportError when a tokenizer has no fast form or no chat template, which devices need."""
    if not tokenizer.is_fast:
        raise ExportError(
            f"the tokenizer of {name} has no fast form (tokenizer.json), which devices need"
        )
    if not isinstance(tokenizer.chat_template, str):
        raise ExportError(f"the tokenizer of {name} has no single chat template; devices need one")


def read_heads(config: ExportConfig, model: Any, progress: Progress) -> HeadsFile:
    """Exit heads: given ones, the default model's shipped ones, or the model's own final norm."""
    path = config.heads or (SHIPPED_HEADS if config.model == DEFAULT_MODEL else None)
    if config.exit_head == SHARED_HEAD or path is None:
        if config.exit_head is None:
            progress(
                "no exit heads given: the exits share the model's final norm, as with --exit-head shared"
            )
        return HeadsFile(shared_heads(model, config.exits), "shared", fingerprint(model))
    return load_heads(path, config.exits, model)


def write_edge(
    assembly: Assembly,
    config: ExportConfig,
    heads: HeadsFile,
    top_k: int,
    folder: Path,
    progress: Progress,
) -> None:
    """The blocks' graphs and the LM head's, the embedding and, where it is not the same, the LM head's weights."""
    folder.mkdir()
    starts = (0, *config.exits[:-1])
    for i, (start, stop) in enumerate(zip(starts, config.exits, strict=True)):
        progress(f"exporting layers [{start}, {stop}) as {config.quantization}")
        graph, kept = assembly.block((start, stop), heads.heads[stop])
        if kept:
            progress(f"layers [{start}, {stop}) are as in an earlier export")
        save_graph(graph, folder / f"block_{i}.onnx")
    progress(f"exporting the LM head as {config.quantization}")
    save_graph(assembly.lm_head(top_k)[0], folder / "lm_head.onnx")
    for name, table in assembly.tables().items():
        np.save(folder / f"{name}.npy", table.numpy())


def save_graph(graph: onnx.ModelProto, path: Path) -> None:
    """One file, or for a large graph a second one for its weights."""
    large = sum(len(tensor.raw_data) for tensor in graph.graph.initializer) > LARGEST_INLINE_BYTES
    onnx.save_model(
        graph, path, save_as_external_data=large, location=f"{path.name}.data" if large else None
    )


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """What a device needs to speak text: ``tokenizer.json``, the chat template and the two special tokens in it."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text(
        tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8"
    )
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    (folder / "config.json").write_text(json.dumps(tokens) + "\n", encoding="utf-8")


def list_files(folder: Path) -> list[FileEntry]:
    """Every file below `folder` with its size and SHA-256, in order of path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, hash_file(path))
        for path in paths
    ]
