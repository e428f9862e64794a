"""Whether a bundle's folder is what its manifest says: files, hashes, shapes, signature."""

from __future__ import annotations

import importlib
import importlib.util
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from fleet.bundles.manifest import MANIFEST_FILE, Bundle, Manifest, check_file, read_manifest
from fleet.bundles.signature import SIGNATURE_FILE, check_signature
from fleet.bundles.token_tables import EMBEDDING, load_tables
from fleet.errors import BundleError

REQUIRED: Final = (
    "edge/lm_head.onnx",
    EMBEDDING,
    "cloud/config.json",
    "cloud/model.safetensors",
    "tokenizer/tokenizer.json",
)
ONNX_TYPES: Final = {"float16": "float16", "float32": "float"}
MAX_HEADER_BYTES: Final = 100_000_000
"""Of a safetensors file, by its own specification."""


class CloudConfig(Struct, kw_only=True):
    """What of the cloud partition's ``config.json`` gives its tensors their shapes."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int


class Verdict(Struct, frozen=True, kw_only=True):
    """What was found: the bundle is good when `findings` is empty; `notes` say what was not looked at."""

    bundle_id: str | None
    ok: bool
    signature: str
    findings: tuple[str, ...]
    notes: tuple[str, ...]


def verify_bundle(folder: Path, key: Path | None = None) -> Verdict:
    """Checks the bundle in `folder`, and its signature against the public key or certificate in `key`.

    Raises:
        ConfigError: `key` holds no key.
    """
    signature = "unsigned"
    findings = []
    notes = []
    if (folder / SIGNATURE_FILE).is_file():
        signature = "not checked"
        if key is None:
            notes.append("the signature was not checked: give the signer's public key with --key")
    try:
        manifest = read_manifest(folder)
    except BundleError as error:
        return Verdict(
            bundle_id=None,
            ok=False,
            signature=signature,
            findings=(str(error),),
            notes=tuple(notes),
        )
    if key is not None:
        try:
            check_signature(folder, key)
            signature = "valid"
        except BundleError as error:
            signature = "invalid" if signature == "not checked" else signature
            findings.append(str(error))
    damaged = list(check_files(folder, manifest))
    findings += [*damaged, *check_layout(manifest)]
    if not findings:
        findings += check_cloud(folder, manifest)
        if importlib.util.find_spec("onnxruntime") is None:
            notes.append("shapes of the graphs were not checked: onnxruntime is not installed")
        else:
            findings += check_graphs(folder, manifest)
    return Verdict(
        bundle_id=manifest.bundle_id,
        ok=not findings,
        signature=signature,
        findings=tuple(findings),
        notes=tuple(notes),
    )


def check_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Files that are missing, altered or too many."""
    for entry in manifest.files:
        try:
            check_file(folder, entry)
        except BundleError as error:
            yield str(error)
    known = {entry.path for entry in manifest.files} | {MANIFEST_FILE, SIGNATURE_FILE}
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and path.relative_to(folder).as_posix() not in known:
            yield f"file {path} is not in the manifest; remove it or export the bundle again"


def check_layout(manifest: Manifest) -> Iterator[str]:
    """Values of the manifest that do not fit each other."""
    exits = manifest.exits
    info = manifest.model
    if (
        not exits
        or list(exits) != sorted(set(exits))
        or exits[0] < 1
        or exits[-1] >= info.num_layers
    ):
        yield f"exits {exits}: expected increasing layers from 1 to {info.num_layers - 1}"
        return
    if manifest.split_layer != exits[-1] or manifest.upload_layer not in exits:
        yield (
            f"split {manifest.split_layer} and upload layer {manifest.upload_layer}: "
            f"expected the last exit and one of {exits}"
        )
    if len(manifest.thresholds) != len(exits):
        yield f"{len(manifest.thresholds)} thresholds for {len(exits)} exits: expected one for each"
    files = [entry.path for entry in manifest.files]
    for name in (*(f"edge/block_{i}.onnx" for i in range(len(exits))), *REQUIRED):
        if files.count(name) != 1:
            yield f"the manifest names {name} {files.count(name)} times: expected it once"


