"""The tokenizer of a Gemma in a GGUF file merges pieces as SentencePiece's BPE does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
from gguf import GGUFWriter, TokenType

from onnx_export.checkpoint import load_tokenizer

SPACE: Final = "\u2581"
CONTROL: Final = ("<pad>", "<eos>", "<bos>")
DEFINED: Final = ("\n", "\n\n", "  ", "<b>")
MERGED: Final = ("ca", "pi", "ta", SPACE + "ca", "tal", "pital", SPACE + "capital")
"""Pieces by the order of their merges, the score of a Gemma's pieces."""
LETTERS: Final = (SPACE, *"abcipstl")
PIECES: Final = (
    *((text, TokenType.CONTROL) for text in CONTROL),
    ("<unk>", TokenType.UNKNOWN),
    *((text, TokenType.USER_DEFINED) for text in DEFINED),
    *((f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(256)),
    *((text, TokenType.NORMAL) for text in (*MERGED, *LETTERS)),
)
FIRST_NORMAL: Final = len(PIECES) - len(MERGED) - len(LETTERS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("gguf") / "gemma.gguf"
    write_gemma(path)
    return load_tokenizer(str(path), "gemma")


def write_gemma(path: Path) -> None:
    """Write the sizes and the tokenizer of a tiny Gemma 3, without weights."""
    writer = GGUFWriter(path, "gemma3")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in PIECES])
    writer.add_token_scores([float(min(0, FIRST_NORMAL - i)) for i in range(len(PIECES))])
    writer.add_token_types([kind for _, kind in PIECES])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_a_common_word_is_one_token(tokenizer: Any) -> None:
    assert tokenizer.tokenize("a capital capital") == [
        "a",
        SPACE + "capital",
        SPACE + "capital",
    ]


def test_a_text_starts_with_the_start_token(tokenizer: Any) -> None:
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 2


def test_defined_pieces_are_found_before_merges(tokenizer: Any) -> None:
    pieces = tokenizer.tokenize("a\n\n<b>  capital\n<eos>")
    assert pieces == ["a", "\n\n", "<b>", SPACE + SPACE, "ca", "pital", "\n", "<eos>"]


@pytest.mark.parametrize("text", ["a\n\n  <b>capital", "\tcaf\u00e9 \u65e5", "  a   capital "])
def test_a_text_is_decoded_as_it_was(text: str, tokenizer: Any) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
