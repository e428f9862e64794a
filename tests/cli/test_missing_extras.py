"""Commands in an environment that lacks an extra: one line that names the extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fleet.bundles.manifest import Bundle
from fleet.protocol.access import Role
from fleet.server.home import FleetConfig, FleetHome
from tests.brokers import free_port

TIMEOUT_S = 120
WITHOUT = "import sys; sys.modules[sys.argv.pop(1)] = None; from {}.cli import main; main()"


def run_without(
    module: str, *arguments: str, package: str = "fleet"
) -> subprocess.CompletedProcess[str]:
    """Run the command of a package in a process that cannot import `module`."""
    command = [sys.executable, "-c", WITHOUT.format(package), module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Path:
    """A fleet whose processes do not run."""
    config = FleetConfig(
        host="127.0.0.1", port=free_port(), bundle=str(tiny_bundle.folder), service_port=0
    )
    return FleetHome.create(tmp_path_factory.mktemp("fleet"), config).folder


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("sqlalchemy", "server", ("stats",)),
        ("sqlalchemy", "server", ("config", "set", "--all", "max_draft=4")),
        ("sqlalchemy", "server", ("server",)),
        ("matplotlib", "plots", ("stats", "--plot", "stats.svg")),
    ],
)
def test_a_command_names_the_extra_that_it_needs(
    home: Path, module: str, extra: str, arguments: tuple[str, ...]
) -> None:
    result = run_without(module, *arguments, "--home", str(home))
    assert result.returncode == 1
    assert result.stderr == (
        f"fleet: this command needs {module}, which is not installed; "
        f"run: pip install 'cecollm-fleet[{extra}]'\n"
    )


def test_a_recording_names_the_extras_of_devices_and_workers(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n")
    bundle = ("--bundle", str(tiny_bundle.folder))
    for module, extra in (("onnxruntime", "edge"), ("torch", "worker")):
        result = run_without(module, "heads", "evaluate", *bundle, "--prompts", str(prompts))
        assert result.returncode == 1
        assert f"cecollm-fleet[{extra}]" in result.stderr


def test_a_device_with_an_api_names_the_extra_that_it_needs(
    home: Path, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    device = FleetHome.load(home).enroll("d1", Role.DEVICE, tmp_path / "d1").folder
    run = ("run", str(device), "--bundle", str(tiny_bundle.folder))
    result = run_without("aiohttp", *run, "--api", "127.0.0.1:0", package="edge_agent")
    assert result.returncode == 1
    assert result.stderr.endswith("run: pip install 'cecollm-fleet[api]'\n")
