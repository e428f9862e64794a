"""Run a device on an emulated ARM processor, and compare its tokens with those of this machine.

Run it with ``make arm64 ARGS="--cpu cortex-a72"``, on Debian or Ubuntu on x86-64. It downloads
100 MB, uses 400 MB of TMPDIR, which it removes, and takes nine minutes or more.

The device is `edge-agent run` from this checkout's wheel, with the wheels of its packages for ARM,
in Debian's Python for ARM under qemu-user. It answers prompts with the default bundle, alone and
with a worker on this machine, as a device that runs here does. At the first different token of an
answer both engines print their candidates, and the exit status is 1.

Neither a chroot nor binfmt_misc is in use: packages are extracted without their scripts, and qemu
looks up absolute paths in the root first.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from benchmarks.engines import EngineProcess
from edge_agent.engine.tokenizer import ChatTokenizer
from fleet.bundles.manifest import Bundle
from fleet.cli.demo import APP, HOST, PROMPTS
from fleet.protocol.access import Role
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest
from fleet.server.child_process import Child, running
from fleet.server.home import FleetConfig, FleetHome
from fleet.server.supervisor import fleet_processes, resolve_bundle
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from fleet.utils.cli_runtime import run_command
from fleet.utils.host_address import free_port

ROOT: Final = Path(__file__).resolve().parent.parent
SUITE: Final = "bookworm"
PYTHON: Final = "3.11"
"""The Python of `SUITE`."""

DEBIAN_PACKAGES: Final = "python3,libgomp1,libstdc++6"
PLATFORMS: Final = tuple(
    f"manylinux{glibc}_aarch64" for glibc in ("_2_28", "_2_27", "_2_17", "2014")
)
SAME_VERSIONS: Final = ("numpy", "onnxruntime", "tokenizers")
"""Packages in the version of this machine, so that only the processor differs."""

CPU_PARTS: Final = {"cortex-a72": "0xd08", "cortex-a76": "0xd0b"}
"""Processors of the Raspberry Pi 4 and 5, and the numbers by which ONNX Runtime knows them."""

HERE: Final = (sys.executable,)
WAIT_S: Final = 900.0
CASES: Final = (
    (Mode.STANDALONE, 0),
    (Mode.STANDALONE, 1),
    (Mode.COLLABORATIVE, 0),
    (Mode.VERIFIED, 1),
)
"""Modes, and indexes of the demo's prompts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cpu", choices=CPU_PARTS, default="cortex-a76")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--bundle", type=Path, help="default: the default model's")
    arguments = parser.parse_args()
    bundle = Bundle.load(resolve_bundle(arguments.bundle, print), ("edge", "tokenizer"))
    with tempfile.TemporaryDirectory(prefix="arm64-") as name:
        emulated = emulated_python(Path(name), arguments.cpu)
        num_different = compare(Path(name), bundle, emulated, arguments.tokens)
    if num_different:
        sys.exit(f"{num_different} of {len(CASES)} answers differ; see above")


def emulated_python(folder: Path, cpu: str) -> list[str]:
    """Make a root with Python and the device's packages; return the command of this Python."""
    root = folder / "root"
    packages = folder / "packages"
    print(f"==> Debian's Python for ARM ({SUITE})", flush=True)
    mode = "root" if os.geteuid() == 0 else "fakechroot"
    make_root = ["mmdebstrap", "--quiet", f"--mode={mode}", "--variant=extract"]
    make_root += ["--architectures=arm64", "--skip=check/qemu", f"--include={DEBIAN_PACKAGES}"]
    run(*make_root, SUITE, root)
    # ONNX Runtime reads the processor here, and crashes on that of an x86-64 machine.
    (root / "proc").mkdir(exist_ok=True)
    lines = "processor: 0", "CPU implementer: 0x41", "CPU architecture: 8"
    cpuinfo = "\n".join([*lines, "CPU variant: 0x0", f"CPU part: {CPU_PARTS[cpu]}", ""])
    (root / "proc" / "cpuinfo").write_text(cpuinfo, encoding="utf-8")
    install_packages(packages, folder)
    emulator = ["qemu-aarch64-static", "-cpu", cpu, "-L", str(root), "-E", f"HOME={folder}"]
    python = root / "usr" / "bin" / f"python{PYTHON}"
    return [*emulator, "-E", f"PYTHONPATH={packages}", str(python)]


