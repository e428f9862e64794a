"""Exit heads: a norm and a small trained adapter on a block's output, in front of the model's own LM head."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fleet.errors import HeadsError

FORMAT = "cecollm-exit-heads/1"
SHIPPED_HEADS = Path(__file__).parent / "data" / "smollm2-135m-instruct.heads.safetensors"


class RmsNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467): x [..., hidden] -> [..., hidden], same dtype."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class ExitHead(nn.Module):
    """Turns hidden states after `exit_layer` layers into what the model's LM head expects.

    ``forward``: hidden_states [..., hidden] float -> exit_hidden [..., hidden] float. It starts as the model's
    final norm followed by the identity, so an untrained head is the "logit lens" of that layer.
    """

    def __init__(self, norm_weight: Tensor, eps: float) -> None:
        super().__init__()
        self.norm = RmsNorm(norm_weight, eps)
        hidden = norm_weight.shape[0]
        self.adapter = nn.Linear(hidden, hidden, bias=False, dtype=norm_weight.dtype)
        with torch.no_grad():
            self.adapter.weight.copy_(torch.eye(hidden, dtype=norm_weight.dtype))

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.adapter(self.norm(hidden_states))
        return out


def shared_heads(exits: tuple[int, ...], norm_weight: Tensor, eps: float) -> dict[int, ExitHead]:
    """Untrained heads: every exit uses the model's final norm."""
    return {layer: ExitHead(norm_weight.detach().float(), eps).eval().requires_grad_(False) for layer in exits}


def save_heads(heads: dict[int, ExitHead], path: Path) -> None:
    """Writes heads by exit layer as one FP16 safetensors file."""
    tensors = {
        f"exit.{layer}.{name}": tensor.to(torch.float16).contiguous()
        for layer, head in heads.items()
        for name, tensor in head.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": FORMAT})
    path.chmod(0o644)  # safetensors makes it readable to its owner alone


def load_heads(path: Path, exits: tuple[int, ...], hidden: int, eps: float) -> dict[int, ExitHead]:
    """Heads for `exits` out of a file of :func:`save_heads`, in float32.

    Raises:
        HeadsError: the file is no heads file, lacks one of the exits, or is for another hidden size.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise HeadsError(f"cannot read the exit heads {path}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise HeadsError(f"{path}: expected a heads file of format {FORMAT!r}, got {metadata.get('format')!r}")
    heads = {}
    for layer in exits:
        prefix = f"exit.{layer}."
        state = {key.removeprefix(prefix): value.float() for key, value in tensors.items() if key.startswith(prefix)}
        if not state:
            known = sorted({int(key.split(".")[1]) for key in tensors})
            raise HeadsError(f"{path} has heads for exits {known}, not for {layer}; train one or choose other exits")
        if state["norm.weight"].shape != (hidden,):
            raise HeadsError(
                f"{path}: exit {layer} is for hidden size {tuple(state['norm.weight'].shape)}, the model has {hidden}"
            )
        head = ExitHead(state["norm.weight"], eps)
        head.load_state_dict(state)
        heads[layer] = head.eval().requires_grad_(False)
    return heads
