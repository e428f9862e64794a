"""Exit heads: what turns a block's output into what the model's own LM head expects."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fleet.errors import ConfigError, HeadsError

FORMAT: Final = "cecollm-exit-heads/2"
SHIPPED_HEADS: Final = Path(__file__).parent / "data" / "smollm2-135m-instruct.heads.safetensors"
HeadKind = Literal["shared", "linear", "mlp", "block"]
HEAD_KINDS: Final[tuple[str, ...]] = get_args(HeadKind)


class RmsNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467): x [..., hidden] -> [..., hidden], same dtype."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class GatedMlp(nn.Module):
    """SwiGLU (arXiv 2002.05202) whose output starts at zero: x [..., hidden] -> [..., hidden]."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, intermediate, bias=False)
        self.up = nn.Linear(hidden, intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return out


class ExitHead(nn.Module):
    """Turns hidden states after some layers into what the model's LM head expects.

    ``forward``: hidden_states [..., hidden] float -> exit_hidden [..., hidden] float. Kinds, each with the norm first:

    - ``shared``: nothing else; with the model's final norm this is LayerSkip's exit (arXiv 2404.16710);
    - ``linear``: a matrix, which starts as the identity;
    - ``mlp``: a matrix plus a gated MLP, which starts as zero;
    - ``block``: `layer`, a decoder layer of the model's own class with a KV cache of its own, then norm and matrix.
      Who runs the head runs `layer` first, as it runs the model's layers; ``forward`` takes what comes out of it.
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
    """An untrained head for `model` after `exit_layer` layers; a block starts as a copy of the model's last layer.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind not in HEAD_KINDS:
        raise ConfigError(
            f"unknown kind of exit head {kind!r}: expected one of {', '.join(HEAD_KINDS)}"
        )
    norm = model.model.norm
    layer = None
    if kind == "block":
        layer = copy.deepcopy(model.model.layers[-1]).float()
        layer.self_attn.layer_idx = exit_layer
    return ExitHead(
        kind, norm.weight.detach(), float(norm.variance_epsilon), layer, intermediate
    ).eval()


def shared_heads(model: Any, exits: tuple[int, ...]) -> dict[int, ExitHead]:
    """Heads with nothing to train: every exit uses the model's final norm."""
    return {layer: new_head("shared", model, layer).requires_grad_(False) for layer in exits}


def fingerprint(model: Any) -> str:
    """SHA-256, in hex, of the weights that an exit head builds on: the final norm and the LM head, as float32."""
    digest = hashlib.sha256()
    for weight in (model.model.norm.weight, model.lm_head.weight):
        digest.update(weight.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def heads_digest(heads: Mapping[int, ExitHead]) -> str:
    """SHA-256, in hex, of heads as they are stored: what a calibration holds for."""
    digest = hashlib.sha256()
    for layer, head in sorted(heads.items()):
        for name, tensor in head.state_dict().items():
            digest.update(f"{layer} {name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.to(torch.float16).contiguous().numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class HeadsFile:
    """A file of heads: their kind, the model they were made for, and how (free text by key)."""

    heads: Mapping[int, ExitHead]
    kind: HeadKind
    fingerprint: str
    made_by: Mapping[str, str] = field(default_factory=dict)


def save_heads(file: HeadsFile, path: Path) -> None:
    """Writes heads by exit layer as one FP16 safetensors file, whole or not at all."""
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
    """Heads for `exits` of `model` out of a file of :func:`save_heads`, in float32.

    Raises:
        HeadsError: the file is no heads file, was made for another model, or lacks one of the exits.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise HeadsError(f"cannot read the exit heads {path}: {error}") from error
    if metadata.get("format") != FORMAT or metadata.get("kind") not in HEAD_KINDS:
        raise HeadsError(
            f"{path}: expected a heads file of format {FORMAT!r}, got {metadata.get('format')!r}; "
            "train heads with 'fleet heads train'"
        )
    kind: Any = metadata["kind"]
    expected = fingerprint(model)
    if metadata.get("model") != expected:
        raise HeadsError(
            f"{path}: the heads were trained for another model (its hash is {str(metadata.get('model'))[:12]}, "
            f"this model's {expected[:12]}); train heads for this one with 'fleet heads train'"
        )
    heads = {}
    for layer in exits:
        prefix = f"exit.{layer}."
        state = {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        if not state:
            known = sorted({int(key.split(".")[1]) for key in tensors})
            raise HeadsError(
                f"{path} has heads for exits {known}, not for {layer}; train one or choose other exits"
            )
        intermediate = state["mlp.up.weight"].shape[0] if kind == "mlp" else 0
        head = new_head(kind, model, layer, intermediate)
        try:
            head.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise HeadsError(
                f"{path}: the head of exit {layer} does not fit the model: {reason}"
            ) from None
        heads[layer] = head.requires_grad_(False)
    return HeadsFile(heads, kind, expected, json.loads(metadata.get("made_by", "{}")))
