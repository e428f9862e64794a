"""Files of a checkpoint that transformers leaves out without a word, or that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleet.errors import ConfigError, ExportError
from fleet.utils.prompt_file import read_prompts
from onnx_export.bundle import load_model_and_tokenizer
from onnx_export.checkpoint import resolve_model
from onnx_export.config import ExportConfig
from onnx_export.heads import read_heads_file
from onnx_export.weights import weight_files
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


@pytest.mark.parametrize("has_rest", [True, False])
def test_an_adapter_is_to_be_merged(tmp_path: Path, has_rest: bool) -> None:
    checkpoint = tmp_path / "model"
    if has_rest:
        make_tiny_checkpoint(checkpoint)
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    config = ExportConfig(out=tmp_path / "bundle", exits=(2,), model=str(checkpoint))
    with pytest.raises(ExportError, match=r"it is an adapter .* of another model; merge it"):
        load_model_and_tokenizer(config, lambda _: None)


@pytest.mark.parametrize("name", ["no/such/", "./model", "/no/such", "here/model", "a b"])
def test_a_folder_that_is_missing_is_no_name_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    config = ExportConfig(out=tmp_path / "bundle", exits=(2,), model=name)
    with pytest.raises(ExportError, match="there is no such file or folder"):
        load_model_and_tokenizer(config, lambda _: None)
    assert capfd.readouterr().err == ""


def test_a_model_below_the_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/models/mine") == str(tmp_path / "models" / "mine")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_clone_without_git_lfs_is_told_to_pull(tmp_path: Path, name: str) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model")
    (checkpoint / name).write_bytes(POINTER)
    (checkpoint / "pytorch_model.bin").write_bytes(POINTER)  # which is not needed
    config = ExportConfig(out=tmp_path / "bundle", exits=(2,), model=str(checkpoint))
    words = rf"model/{name} is a pointer of Git LFS, not the file; run 'git lfs pull'"
    with pytest.raises(ConfigError, match=words):
        load_model_and_tokenizer(config, lambda _: None)


def test_a_pointer_to_shards_heads_or_prompts_is_no_content(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model")
    (checkpoint / "model.safetensors").unlink()
    names = ("model/model.safetensors.index.json", "heads.safetensors", "prompts.txt")
    pointers = [tmp_path / name for name in names]
    for path in pointers:
        path.write_bytes(POINTER)
    with pytest.raises(ConfigError, match="is a pointer of Git LFS"):
        weight_files(str(checkpoint))
    with pytest.raises(ConfigError, match="is a pointer of Git LFS"):
        read_heads_file(pointers[1])
    with pytest.raises(ConfigError, match="is a pointer of Git LFS"):
        read_prompts(pointers[2])
