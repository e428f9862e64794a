"""The export of a model as a bundle. The folder appears complete or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec import UNSET
from safetensors import SafetensorError

from fleet.bundles.calibration_file import find_calibration, read_calibration
from fleet.bundles.manifest import SCHEMA_VERSION, FileEntry, Manifest, hash_file, write_manifest
from fleet.errors import ConfigError, ExportError
from fleet.exits.calibration import Calibration
from onnx_export import parity
from onnx_export.architecture import check_exits, check_model, check_positions, model_info
from onnx_export.assembly import Assembly
from onnx_export.atomic_folder import staged
from onnx_export.checkpoint import (
    DEFAULT_NAME,
    check_generation_config,
    load_config,
    load_tokenizer,
    resolve_model,
)
from onnx_export.cloud import write_cloud
from onnx_export.config import (
    DEFAULT_MODEL,
    DEFAULT_THRESHOLD,
    SHARED_HEAD,
    ExportConfig,
    format_layers,
    require_packages,
)
from onnx_export.edge import Edge, Progress
from onnx_export.fingerprints import tool_versions
from onnx_export.graph_cache import GraphCache, default_graph_cache
from onnx_export.heads import (
    SHIPPED_HEADS,
    HeadsFile,
    heads_digest,
    load_heads,
    model_fingerprint,
    shared_heads,
)
from onnx_export.resources import check_resources
from onnx_export.streamed_model import StreamedModel, open_model
from onnx_export.tokenizer import check_tokenizer, write_tokenizer

FILE_MODE = 0o644
FOLDER_MODE = 0o755
"""The mode of every file of a bundle. Some libraries write files that only their owner can read."""

Report = Callable[[Mapping[str, float], Mapping[str, float]], None]
Load = Callable[[ExportConfig, Progress], tuple[StreamedModel, Any]]


def export_bundle(
    config: ExportConfig,
    progress: Progress = lambda _: None,
    report: Report = lambda *_: None,
    load: Load | None = None,
) -> Manifest:
    """Export a model into ``config.out`` and return the manifest.

    `progress` receives one line for each stage; `report` receives the figures of
    :mod:`onnx_export.parity` and their limits. `load` returns the model and its tokenizer, by
    default those of ``config.model``.

    Raises:
        ConfigError: an option is invalid, `out` is not empty, or an extra is missing.
        ExportError: the model or the exits cannot be exported, the graphs differ from PyTorch,
            or the disk is full.
        HeadsError: the exit heads do not fit.
    """
    require_packages()
    config.check()
    model, tokenizer = (load or load_model_and_tokenizer)(config, progress)
    check_resources(config, model)
    try:
        with staged(config.out, progress) as folder:
            manifest = build_bundle(
                config, model, tokenizer, folder=folder, progress=progress, report=report
            )
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f"cannot write the bundle {config.out}: {reason}; the incomplete "
            "folder is removed; make room and export again"
        ) from error
    progress(f"bundle {manifest.bundle_id} in {config.out}")
    return manifest


def build_bundle(
    config: ExportConfig,
    model: StreamedModel,
    tokenizer: Any,
    *,
    folder: Path,
    progress: Progress,
    report: Report,
) -> Manifest:
    """Fill an empty `folder` with a bundle."""
    name = DEFAULT_NAME if config.model == DEFAULT_MODEL else Path(config.model).name
    info = model_info(name, model.skeleton, config.max_positions, tokenizer)
    heads = read_heads(config, model.skeleton, progress)
    cache = GraphCache(config.graph_cache) if config.graph_cache else default_graph_cache()
    assembly = Assembly(model, info, config.quantization, cache)
    edge = Edge(
        assembly=assembly,
        config=config,
        heads=heads,
        windows=parity.text_windows(tokenizer, info.max_positions),
        folder=folder / "edge",
        progress=progress,
    )
    figures = edge.write()
    report(figures, edge.limits)
    parity.check_parity(figures, edge.limits)
    if config.upload < info.num_layers:
        progress(f"writing layers [{config.upload}, {info.num_layers}) for the cloud")
        write_cloud(model, config.upload, folder / "cloud")
    write_tokenizer(tokenizer, name, info.vocab_size, folder, config.prompt_format)
    digest = heads_digest(heads.heads)
    thresholds, calibration = choose_thresholds(config, digest)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model=info,
        exits=config.exits,
        split_layer=config.split,
        upload_layer=config.upload,
        uploads=config.uploads if len(config.uploads) > 1 else UNSET,
        exit_head=heads.kind,
        heads_sha256=digest,
        calibration=calibration,
        quantization=config.quantization,
        top_k=config.top_k_of(info.vocab_size),
        thresholds=thresholds,
        parity=figures,
        tools=tool_versions(),
        files=tuple(list_files(folder)),
    )
    write_manifest(folder, manifest)
    set_file_modes(folder)
    return manifest


def check_uploads(uploads: tuple[int, ...], num_layers: int) -> None:
    """Raise ExportError if the cloud's half has no layer for one of several upload layers."""
    if len(uploads) > 1 and uploads[-1] == num_layers:
        raise ExportError(
            f"upload layers {format_layers(uploads)}: expected layers below {num_layers}, "
            "the end of the model; leave the last one out"
        )


