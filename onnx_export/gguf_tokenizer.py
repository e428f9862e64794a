"""The tokenizer of a GGUF file whose pieces are SentencePiece's BPE, as of Gemma.

transformers reads Gemma's pieces as a unigram model. Their scores are ranks of merges, not
log-probabilities, so it splits common words into rare pieces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE, Unigram
from transformers.convert_slow_tokenizer import generate_merges

SENTENCEPIECE_BPE: Final = "llama"
"""The name in GGUF files of a tokenizer by SentencePiece's BPE."""
SPACE: Final = "\u2581"


class GgufPiece(NamedTuple):
    """A piece with spaces as in SentencePiece, its score and its type."""

    text: str
    score: float
    kind: int


def correct_gguf_tokenizer(backend: Tokenizer, path: Path) -> None:
    """Give `backend` the BPE of a GGUF file that transformers has read as a unigram model."""
    if not isinstance(backend.model, Unigram):
        return
    fields = GGUFReader(path).fields
    if fields["tokenizer.ggml.model"].contents() != SENTENCEPIECE_BPE:
        return
    pieces = read_pieces(fields)
    backend.model = merging_model(pieces)
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    add_whole_pieces(backend, pieces)


def read_pieces(fields: dict[str, Any]) -> list[GgufPiece]:
    """Return the pieces in the order of their ids."""
    texts = fields["tokenizer.ggml.tokens"].contents()
    scores = fields["tokenizer.ggml.scores"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    rows = zip(texts, scores, kinds, strict=True)
    return [GgufPiece(text.replace(" ", SPACE), score, kind) for text, score, kind in rows]


def merging_model(pieces: list[GgufPiece]) -> BPE:
    """Return the BPE that merges to the piece with the best score first."""
    vocabulary = {piece.text: token_id for token_id, piece in enumerate(pieces)}
    normal = {piece.text: piece.score for piece in pieces if piece.kind == TokenType.NORMAL}
    unknown = [piece.text for piece in pieces if piece.kind == TokenType.UNKNOWN]
    return BPE(
        vocab=vocabulary,
        merges=generate_merges(normal, normal.items()),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=True,
    )


def add_whole_pieces(backend: Tokenizer, pieces: list[GgufPiece]) -> None:
    """Add the pieces that are found in a text before any merge."""
    control = [piece.text for piece in pieces if piece.kind == TokenType.CONTROL]
    defined = [piece.text for piece in pieces if piece.kind == TokenType.USER_DEFINED]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    # Normalized, because runs of spaces are found after spaces were replaced.
    backend.add_tokens([AddedToken(text, normalized=True) for text in defined])