def check_graphs(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Graphs whose inputs or outputs have other types or sizes than the manifest's."""
    info = manifest.model
    cache = ("float", 1, info.num_key_value_heads, None, info.head_dim)
    hidden = ("float", 1, None, info.hidden_size)
    for i, (start, stop) in enumerate(manifest.blocks):
        values = load_values(folder / f"edge/block_{i}.onnx")
        if isinstance(values, str):
            yield values
            continue
        expected: dict[str, tuple[Any, ...]] = {
            "input": hidden,
            "seqlens_k": ("int32", 1),
            "total_length": ("int32",),
            "hidden_states": hidden,
            "exit_hidden": ("float", 1, info.hidden_size),
        }
        caches = {name for name in values if name.startswith(("past.", "present."))}
        count = 4 * (stop - start + (manifest.exit_head == "block"))
        if len(caches) != count:
            yield f"edge/block_{i}.onnx has {len(caches)} cache inputs and outputs: expected {count}"
        yield from compare(f"edge/block_{i}.onnx", values, expected | dict.fromkeys(caches, cache))
    values = load_values(folder / "edge/lm_head.onnx")
    if isinstance(values, str):
        yield values
        return
    bundle = Bundle(folder, manifest)
    try:
        table = ONNX_TYPES[load_tables(bundle)[1].dtype.name]
    except BundleError as error:
        yield str(error)
        return
    k = manifest.top_k
    yield from compare(
        "edge/lm_head.onnx",
        values,
        {
            "exit_hidden": ("float", 1, info.hidden_size),
            "table": (table, info.vocab_size, info.hidden_size),
            "top_ids": ("int64", 1, k),
            "top_logprobs": ("float", 1, k),
            "confidence": ("float", 1),
        },
    )


def load_values(path: Path) -> dict[str, tuple[Any, ...]] | str:
    """A graph's inputs and outputs, (type, sizes...) by name, None for a free size; or why it cannot be loaded."""
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  ONNX Runtime's errors have no common type of their own
        return f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0]}"
    return {
        value.name: (
            value.type[7:-1],
            *(size if isinstance(size, int) else None for size in value.shape),
        )
        for value in (*session.get_inputs(), *session.get_outputs())
    }


def compare(
    name: str, values: dict[str, tuple[Any, ...]], expected: dict[str, tuple[Any, ...]]
) -> Iterator[str]:
    """Differences of the values that must be there."""
    for value, sizes in expected.items():
        if values.get(value) != sizes:
            yield f"{name}: {value} is {show(values.get(value))}, expected {show(sizes)}"


def show(value: tuple[Any, ...] | None) -> str:
    """For example ``float[1, any, 64]``."""
    if value is None:
        return "missing"
    return f"{value[0]}[{', '.join('any' if size is None else str(size) for size in value[1:])}]"


def check_cloud(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Tensors of the cloud partition whose shapes are not what its configuration and the manifest say."""
    info = manifest.model
    try:
        config = msgspec.json.decode((folder / "cloud/config.json").read_bytes(), type=CloudConfig)
        shapes = read_shapes(folder / "cloud/model.safetensors")
    except (msgspec.MsgspecError, ValueError, struct.error) as error:
        yield f"the cloud partition cannot be read: {error}"
        return
    num_layers = info.num_layers - manifest.upload_layer
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        if getattr(config, name) != getattr(info, name):
            yield f"cloud/config.json: {name} is {getattr(config, name)}, expected {getattr(info, name)}"
    if config.num_hidden_layers != num_layers:
        yield f"cloud/config.json: num_hidden_layers is {config.num_hidden_layers}, expected {num_layers}"
    required = required_shapes(manifest, config.intermediate_size, num_layers)
    optional = optional_shapes(manifest, required, num_layers)
    for name in sorted(shapes.keys() | required.keys()):
        expected = required.get(name, optional.get(name))
        if shapes.get(name) != expected:
            yield f"cloud/model.safetensors: {name} is {shapes.get(name, 'missing')}, expected {expected or 'nothing'}"


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name from a safetensors file's header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path} has a header of {length} bytes")
        header = msgspec.json.decode(file.read(length), type=dict[str, dict[str, Any]])
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def required_shapes(
    manifest: Manifest, intermediate_size: int, num_layers: int
) -> dict[str, tuple[int, ...]]:
    """The tensors of `num_layers` layers of the Llama layout, the final norm and the LM head."""
    info = manifest.model
    hidden = info.hidden_size
    queries = info.num_attention_heads
    keys = info.num_key_value_heads
    layer = {
        "self_attn.q_proj": (queries * info.head_dim, hidden),
        "self_attn.k_proj": (keys * info.head_dim, hidden),
        "self_attn.v_proj": (keys * info.head_dim, hidden),
        "self_attn.o_proj": (hidden, queries * info.head_dim),
        "mlp.gate_proj": (intermediate_size, hidden),
        "mlp.up_proj": (intermediate_size, hidden),
        "mlp.down_proj": (hidden, intermediate_size),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    layers = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(num_layers)
        for name, shape in layer.items()
    }
    return {"model.norm.weight": (hidden,), "lm_head.weight": (info.vocab_size, hidden), **layers}


def optional_shapes(
    manifest: Manifest, required: Mapping[str, tuple[int, ...]], num_layers: int
) -> dict[str, tuple[int, ...]]:
    """The biases and the norms of query and key that some families have."""
    biases = {
        name.replace(".weight", ".bias"): shape[:1]
        for name, shape in required.items()
        if "_proj." in name
    }
    norms = (
        f"model.layers.{i}.self_attn.{name}_norm.weight" for i in range(num_layers) for name in "qk"
    )
    return biases | dict.fromkeys(norms, (manifest.model.head_dim,))
