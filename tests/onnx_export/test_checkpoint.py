"""Files of a checkpoint that transformers leaves out without a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleet.errors import ConfigError
from onnx_export.bundle import load_model_and_tokenizer
from onnx_export.config import ExportConfig
from tests.tiny import make_tiny_checkpoint

MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"eos_token_id": [0, 5],}', "is not usable: "),
        (b'{"eos_token_id": 5, "a": "caf\xe9"}', "is not in UTF-8"),
        (MARK + b'{"eos_token_id": [0, 5]}', "begins with a byte order mark"),
        (b"[]", "is not usable: "),
    ],
)
def test_end_tokens_that_cannot_be_read_are_refused(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model")
    (checkpoint / "generation_config.json").write_bytes(content)
    config = ExportConfig(out=tmp_path / "bundle", exits=(2,), model=str(checkpoint))
    with pytest.raises(ConfigError, match=rf"generation_config\.json {reason}"):
        load_model_and_tokenizer(config, lambda _: None)
