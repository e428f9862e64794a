"""Exit heads: modules that turn a block's output into the input of the model's own LM head."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fleet.errors import ConfigError, HeadsError
from fleet.utils.text_files import check_no_pointer
from onnx_export.variants import norm_epsilon, norm_offset

FORMAT: Final = "cecollm-exit-heads/2"
SHIPPED_HEADS: Final = Path(__file__).parent / "data" / "smollm2-135m-instruct.heads.safetensors"
FINGERPRINT_ROWS: Final = 4096
HeadKind = Literal["shared", "linear", "mlp", "block"]
HEAD_KINDS: Final[tuple[str, ...]] = get_args(HeadKind)


class RmsNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467): x [..., hidden] -> [..., hidden], same dtype."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean_square + self.eps) * self.weight


class GatedMlp(nn.Module):
    """SwiGLU (arXiv 2002.05202) whose output starts at zero: x [..., hidden] -> [..., hidden]."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, intermediate, bias=False)
        self.up = nn.Linear(hidden, intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        gate = nn.functional.silu(self.gate(x))
        out: Tensor = self.down(gate * self.up(x))
        return out


class ExitHead(nn.Module):
    """Map from hidden states after some layers to the input of the model's LM head.

    ``forward``: hidden_states [..., hidden] float -> exit_hidden [..., hidden] float. Each kind
    begins with the norm:

    - ``shared``: nothing else; with the model's final norm this is LayerSkip's exit
      (arXiv 2404.16710);
    - ``linear``: a matrix, which starts as the identity;
    - ``mlp``: a matrix plus a gated MLP, which starts as zero;
    - ``block``: `layer`, a decoder layer of the model's own class with its own KV cache, then norm
      and matrix. The caller runs `layer` first, as it runs the model's layers; the input of
      ``forward`` is the output of `layer`.
    """

    def __init__(
        self,
        kind: HeadKind,
        norm_weight: Tensor,
        eps: float,
        layer: nn.Module | None = None,
        intermediate: int = 0,
    ) -> None:
        super().__init__()
        hidden = norm_weight.shape[0]
        self.kind = kind
        self.layer = layer
        self.norm = RmsNorm(norm_weight.float(), eps)
        if kind != "shared":
            self.adapter = nn.Linear(hidden, hidden, bias=False)
            nn.init.eye_(self.adapter.weight)
        if kind == "mlp":
            self.mlp = GatedMlp(hidden, intermediate or hidden)

    def forward(self, hidden_states: Tensor) -> Tensor:
        normalised = self.norm(hidden_states)
        if self.kind == "shared":
            return normalised
        out: Tensor = self.adapter(normalised)
        return out + self.mlp(normalised) if self.kind == "mlp" else out


def new_head(kind: HeadKind, model: Any, exit_layer: int, intermediate: int = 0) -> ExitHead:
    """Return an untrained head for `model` after `exit_layer` layers.

    A block starts as a copy of the model's last layer.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind not in HEAD_KINDS:
        raise ConfigError(
            f"unknown kind of exit head {kind!r}: expected one of {', '.join(HEAD_KINDS)}"
        )
    layer = None
    if kind == "block":
        layer = copy.deepcopy(model.model.layers[-1]).float()
        layer.self_attn.layer_idx = exit_layer
    norm = model.model.norm
    weight = norm.weight.detach().float() + norm_offset(norm)
    head = ExitHead(kind, weight, norm_epsilon(norm), layer, intermediate)
    return head.eval()


def shared_heads(model: Any, exits: tuple[int, ...]) -> dict[int, ExitHead]:
    """Return heads with nothing to train: every exit uses the model's final norm."""
    return {layer: new_head("shared", model, layer).requires_grad_(False) for layer in exits}


def model_fingerprint(model: Any) -> str:
    """Return the SHA-256, in hex, of final norm and LM head as float32; heads build on them."""
    digest = hashlib.sha256()
    for weight in (model.model.norm.weight, model.lm_head.weight):
        for rows in weight.detach().split(FINGERPRINT_ROWS):
            digest.update(rows.float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def heads_digest(heads: Mapping[int, ExitHead]) -> str:
    """Return the SHA-256, in hex, of heads as they are stored; a calibration refers to it."""
    digest = hashlib.sha256()
    for layer, head in sorted(heads.items()):
        for name, tensor in head.state_dict().items():
            digest.update(f"{layer} {name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.to(torch.float16).contiguous().numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class HeadsFile:
    """A file of heads, with their kind and the fingerprint of the model that they are for.

    `made_by` describes how they were made: free text by key.
    """

    heads: Mapping[int, ExitHead]
    kind: HeadKind
    fingerprint: str
    made_by: Mapping[str, str] = field(default_factory=dict)


def save_heads(file: HeadsFile, path: Path) -> None:
    """Write heads by exit layer as one FP16 safetensors file, whole or not at all."""
    tensors = {
        f"exit.{layer}.{name}": tensor.to(torch.float16).contiguous()
        for layer, head in sorted(file.heads.items())
        for name, tensor in head.state_dict().items()
    }
    metadata = {
        "format": FORMAT,
        "kind": file.kind,
        "model": file.fingerprint,
        "made_by": json.dumps(dict(file.made_by), sort_keys=True),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(0o644)  # safetensors makes it readable to its owner alone
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_heads(path: Path, exits: tuple[int, ...], model: Any) -> HeadsFile:
    """Load heads for `exits` of `model`, in float32, from a file of :func:`save_heads`.

    Raises:
        HeadsError: the file is not a heads file, is for a different model, or lacks an exit.
    """
    metadata, tensors = read_heads_file(path)
    fingerprint = model_fingerprint(model)
    trained_for = metadata.get("model")
    if trained_for != fingerprint:
        raise HeadsError(
            f"{path}: the heads were trained for a different model (its hash is "
            f"{str(trained_for)[:12]}, this model's {fingerprint[:12]}); "
            "train heads for this one with 'fleet heads train'"
        )
    kind = cast(HeadKind, metadata["kind"])
    heads = {layer: load_head(path, kind, model, layer, tensors) for layer in exits}
    return HeadsFile(heads, kind, fingerprint, json.loads(metadata.get("made_by", "{}")))


def read_heads_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata and the float32 tensors of a heads file.

    Raises:
        HeadsError: the file cannot be read or has a different format.
    """
    try:
        check_no_pointer(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            keys = list(file.keys())
            tensors = {key: file.get_tensor(key).float() for key in keys}
    except (OSError, SafetensorError) as error:
        raise HeadsError(f"cannot read the exit heads {path}: {error}") from error
    file_format = metadata.get("format")
    if file_format != FORMAT or metadata.get("kind") not in HEAD_KINDS:
        raise HeadsError(
            f"{path}: expected a heads file of format {FORMAT!r}, got {file_format!r}; "
            "train heads with 'fleet heads train'"
        )
    return metadata, tensors


def load_head(
    path: Path, kind: HeadKind, model: Any, layer: int, tensors: Mapping[str, Tensor]
) -> ExitHead:
    """Return the head of one exit from the tensors of a heads file."""
    prefix = f"exit.{layer}."
    names = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    state = {name: tensors[prefix + name] for name in names}
    if not state:
        layers = sorted({int(key.split(".")[1]) for key in tensors})
        raise HeadsError(
            f"{path} has heads for exits {layers}, not for {layer}; train one or choose other exits"
        )
    intermediate = state["mlp.up.weight"].shape[0] if kind == "mlp" else 0
    head = new_head(kind, model, layer, intermediate)
    try:
        head.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise HeadsError(
            f"{path}: the head of exit {layer} does not fit the model: {reason}"
        ) from None
    return head.requires_grad_(False)
