"""llama.cpp built for this processor as a driver of the benchmark: its server, on the CPU alone.

    python -m benchmarks.drivers.llama_native --model FILE.gguf --threads N --build FOLDER

The folder is that of `benchmarks.native_llama`. Each `--option` is one more argument of its server,
such as `--option=--spec-type=ngram-simple`, which drafts by n-grams.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.error import URLError
from urllib.request import urlopen

from benchmarks.drivers.llama_server import NUM_POSITIONS, LlamaServer
from benchmarks.drivers.protocol import serve_lines

HOST: Final = "127.0.0.1"
START_TIMEOUT_S: Final = 120.0


def server_command(
    build: Path, model: Path, num_threads: int, port: int, options: Sequence[str]
) -> list[str]:
    """Return the command of a server with one slot."""
    command = [str(build / "llama-server"), "--model", str(model), "--host", HOST]
    command += ["--port", str(port), "--ctx-size", str(NUM_POSITIONS), "--parallel", "1"]
    command += ["--threads", str(num_threads), "--threads-batch", str(num_threads)]
    command += ["--cache-ram", "0", "--offline", "--log-disable"]
    return command + [part for option in options for part in option.split("=", 1)]


@contextmanager
def running_server(
    build: Path, model: Path, num_threads: int, options: Sequence[str]
) -> Iterator[LlamaServer]:
    """Run a server in the block."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    facts = json.loads((build / "build.json").read_text(encoding="utf-8"))
    command = server_command(build, model, num_threads, port, options)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    try:
        url = f"http://{HOST}:{port}"
        wait_healthy(process, url)
        yield LlamaServer(url, facts["source"], facts["instruction_sets"])
    finally:
        process.terminate()
        process.wait()


def wait_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    """Wait until the server has loaded its model; raise RuntimeError if it ends or is late."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"llama-server ended with status {process.returncode}")
        try:
            with urlopen(f"{url}/health", timeout=1):
                return
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.05)
    raise RuntimeError(f"llama-server was not ready within {START_TIMEOUT_S:g} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--option", action="append", default=[])
    arguments = parser.parse_args()
    with running_server(
        arguments.build, arguments.model, arguments.threads, arguments.option
    ) as server:
        serve_lines(lambda: server)
