"""One export from a model to a bundle's folder, which appears whole or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fleet.errors import ExportError
from fleet.manifest import SCHEMA_VERSION, FileEntry, Manifest, ModelInfo, hash_file, write_manifest
from onnx_export import parity
from onnx_export.architecture import check_exits, check_model, model_info
from onnx_export.checkpoint import DEFAULT_NAME, resolve_model
from onnx_export.cloud import write_cloud
from onnx_export.config import DEFAULT_MODEL, ExportConfig, require_packages
from onnx_export.heads import SHIPPED_HEADS, ExitHead, load_heads, shared_heads
from onnx_export.partition import export_block, export_lm_head
from onnx_export.quantize import quantize

TOOLS = ("cecollm-fleet", "torch", "transformers", "onnx", "onnxruntime")
LARGEST_INLINE_BYTES = 1 << 30  # protobuf holds 2 GiB at most; beyond this the weights go into a file beside the graph

Progress = Callable[[str], None]


def export_bundle(config: ExportConfig, progress: Progress = lambda _: None) -> Manifest:
    """Exports a model into ``config.out`` and returns the manifest; `progress` hears one line a stage.

    Raises:
        ConfigError: a value that makes no sense, `out` is in use, or an extra is missing.
        ExportError: the model or the exits cannot be exported, or the graphs differ from PyTorch.
        HeadsError: the exit heads do not fit.
    """
    require_packages()
    config.check()
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{config.out.name}.", dir=config.out.parent) as temporary:
        folder = Path(temporary) / "bundle"
        folder.mkdir()
        manifest = build(config, folder, progress)
        if config.out.exists():
            config.out.rmdir()
        folder.rename(config.out)
    progress(f"bundle {manifest.bundle_id} in {config.out}")
    return manifest


def build(config: ExportConfig, folder: Path, progress: Progress) -> Manifest:
    """Fills an empty `folder` with a bundle."""
    model, tokenizer = load_model(config, progress)
    name = DEFAULT_NAME if config.model == DEFAULT_MODEL else Path(config.model).name
    info = model_info(name, model, config.max_positions)
    top_k = min(config.top_k, info.vocab_size)
    heads = read_heads(config, model)
    write_edge(config, model, heads, info, top_k, folder / "edge", progress)
    progress("comparing the graphs with PyTorch")
    errors = parity.measure(folder / "edge", model, heads, info)
    parity.check(errors, config.quantization)
    progress(f"writing layers [{config.upload}, {info.num_layers}) for the cloud")
    write_cloud(model, config.upload, folder / "cloud")
    write_tokenizer(tokenizer, config.model, folder / "tokenizer")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model=info,
        exits=config.exits,
        split_layer=config.split,
        upload_layer=config.upload,
        quantization=config.quantization,
        top_k=top_k,
        thresholds=config.exit_thresholds,
        parity={name: float(f"{error:.3g}") for name, error in errors.items()},
        tools={tool: version(tool) for tool in TOOLS},
        files=tuple(list_files(folder)),
    )
    write_manifest(folder, manifest)
    return manifest


def load_model(config: ExportConfig, progress: Progress) -> tuple[Any, Any]:
    """The model in float32 on the CPU and its tokenizer, after checking that it can be exported."""
    source = resolve_model(config.model, progress)
    progress(f"loading {config.model}")
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():  # else the type is guessed from the path
        raise ExportError(f"cannot load model {config.model!r}: no config.json in it; expected a checkpoint's folder")
    try:
        description = AutoConfig.from_pretrained(source)
        check_model(description)
        check_exits(config, description.num_hidden_layers)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f"cannot load model {config.model!r}: {reason}; expected 'default', a hub name or a checkpoint's folder"
        ) from error
    return model.eval().requires_grad_(False), tokenizer


def read_heads(config: ExportConfig, model: Any) -> dict[int, ExitHead]:
    """Exit heads by layer: given ones, the default model's shipped ones, or the model's own final norm."""
    path = config.heads or (SHIPPED_HEADS if config.model == DEFAULT_MODEL else None)
    eps = float(model.config.rms_norm_eps)
    if path is None:
        return shared_heads(config.exits, model.model.norm.weight, eps)
    return load_heads(path, config.exits, model.config.hidden_size, eps)


def write_edge(
    config: ExportConfig,
    model: Any,
    heads: Mapping[int, ExitHead],
    info: ModelInfo,
    top_k: int,
    folder: Path,
    progress: Progress,
) -> None:
    """The blocks' graphs and the LM head's."""
    folder.mkdir()
    embedding = torch.float32 if config.quantization == "fp32" else torch.float16
    starts = (0, *config.exits[:-1])
    for i, (start, stop) in enumerate(zip(starts, config.exits, strict=True)):
        progress(f"exporting layers [{start}, {stop}) as {config.quantization}")
        graph = export_block(model, (start, stop), heads[stop], info, embedding)
        save_graph(quantize(graph, config.quantization), folder / f"block_{i}.onnx")
    progress(f"exporting the LM head as {config.quantization}")
    save_graph(quantize(export_lm_head(model, info, top_k), config.quantization), folder / "lm_head.onnx")


def save_graph(graph: onnx.ModelProto, path: Path) -> None:
    """One file, or for a large graph a second one for its weights."""
    large = sum(len(tensor.raw_data) for tensor in graph.graph.initializer) > LARGEST_INLINE_BYTES
    onnx.save_model(graph, path, save_as_external_data=large, location=f"{path.name}.data" if large else None)


def write_tokenizer(tokenizer: Any, name: str, folder: Path) -> None:
    """What a device needs to speak text: ``tokenizer.json``, the chat template and the two special tokens in it.

    Raises:
        ExportError: the tokenizer has no fast form or no chat template.
    """
    if not tokenizer.is_fast:
        raise ExportError(f"the tokenizer of {name} has no fast form (tokenizer.json), which devices need")
    if not isinstance(tokenizer.chat_template, str):
        raise ExportError(f"the tokenizer of {name} has no single chat template; devices need one")
    folder.mkdir()
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    (folder / "config.json").write_text(json.dumps(tokens) + "\n", encoding="utf-8")


def list_files(folder: Path) -> list[FileEntry]:
    """Every file below `folder` with its size and SHA-256, in order of path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, hash_file(path)) for path in paths]