def choose_thresholds(
    config: ExportConfig, heads_sha256: str
) -> tuple[tuple[float, ...], Calibration | None]:
    """Return thresholds for the exits, and the calibration that they come from, if any.

    Raises:
        ConfigError: the calibration file cannot be read, or is of a different bundle.
    """
    if config.thresholds:
        return config.thresholds, None
    if config.calibration is not None:
        return calibrated_thresholds(config, config.calibration, heads_sha256)
    paths = SHIPPED_HEADS.parent.glob("*.calibration.json")
    shipped = find_calibration(paths, config.exits, config.quantization, heads_sha256)
    if shipped is not None:
        return shipped.thresholds, shipped.calibration
    return (DEFAULT_THRESHOLD,) * len(config.exits), None


def calibrated_thresholds(
    config: ExportConfig, path: Path, heads_sha256: str
) -> tuple[tuple[float, ...], Calibration]:
    """Return the thresholds of a calibration file. It must match exits, heads and quantization."""
    file = read_calibration(path)
    if not file.fits(config.exits, config.quantization, heads_sha256):
        raise ConfigError(
            f"{path} is for exits {format_layers(file.exits)}, {file.quantization} "
            f"and heads {file.heads_sha256[:12]}, not for exits {format_layers(config.exits)}, "
            f"{config.quantization} and heads {heads_sha256[:12]}; "
            "calibrate the new bundle with 'fleet heads calibrate'"
        )
    return file.thresholds, file.calibration


def load_model_and_tokenizer(config: ExportConfig, progress: Progress) -> tuple[StreamedModel, Any]:
    """Return the model, whose layers stay in its checkpoint, and its tokenizer.

    Raises:
        ExportError: one of them cannot be loaded or exported.
    """
    source = resolve_model(config.model, progress)
    progress(f"loading {config.model}")
    model_config = load_config(source, config.model)
    check_model(model_config)
    check_exits(config.exits, model_config.num_hidden_layers)
    check_uploads(config.upload_layers, model_config.num_hidden_layers)
    check_positions(model_config, config.max_positions)
    check_generation_config(source)
    tokenizer = load_tokenizer(source, config.model)
    check_tokenizer(
        tokenizer, config.model, model_config.vocab_size, progress, config.prompt_format
    )
    return open_model(source, config.model, progress), tokenizer


def read_heads(config: ExportConfig, model: Any, progress: Progress) -> HeadsFile:
    """Return the exit heads: from a file, the shipped ones, or the model's own final norm.

    The exit after the last layer is the model's own end, which no file has.
    """
    path = config.heads or (SHIPPED_HEADS if config.model == DEFAULT_MODEL else None)
    trained = tuple(layer for layer in config.exits if layer < model.config.num_hidden_layers)
    if path is not None and config.exit_head != SHARED_HEAD and trained:
        file = load_heads(path, trained, model)
        own_end = shared_heads(model, config.exits[len(trained) :])
        return replace(file, heads={**file.heads, **own_end})
    if config.exit_head is None and trained:
        progress(
            "no exit heads given: the exits share the model's final norm, "
            "as with --exit-head shared"
        )
    return HeadsFile(shared_heads(model, config.exits), "shared", model_fingerprint(model))


def set_file_modes(folder: Path) -> None:
    """Make a folder and all that is in it readable for all users, whatever the umask is."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(FOLDER_MODE if path.is_dir() else FILE_MODE)


def list_files(folder: Path) -> list[FileEntry]:
    """Return every file below `folder` with its size and SHA-256, in order of path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, hash_file(path))
        for path in paths
    ]
