"""A llama.cpp built for this machine's processor, next to the wheel that pip gives.

Its source is the one in the source distribution of llama-cpp-python. `build.json` in the folder of
the build has the options, and the instruction sets that llama.cpp itself reports. A build with AMX
ends in an illegal instruction on a virtual machine that grants no tiles, so AMX is off.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from benchmarks.environments import call, environment
from fleet.bundles.instruction_sets import instruction_sets, processor_name
from fleet.errors import FleetError
from onnx_export.atomic_folder import staged
from onnx_export.checkpoint import cache_folder

SOURCE: Final = "llama-cpp-python==0.3.36"
BUILD_TOOLS: Final = ("cmake==4.4.5", "ninja==1.13.2")
PROGRAMS: Final = ("llama-server", "llama-quantize")
OPTIONS: Final = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_COMMON=ON",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
NO_AMX: Final = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
FILE_TYPES: Final = ("Q4_0", "IQ4_NL", "Q8_0")
BUILD_FILE: Final = "build.json"
BUILD_TIMEOUT_S: Final = 3 * 3600.0
START_TIMEOUT_S: Final = 60.0
FEATURE: Final = re.compile(r"(\w+) = 1\b")

Progress = Callable[[str], None]


def native_build(progress: Progress) -> Path:
    """Return the folder of the build; the first call makes it, in the user's cache.

    Raises:
        FleetError: the source cannot be fetched, or this machine cannot compile it.
    """
    folder = cache_folder() / "bench" / f"llama-native-{build_key()}"
    if not folder.exists():
        with staged(folder, progress) as partial, tempfile.TemporaryDirectory() as work:
            tools = environment(Path(work) / "tools", BUILD_TOOLS, progress)
            source = fetch_source(tools, Path(work))
            progress("building llama.cpp for this processor (once, 15 minutes or more)")
            compile_programs(source, Path(work) / "build", tools)
            for name in PROGRAMS:
                shutil.copy2(Path(work) / "build" / "bin" / name, partial / name)
            write_build_file(partial)
    return folder


def build_key() -> str:
    """Return a hash of the source, the options and this machine's processor."""
    processor = (processor_name(), *instruction_sets(), platform.machine())
    whole = (SOURCE, *BUILD_TOOLS, *OPTIONS, *compiler_flags(), *processor)
    return hashlib.sha256(" ".join(whole).encode()).hexdigest()[:16]


def compiler_flags() -> tuple[str, ...]:
    """Return the flags of the compilers, in addition to CMake's."""
    return tuple(NO_AMX.split()) if platform.machine() == "x86_64" else ()


def fetch_source(python: Path, folder: Path) -> Path:
    """Return the folder of llama.cpp in the unpacked source distribution."""
    pip = [str(python), "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(folder)]
    call("fetch the source of llama.cpp", [*pip, *options, SOURCE], BUILD_TIMEOUT_S)
    (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"


def compile_programs(source: Path, build: Path, tools: Path) -> None:
    """Compile the programs into `build`; `tools` is the Python that has CMake and Ninja."""
    flags = " ".join(compiler_flags())
    variables = {"CFLAGS": flags, "CXXFLAGS": flags}
    cmake = [str(tools), "-m", "cmake"]
    ninja = f"-DCMAKE_MAKE_PROGRAM={tools.parent / 'ninja'}"
    configure = [*cmake, "-G", "Ninja", ninja, "-S", str(source), "-B", str(build), *OPTIONS]
    call("configure llama.cpp", configure, BUILD_TIMEOUT_S, variables)
    compile_all = [*cmake, "--build", str(build), "--target", *PROGRAMS]
    call("compile llama.cpp", compile_all, BUILD_TIMEOUT_S, variables)


def write_build_file(folder: Path) -> None:
    """Write the facts about a build next to its programs."""
    facts = {
        "source": SOURCE,
        "options": [*OPTIONS, *compiler_flags()],
        "instruction_sets": built_for(folder / "llama-server"),
    }
    (folder / BUILD_FILE).write_text(json.dumps(facts), encoding="utf-8")


def built_for(server: Path) -> list[str]:
    """Return the instruction sets that a build reports; it ends, since its model is missing."""
    command = [str(server), "--log-verbosity", "5", "--model", os.devnull]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False
    )
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "system_info" in line]
    if not lines:
        raise FleetError(
            "the native llama.cpp reports no instruction sets; build it again, or pass --no-peers"
        )
    return [str(name) for name in FEATURE.findall(lines[0])]


def build_facts(folder: Path) -> dict[str, Any]:
    """Return the facts about a build: its source, options and instruction sets."""
    facts: dict[str, Any] = json.loads((folder / BUILD_FILE).read_text(encoding="utf-8"))
    return facts


def requantised(gguf: Path, file_type: str, build: Path, progress: Progress) -> Path:
    """Return a GGUF file of another type, made once from `gguf` by llama.cpp's own program."""
    folder = gguf.parent / f"{gguf.stem}-{file_type}-{build.name}"
    if not folder.exists():
        with staged(folder, progress) as partial:
            progress(f"quantising the model's file to {file_type}")
            command = [str(build / "llama-quantize"), "--allow-requantize", str(gguf)]
            target = [str(partial / "model.gguf"), file_type]
            call(f"make a file of type {file_type}", [*command, *target], BUILD_TIMEOUT_S)
    return folder / "model.gguf"