def install_packages(packages: Path, folder: Path) -> None:
    """Install this checkout's wheel and the packages of a device for ARM, without running any."""
    print("==> the device's packages for ARM", flush=True)
    pip = [sys.executable, "-m", "pip", "-qq"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in SAME_VERSIONS]
    install = [*pip, "install", "--no-compile", "--no-warn-conflicts"]
    install += ["--target", str(packages), "--only-binary=:all:", "--implementation=cp"]
    install += [f"--python-version={PYTHON}", *(f"--platform={name}" for name in PLATFORMS)]
    run(*install, f"{wheel}[edge]", *versions)


def run(*command: str | Path) -> None:
    """Run a command; end the script when it fails."""
    if status := subprocess.call(command):
        sys.exit(f"{command[0]} failed (exit status {status}); see above")


def compare(folder: Path, bundle: Bundle, emulated: list[str], num_tokens: int) -> int:
    """Compare the answers of both devices; return the number of answers that differ."""
    requests = [
        PromptRequest(prompt=PROMPTS["chat"][i], mode=mode, max_new_tokens=num_tokens)
        for mode, i in CASES
    ]
    devices = {"x86-64": HERE, "arm64": emulated}
    ports = {"port": free_port(HOST), "service_port": free_port(HOST)}
    home = FleetHome.create(
        folder / "fleet", FleetConfig(host=HOST, bundle=str(bundle.folder), **ports)
    )
    for name in devices:
        home.enroll(name, Role.DEVICE, folder / name)
    app = home.enroll(APP, Role.APP, folder / APP, allow=tuple(devices))
    with ExitStack() as stack:
        fleet = stack.enter_context(fleet_processes(home))
        client = PromptClient(stack.enter_context(MqttTransport.connect(app)))
        for worker in fleet.workers:
            worker.wait_ready()
        for name, program in devices.items():
            # -P: from the wheel, not from the current folder.
            arguments = ["-P", "-m", "edge_agent", "run", str(folder / name), "--threads", "1"]
            device = stack.enter_context(running(Child(f"device {name}", arguments, program)))
            print(f"==> {device.wait_ready(WAIT_S)}", flush=True)
        different = [
            request for request in requests if not is_same(client, request, bundle, devices)
        ]
    return len(different)


def is_same(
    client: PromptClient,
    request: PromptRequest,
    bundle: Bundle,
    devices: dict[str, Sequence[str]],
) -> bool:
    """Let both devices answer, and report the tokens and their first difference."""
    here, there = (ask(client, name, request) for name in devices)
    if here == there:
        print(f"{request.mode}: the same {len(here)} tokens", flush=True)
        return True
    pairs = enumerate(zip(here, there, strict=False))
    first = next((i for i, pair in pairs if len({*pair}) > 1), min(len(here), len(there)))
    print(f"{request.mode}: different from token {first + 1} on", flush=True)
    compare_engines(bundle, request, here, devices)
    return False


def ask(client: PromptClient, device: str, request: PromptRequest) -> list[int]:
    """Return the tokens of a device's answer."""
    replies = list(client.ask(device, request, WAIT_S))
    token_ids = [reply.token_id for reply in replies if reply.token_id is not None]
    usage = replies[-1].usage
    print(f"{request.mode} {device}: {token_ids} {usage.sources if usage else ''}", flush=True)
    return token_ids


def compare_engines(
    bundle: Bundle, request: PromptRequest, answer: list[int], devices: dict[str, Sequence[str]]
) -> None:
    """Report the candidates of both engines where they differ along the answer given here."""
    prompt = ChatTokenizer(bundle).encode(request)
    here, there = (
        candidates(program, bundle, prompt=prompt, answer=answer) for program in devices.values()
    )
    pairs = list(zip(here, there, strict=True))
    different = [i for i, (ours, theirs) in enumerate(pairs) if ours[0][0] != theirs[0][0]]
    print(f"  the engines differ at {len(different)} of {len(pairs)} positions of the first answer")
    for i in different:
        print(f"  token {i + 1}: " + ", ".join(map(str, zip(devices, pairs[i], strict=True))))


def candidates(program: Sequence[str], bundle: Bundle, **text: list[int]) -> list[Any]:
    """Return an engine's best tokens and their log-probabilities at each position of a text."""
    driver = ["-m", "benchmarks.drivers.ours", "--model", str(bundle.folder), "--threads", "1"]
    with EngineProcess(program[0], [*program, *driver]) as engine:
        found: list[Any] = engine.ask("candidates", **text)["candidates"]
        return found


if __name__ == "__main__":
    run_command("arm64", main)
