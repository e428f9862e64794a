"""Verification of a bundle's folder against its manifest: files, hashes, shapes, signature."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from msgspec import Struct

from fleet.bundles.manifest import (
    MANIFEST_FILE,
    Bundle,
    Manifest,
    ModelInfo,
    check_file,
    read_manifest,
)
from fleet.bundles.signature import SIGNATURE_FILE, check_signature
from fleet.bundles.tensor_file import TensorFile
from fleet.bundles.token_tables import EMBEDDING, load_tables
from fleet.errors import BundleError, ConfigError
from fleet.utils.text_files import read_json
from fleet.utils.validation import JSON_ERRORS

REQUIRED: Final = ("edge/lm_head.onnx", EMBEDDING, "tokenizer/tokenizer.json")
REQUIRED_IN_CLOUD: Final = ("cloud/config.json", "cloud/model.safetensors")
ONNX_TYPES: Final = {"float16": "float16", "float32": "float"}
LLAMA_NORMS: Final = ("input_layernorm", "post_attention_layernorm")
GEMMA_NORMS: Final = (*LLAMA_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
NORMS: Final = {
    "gemma2": GEMMA_NORMS,
    "gemma3_text": GEMMA_NORMS,
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
"""Norms of a layer by the type of the model."""
GraphValue: TypeAlias = tuple[Any, ...]  # the type, then the sizes; None for a free size


class CloudConfig(Struct, kw_only=True):
    """The values of the cloud partition's ``config.json`` that determine its tensors' shapes."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    model_type: str = "llama"


class Verdict(Struct, frozen=True, kw_only=True):
    """The result of a verification; without `findings` the bundle is valid.

    `notes` list the checks that were skipped.
    """

    bundle_id: str | None
    ok: bool
    signature: str
    findings: tuple[str, ...]
    notes: tuple[str, ...]


def verify_bundle(folder: Path, key: Path | None = None) -> Verdict:
    """Verify the bundle in `folder`, and its signature by the public key or certificate in `key`.

    Raises:
        ConfigError: `key` holds no key.
    """
    is_signed = (folder / SIGNATURE_FILE).is_file()
    signature = "not checked" if is_signed else "unsigned"
    findings = []
    notes = []
    bundle_id = None
    if is_signed and key is None:
        notes.append("the signature was not checked: give the signer's public key with --key")
    try:
        manifest = read_manifest(folder)
    except BundleError as error:
        findings.append(str(error))
    else:
        bundle_id = manifest.bundle_id
        if key is not None:
            try:
                check_signature(folder, key)
                signature = "valid"
            except BundleError as error:
                signature = "invalid" if is_signed else "unsigned"
                findings.append(str(error))
        findings += [*_check_files(folder, manifest), *_check_layout(manifest)]
        if not findings:
            if not manifest.is_device_only:
                findings += _check_cloud(folder, manifest)
            if importlib.util.find_spec("onnxruntime") is None:
                notes.append("shapes of the graphs were not checked: onnxruntime is not installed")
            else:
                findings += _check_graphs(folder, manifest)
    return Verdict(
        bundle_id=bundle_id,
        ok=not findings,
        signature=signature,
        findings=tuple(findings),
        notes=tuple(notes),
    )


