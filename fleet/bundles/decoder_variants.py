"""Caps and angles of transformers' decoders, for the export and a worker; it imports no PyTorch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, Final, TypeAlias

FULL: Final = "full_attention"
LOCAL: Final = "sliding_attention"
Angles: TypeAlias = tuple[Any, Any]
Rotary: TypeAlias = Callable[..., Angles]


def bounded(values: Any, cap: float | None) -> Any:
    """Bound a tensor smoothly to (-cap, cap), or return it if there is no cap.

    Gemma 2 bounds its logits and its attention's scores (arXiv 2408.00118, section 2).
    """
    return values if cap is None else (values / cap).tanh() * cap


def rotary_embeddings(decoder: Any) -> dict[str, Rotary]:
    """Return the functions of a decoder that compute angles, by the kind of layers they are for.

    Gemma 3 has two kinds: in transformers 4 as two modules, in transformers 5 as one that takes the
    kind.
    """
    local = getattr(decoder, "rotary_emb_local", None)
    if local is not None:
        return {FULL: decoder.rotary_emb, LOCAL: local}
    kinds = getattr(decoder.rotary_emb, "layer_types", None)
    if kinds is None:
        return {FULL: decoder.rotary_emb}
    return {kind: partial(decoder.rotary_emb, layer_type=kind) for kind in kinds}


def rotate_positions(decoder: Any, hidden: Any, positions: Any) -> dict[str, Angles]:
    """Return the angles of positions [1, s], by the kind of layers they are for.

    The angles are cosines and sines, each [1, s, d].
    """
    return {kind: rotary(hidden, positions) for kind, rotary in rotary_embeddings(decoder).items()}


def angle_arguments(layer: Any, angles: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a decoder's layer with its angles, chosen from those by kind."""
    is_local = LOCAL in angles and layer.self_attn.sliding_window is not None
    return dict.fromkeys(angle_names(type(layer).forward), angles[LOCAL if is_local else FULL])


@cache
def angle_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the arguments with angles of a layer's function `forward`.

    Gemma 3's layers have two in transformers 4, of which a layer uses one.
    """
    names = inspect.signature(forward).parameters
    return tuple(name for name in names if name.startswith("position_embeddings"))


def restore_rotary_embeddings(decoder: Any) -> None:
    """Compute the angles of a decoder that is on the meta device: no checkpoint has them."""
    for name in ("rotary_emb", "rotary_emb_local"):
        rotary = getattr(decoder, name, None)
        if rotary is not None:
            setattr(decoder, name, type(rotary)(config=rotary.config))


def layer_output(output: Any) -> Any:
    """Return the hidden states that a layer returns, in some models as the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output
