"""The wheel with the extra `edge` alone, in an environment of its own, is a whole device."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleet.bundles.manifest import Bundle
from fleet.protocol import topics
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest
from fleet.protocol.report import DeviceStatus, decode_status
from fleet.transport.prompt_client import PromptClient
from tests.brokers import WAIT_S, Inbox, running_site
from tests.packaging.environments import (
    build_project_wheel,
    install_lowest,
    install_newest,
    run,
)

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(600)]

START_TIMEOUT_S = 60.0


@pytest.fixture(scope="module", params=[install_newest, install_lowest])
def edge_environment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of the programs of a fresh environment that holds the wheel with its extra `edge`.

    Its packages are the newest ones, or the least that pyproject.toml allows.
    """
    folder = tmp_path_factory.mktemp("edge")
    install: Callable[[Path, str], Path] = request.param
    return install(folder, f"{build_project_wheel(folder)}[edge]")


@contextmanager
def device_process(programs: Path, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """``edge-agent run`` for the length of the block; it must end by itself when it is asked to."""
    command = [programs / "edge-agent", "run", *arguments]
    with subprocess.Popen(command, cwd=programs, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
            process.terminate()
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()


def test_an_edge_environment_has_no_torch_and_no_database(
    edge_environment: Path, tmp_path: Path
) -> None:
    unwanted = ("torch", "transformers", "sqlalchemy")
    code = f"import importlib.util as u; print([n for n in {unwanted} if u.find_spec(n)])"
    assert run(edge_environment / "python", "-c", code, folder=tmp_path).strip() == "[]"


def test_the_wheel_holds_the_registrys_migrations(edge_environment: Path) -> None:
    (migrations,) = edge_environment.parent.glob("lib/*/site-packages/fleet/registry/migrations")
    names = {path.name for path in migrations.rglob("*.py")}
    assert {"env.py", "first_tables.py"} <= names


def test_every_package_of_the_wheel_is_typed(edge_environment: Path) -> None:
    markers = edge_environment.parent.glob("lib/*/site-packages/*/py.typed")
    packages = {marker.parent.name for marker in markers}
    assert packages >= {"fleet", "edge_agent", "cloud_broker_worker", "onnx_export", "provisioning"}


def test_the_commands_say_what_they_can_do(edge_environment: Path, tmp_path: Path) -> None:
    assert "run" in run(edge_environment / "edge-agent", "--help", folder=tmp_path)
    assert "demo" in run(edge_environment / "fleet", "--help", folder=tmp_path)


def test_a_device_from_the_wheel_answers_a_prompt(
    edge_environment: Path, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    with running_site("embedded", tmp_path) as site, site.connect("a1") as app:
        statuses = Inbox()
        app.subscribe(topics.device_status("d1"), statuses, qos=1)
        folder = site.identity("d1").folder
        with device_process(
            edge_environment, folder, "--bundle", tiny_bundle.folder, "--threads", "1"
        ):
            _, payload = statuses.get(START_TIMEOUT_S)
            assert decode_status(payload, DeviceStatus).bundle_id == tiny_bundle.manifest.bundle_id
            request = PromptRequest(
                prompt="How warm is it?", mode=Mode.STANDALONE, max_new_tokens=4
            )
            *_, last = PromptClient(app).ask("d1", request, START_TIMEOUT_S)
        assert last.usage is not None
        assert last.usage.tokens == sum(last.usage.sources.values()) > 0
        assert last.usage.sources.get("cloud", 0) == 0