def _check_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield the files that are missing, altered or not in the manifest."""
    for entry in manifest.files:
        try:
            check_file(folder, entry)
        except BundleError as error:
            yield str(error)
    known = {entry.path for entry in manifest.files} | {MANIFEST_FILE, SIGNATURE_FILE}
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and path.relative_to(folder).as_posix() not in known:
            yield f"file {path} is not in the manifest; remove it or export the bundle again"


def _check_layout(manifest: Manifest) -> Iterator[str]:
    """Yield the values of the manifest that contradict each other."""
    exits = manifest.exits
    info = manifest.model
    is_increasing = list(exits) == sorted(set(exits))
    if not exits or not is_increasing or exits[0] < 1 or exits[-1] > info.num_layers:
        yield f"exits {exits}: expected increasing layers from 1 to {info.num_layers}"
        return
    if manifest.split_layer not in manifest.splits or manifest.upload_layer not in exits:
        yield (
            f"split {manifest.split_layer} and upload layer {manifest.upload_layer}: "
            f"expected two of {exits}, and a split that is not below the upload layer"
        )
    uploads = manifest.upload_layers
    is_increasing = list(uploads) == sorted(set(uploads))
    is_needed = manifest.is_device_only or uploads[-1] < info.num_layers
    if uploads[:1] != (manifest.upload_layer,) or not is_increasing or not is_needed:
        yield (
            f"upload layers {uploads}: expected increasing ones from {manifest.upload_layer} on "
            f"and below {info.num_layers}"
        )
    if not set(uploads) <= set(exits):
        yield f"upload layers {uploads}: expected some of the exits {exits}"
    if len(manifest.thresholds) != len(exits):
        yield f"{len(manifest.thresholds)} thresholds for {len(exits)} exits: expected one for each"
    files = [entry.path for entry in manifest.files]
    in_cloud = () if manifest.is_device_only else REQUIRED_IN_CLOUD
    for name in (*(f"edge/block_{i}.onnx" for i in range(len(exits))), *REQUIRED, *in_cloud):
        if files.count(name) != 1:
            yield f"the manifest names {name} {files.count(name)} times: expected it once"


def _check_graphs(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield the graphs whose inputs or outputs contradict the manifest in type or size."""
    for i, (start, stop) in enumerate(manifest.blocks):
        has_own_layer = manifest.exit_head == "block" and stop < manifest.model.num_layers
        num_layers = stop - start + has_own_layer
        yield from _check_block(folder, manifest, f"edge/block_{i}.onnx", num_layers)
    yield from _check_lm_head(folder, manifest)


def _check_block(folder: Path, manifest: Manifest, name: str, num_layers: int) -> Iterator[str]:
    info = manifest.model
    cache = ("float", 1, info.num_key_value_heads, None, info.head_dim)
    hidden = ("float", 1, None, info.hidden_size)
    values = _load_values(folder / name)
    if isinstance(values, str):
        yield values
        return
    expected: dict[str, GraphValue] = {
        "input": hidden,
        "seqlens_k": ("int32", 1),
        "total_length": ("int32",),
        "hidden_states": hidden,
        "exit_hidden": rows_of(values, "float", info.hidden_size),
    }
    caches = {value for value in values if value.startswith(("past.", "present."))}
    num_caches = 4 * num_layers  # keys and values, in and out
    if len(caches) != num_caches:
        yield f"{name} has {len(caches)} cache inputs and outputs: expected {num_caches}"
    yield from _compare_values(name, values, expected | dict.fromkeys(caches, cache))


def _check_lm_head(folder: Path, manifest: Manifest) -> Iterator[str]:
    info = manifest.model
    name = "edge/lm_head.onnx"
    values = _load_values(folder / name)
    if isinstance(values, str):
        yield values
        return
    try:
        _, table = load_tables(Bundle(folder, manifest))
    except BundleError as error:
        yield str(error)
        return
    expected: dict[str, GraphValue] = {
        "exit_hidden": rows_of(values, "float", info.hidden_size),
        "table": (ONNX_TYPES[table.dtype.name], info.vocab_size, info.hidden_size),
        "top_ids": rows_of(values, "int64", manifest.top_k),
        "top_logprobs": rows_of(values, "float", manifest.top_k),
        "confidence": rows_of(values, "float"),
    }
    yield from _compare_values(name, values, expected)


def rows_of(values: Mapping[str, GraphValue], dtype: str, *width: int) -> GraphValue:
    """Return the shape of a value with a row for each exit: one row in earlier graphs."""
    num_rows = values.get("exit_hidden", (dtype, None))[1]
    return (dtype, 1 if num_rows == 1 else None, *width)


def _load_values(path: Path) -> dict[str, GraphValue] | str:
    """Return a graph's inputs and outputs by name, or the reason why it cannot be loaded."""
    import onnxruntime as ort  # not installed everywhere

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  ONNX Runtime's errors have no common type
        return f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0]}"
    values = (*session.get_inputs(), *session.get_outputs())
    return {value.name: _graph_value(value.type, value.shape) for value in values}


def _graph_value(tensor_type: str, shape: Sequence[int | str | None]) -> GraphValue:
    sizes = (size if isinstance(size, int) else None for size in shape)
    return (tensor_type.removeprefix("tensor(").removesuffix(")"), *sizes)


def _compare_values(
    graph: str, values: Mapping[str, GraphValue], expected: Mapping[str, GraphValue]
) -> Iterator[str]:
    """Yield the expected values that a graph lacks or has otherwise."""
    for name, value in expected.items():
        if values.get(name) != value:
            found = _format_value(values.get(name))
            yield f"{graph}: {name} is {found}, expected {_format_value(value)}"


