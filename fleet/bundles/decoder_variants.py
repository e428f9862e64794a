"""Caps and angles of transformers' decoders, for the export and a worker; it imports no PyTorch."""

from __future__ import annotations

from typing import Any


def bounded(values: Any, cap: float | None) -> Any:
    """Bound a tensor smoothly to (-cap, cap), or return it if there is no cap.

    Gemma 2 bounds its logits and its attention's scores (arXiv 2408.00118, section 2).
    """
    return values if cap is None else (values / cap).tanh() * cap


def rotary_embeddings(decoder: Any) -> dict[str, Any]:
    """Return a decoder's rotary embeddings by the argument of its layers that takes their result.

    Gemma 3 has one more, for layers with a window.
    """
    local = getattr(decoder, "rotary_emb_local", None)
    if local is None:
        return {"position_embeddings": decoder.rotary_emb}
    return {"position_embeddings_global": decoder.rotary_emb, "position_embeddings_local": local}


def rotate_positions(decoder: Any, hidden: Any, positions: Any) -> dict[str, tuple[Any, Any]]:
    """Return the arguments of a decoder's layers with the angles of positions [1, s].

    The angles are cosines and sines, each [1, s, d].
    """
    return {name: rotary(hidden, positions) for name, rotary in rotary_embeddings(decoder).items()}


def restore_rotary_embeddings(decoder: Any) -> None:
    """Compute the angles of a decoder that is on the meta device: no checkpoint has them."""
    for name in ("rotary_emb", "rotary_emb_local"):
        rotary = getattr(decoder, name, None)
        if rotary is not None:
            setattr(decoder, name, type(rotary)(config=rotary.config))


def layer_output(output: Any) -> Any:
    """Return the hidden states that a layer returns, in some models as the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output
