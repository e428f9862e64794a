"""Bad input to the commands: one clear line, a non-zero exit status, no traceback."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from fleet.bundles.manifest import Bundle
from fleet.server.home import FleetConfig, FleetHome
from tests.brokers import free_port
from tests.command_lines import run


def assert_one_clear_line(result: CompletedProcess[str], *words: str) -> None:
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.strip().splitlines()
    for word in words:
        assert word in line


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Path:
    """A fleet's folder as `fleet up` makes it; its processes do not run."""
    folder = tmp_path_factory.mktemp("fleet")
    FleetHome.create(folder, FleetConfig(host="127.0.0.1", port=1, bundle=str(tiny_bundle.folder)))
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("demo", "--mode", "psychic"), ("unknown mode 'psychic'", "standalone, collaborative")),
        (("demo", "--threshold", "1.5"), ("threshold 1.5", "0 to 1")),
        (("demo", "--prompt", "  "), ("prompt is empty",)),
        (("demo", "--top-p", "0"), ("top-p",)),
        (("demo", "--prompts", "/no/such/file"), ("/no/such/file",)),
        (("demo", "--bundle", "/no/bundle"), ("no usable bundle in /no/bundle", "onnx_export")),
        (("stats", "--home", "/no/fleet"), ("no fleet in /no/fleet", "fleet up")),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_one_clear_line(run(*arguments), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prompt", "ghost", "hello"), ("127.0.0.1:1", "fleet up")),
        (("stats", "ghost"), ("unknown device 'ghost'",)),
        (("stats", "--since", "yesterday"), ("since 'yesterday'", "24h")),
        (("stats", "--since", "99999999999d"), ("since '99999999999d'", "after 1970")),
        (("stats", "--since", "0001-01-01"), ("after 1970",)),
        (("config", "set", "--all", "min_agreement=NaN"), ("NaN is not finite", "0.9")),
        (("config", "set", "--all", "max_draft=null"), ("max_draft=null", "fleet config unset")),
        (("config", "set", "--all", "max_draft=2", "max_draft=3"), ("max_draft is given twice",)),
        (("config", "set", "--all", "--group", "g", "max_draft=2"), ("got --group g and --all",)),
        (("config", "set", "x", "triggers=\udcff"), ("UTF-8 can hold", "\\udcff")),
        (("device", "operator-1"), ("this identity has the role server", "fleet identities")),
        (("enroll", "Bad Name"), ("'Bad Name'", "a-z")),
        (("enroll", "x", "--role", "king"), ("unknown role 'king'",)),
        (("enroll", "x", "--role", "app", "--allow", "ghost"), ("ghost",)),
    ],
)
def test_bad_arguments_in_a_fleet(
    home: Path, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    extra = ("--out", str(tmp_path / "x")) if arguments[0] == "enroll" else ()
    assert_one_clear_line(run(*arguments, *extra, "--home", str(home)), *words)


@pytest.mark.parametrize("command", ["audit", "sessions"])
def test_a_number_of_rows_that_is_too_large_is_refused_with_the_largest(
    home: Path, command: str
) -> None:
    result = run(command, "--limit", "9" * 20, "--home", str(home))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "1000000" in result.stderr


def test_a_name_is_enrolled_once(home: Path, tmp_path: Path) -> None:
    where = ("--home", str(home))
    assert run("enroll", "sleeper", "--out", str(tmp_path / "a"), *where).returncode == 0
    assert_one_clear_line(run("enroll", "sleeper", "--out", str(tmp_path / "b"), *where), "sleeper")


def test_a_number_that_is_none_is_refused_with_the_range() -> None:
    result = run("demo", "--temperature", "nan")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "'--temperature'" in result.stderr
    assert "less than or equal to 5" in result.stderr


@pytest.mark.parametrize("option", ["--port", "--service-port"])
def test_a_busy_port_is_named(tmp_path: Path, tiny_bundle: Bundle, option: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        ports = {"--port": free_port(), "--service-port": free_port(), option: port}
        options = [str(word) for pair in ports.items() for word in pair]
        result = run(
            "up", *options, "--bundle", str(tiny_bundle.folder), "--home", str(tmp_path / "fleet")
        )
    assert_one_clear_line(result, port, option)


def test_the_error_of_a_device_without_identity_names_the_command(tmp_path: Path) -> None:
    assert_one_clear_line(
        run("run", str(tmp_path), module="edge_agent"), "no usable identity", "fleet enroll"
    )


def test_an_altered_bundle_is_refused_by_device_and_worker(
    home: Path, tmp_path: Path, tiny_bundle: Bundle
) -> None:
    altered = tmp_path / "altered"
    shutil.copytree(tiny_bundle.folder, altered)
    for name in ("edge/block_0.onnx", "cloud/model.safetensors"):
        path = altered / name
        path.write_bytes(path.read_bytes()[:-1] + b"\x00\x01")
    worker = str(home / "identities" / "worker-1")
    device = str(tmp_path / "device")
    assert run("enroll", "careful", "--out", device, "--home", str(home)).returncode == 0
    assert_one_clear_line(run("run", worker, module="edge_agent"), "expected a device's")
    assert_one_clear_line(
        run("run", device, "--bundle", str(altered), module="edge_agent"), "block_0.onnx", "altered"
    )
    assert_one_clear_line(
        run("run", worker, "--bundle", str(altered), module="cloud_broker_worker"),
        "model.safetensors",
        "altered",
    )
