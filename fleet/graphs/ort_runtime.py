"""ONNX Runtime as this project uses it: threads, provider, graphs, and its errors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import onnxruntime as ort

from fleet.bundles.instruction_sets import covers, instruction_sets
from fleet.bundles.manifest import Manifest
from fleet.errors import BundleError, ConfigError
from fleet.protocol.types import Provider
from fleet.utils.memory_release import release_mapped_pages

CUDA: Final = "CUDAExecutionProvider"
CPU: Final = "CPUExecutionProvider"
UNKNOWN_TOOLS: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True)
class Runtime:
    """The settings for graphs. `auto` is CUDA where the installed ONNX Runtime offers it, else the
    CPU.
    """

    num_threads: int = 1
    provider: Provider = "auto"

    @property
    def providers(self) -> list[str]:
        """The execution providers, the preferred one first; raise ConfigError when it is not
        installed.
        """
        return choose_providers(self.provider, ort.get_available_providers())


def choose_providers(setting: Provider, available: Collection[str]) -> list[str]:
    """Return the execution providers for a setting, of the `available` ones; the CPU runs what CUDA
    cannot.

    Raises:
        ConfigError: the setting is CUDA, which is not available.
    """
    if setting == "cuda" and CUDA not in available:
        raise ConfigError(
            f"provider 'cuda' needs {CUDA}, ONNX Runtime {ort.__version__} here offers "
            f"{', '.join(available)}; run: pip uninstall -y onnxruntime && "
            "pip install 'cecollm-fleet[edge-gpu]', or set provider to 'cpu'"
        )
    return [CUDA, CPU] if setting != "cpu" and CUDA in available else [CPU]


def load_session(
    path: Path, runtime: Runtime, tools: Mapping[str, str] = UNKNOWN_TOOLS
) -> ort.InferenceSession:
    """Load a graph. `tools` are the versions that made it, from the manifest.

    The threads spin between the operators of a run, where latency counts, and sleep when it ends: a
    device that waits uses no CPU. Each graph has threads of its own, because ONNX Runtime's shared
    pool has no such end (`force_spinning_stop` is for pools of one session).

    Raises:
        BundleError: ONNX Runtime cannot load it.
        ConfigError: the provider is not installed, or does not start.
    """
    providers = runtime.providers
    options = ort.SessionOptions()
    options.intra_op_num_threads = runtime.num_threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = ort.InferenceSession(path, options, providers=providers)
    except Exception as error:  # noqa: BLE001  ONNX Runtime's errors have no common type
        made_with = tools.get("onnxruntime", "an unknown version")
        raise BundleError(
            f"ONNX Runtime {ort.__version__} cannot load {path}, which was made with {made_with}: "
            f"{' '.join(str(error).split())}; if that is newer, upgrade ONNX Runtime, "
            "else export or copy the bundle again"
        ) from None
    # ONNX Runtime itself continues without CUDA.
    if runtime.provider == "cuda" and CUDA not in session.get_providers():
        raise ConfigError(
            f"{CUDA} is installed but does not start: check the driver and the CUDA and cuDNN "
            "libraries, or set provider to 'cpu'"
        )
    # ONNX Runtime has packed most of the weights into memory of its own, and keeps its mappings.
    release_mapped_pages(path.with_name(f"{path.name}.data"))
    return session


def check_instruction_set(manifest: Manifest) -> None:
    """Check that this machine has the instructions that the bundle's graphs were made for.

    Raises:
        BundleError: it does not.
    """
    required = manifest.instruction_set
    available = instruction_sets()
    if not covers(available, required):
        offered = ", ".join(available) or "none that we know"
        raise BundleError(
            f"bundle {manifest.bundle_id} is for {required}, this machine offers {offered}; "
            "export it for one of these, or use a preset that runs on any machine"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of NumPy or ONNX Runtime means too little memory."""
    text = str(error)
    return (
        isinstance(error, MemoryError) or "Failed to allocate memory" in text or "bad_alloc" in text
    )