def _format_value(value: GraphValue | None) -> str:
    """Format a type with its sizes, e.g. ``float[1, any, 64]``."""
    if value is None:
        return "missing"
    return f"{value[0]}[{', '.join('any' if size is None else str(size) for size in value[1:])}]"


def _check_cloud(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield the cloud partition's values and tensor shapes that contradict the manifest."""
    info = manifest.model
    try:
        config: CloudConfig = read_json(
            folder / "cloud/config.json", CloudConfig, "export the bundle again"
        )
        shapes = _read_shapes(folder / "cloud/model.safetensors")
    except (ConfigError, *JSON_ERRORS, ValueError) as error:
        yield f"the cloud partition cannot be read: {error}"
        return
    num_layers = info.num_layers - manifest.upload_layer
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        if getattr(config, name) != getattr(info, name):
            found = getattr(config, name)
            yield f"cloud/config.json: {name} is {found}, expected {getattr(info, name)}"
    if config.num_hidden_layers != num_layers:
        found = config.num_hidden_layers
        yield f"cloud/config.json: num_hidden_layers is {found}, expected {num_layers}"
    required = _required_shapes(manifest, config, num_layers)
    optional = _optional_shapes(manifest, config, num_layers)
    for name in sorted(shapes.keys() | required.keys()):
        expected = required.get(name, optional.get(name))
        if shapes.get(name) != expected:
            text = f"{name} is {shapes.get(name, 'missing')}, expected {expected or 'nothing'}"
            yield f"cloud/model.safetensors: {text}"


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read shapes by name from a safetensors file's header; check that all values are finite."""
    with TensorFile(path) as file:
        for name in file.entries:
            file.check(name)
        return {name: entry.shape for name, entry in file.entries.items()}


def _required_shapes(
    manifest: Manifest, config: CloudConfig, num_layers: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `num_layers` layers, the final norm and the LM head."""
    info = manifest.model
    hidden = (info.hidden_size,)
    layer = _product_shapes(info, config)
    layer |= dict.fromkeys(NORMS.get(config.model_type, LLAMA_NORMS), hidden)
    shapes = _layer_shapes({f"{name}.weight": shape for name, shape in layer.items()}, num_layers)
    lm_head = (info.vocab_size, info.hidden_size)
    return {"model.norm.weight": hidden, "lm_head.weight": lm_head, **shapes}


def _product_shapes(info: ModelInfo, config: CloudConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's matrices, some of which Phi-3 stores as one."""
    hidden = info.hidden_size
    intermediate = config.intermediate_size
    queries = info.num_attention_heads * info.head_dim
    keys = info.num_key_value_heads * info.head_dim
    outputs = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
    outputs |= {"mlp.gate_proj": intermediate, "mlp.up_proj": intermediate}
    if config.model_type == "phi3":
        outputs = {"self_attn.qkv_proj": queries + 2 * keys, "mlp.gate_up_proj": 2 * intermediate}
    shapes: dict[str, tuple[int, ...]] = {name: (size, hidden) for name, size in outputs.items()}
    shapes["self_attn.o_proj"] = (hidden, queries)
    shapes["mlp.down_proj"] = (hidden, intermediate)
    return shapes


def _optional_shapes(
    manifest: Manifest, config: CloudConfig, num_layers: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of biases and of query and key norms, which some models have."""
    info = manifest.model
    products = _product_shapes(info, config)
    layer: dict[str, tuple[int, ...]] = {
        f"{name}.bias": shape[:1] for name, shape in products.items()
    }
    # OLMo 2 normalises all heads together.
    is_joint = config.model_type == "olmo2"
    queries = info.num_attention_heads if is_joint else 1
    keys = info.num_key_value_heads if is_joint else 1
    layer["self_attn.q_norm.weight"] = (queries * info.head_dim,)
    layer["self_attn.k_norm.weight"] = (keys * info.head_dim,)
    return _layer_shapes(layer, num_layers)


def _layer_shapes(
    layer: Mapping[str, tuple[int, ...]], num_layers: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `num_layers` layers from those of one."""
    return {
        f"model.layers.{i}.{name}": shape
        for i in range(num_layers)
        for name, shape in layer.items()
    }
