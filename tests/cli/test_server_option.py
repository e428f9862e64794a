"""`fleet --server URL`: each command does there what it does with the fleet's folder."""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from typer.main import get_command

from fleet.cli import app
from fleet.cli.local_commands import LOCAL_COMMANDS
from fleet.operator_api import remote_access
from fleet.operator_api.fleet_access import FleetAccess
from fleet.operator_api.operation import Operation, OperatorRole
from fleet.server.home import FleetHome
from fleet.server.operations.context import OperationContext
from fleet.server.operations.local_access import LocalAccess
from fleet.utils.printable import HIDDEN
from tests.brokers import WAIT_S
from tests.cli.test_outside_text import TEXT
from tests.command_lines import run
from tests.fleet.operator_api.api_fleet import (
    BUNDLE,
    KEYS,
    SPARE_BUNDLE,
    VERSION,
    ApiOfTests,
    copy_of,
    make_fleet,
    serving,
)
from tests.fleet.operator_api.test_parity import steady

DURATION: Final = re.compile(r"[0-9]+ s\b")  # of a roll-out that goes on
GUIDE: Final = Path(__file__).parents[2] / "docs/operator-guide.md"
KEY: Final = KEYS[OperatorRole.ADMIN]

READS: Final = (
    ("devices",),
    ("devices", "--offline", "--group", "lab"),
    ("devices", "--tag", "floor=9"),
    ("device", "kitchen", "--since", "7d"),
    ("workers",),
    ("sessions",),
    ("sessions", "kitchen", "--limit", "2"),
    ("stats",),
    ("stats", "kitchen", "--since", "7d"),
    ("stats", "--by", "group"),
    ("stats", "--by", "bundle", "--group", "house"),
    ("stats", "--by", "hour"),
    ("audit", "--limit", "3"),
    ("alarms", "list"),
    ("alarms", "list", "--state", "all", "--kind", "offload"),
    ("alarms", "history", "--subject", "attic"),
    ("alarms", "rules"),
    ("alarms", "rules", "--device", "kitchen"),
    ("identities", "--role", "device"),
    ("key", "list"),
    ("operator", "list"),
    ("operator", "key", "list", "ada"),
    ("config", "show", "kitchen"),
    ("config", "show", "--all"),
    ("config", "diff"),
    ("bundle", "list"),
    ("bundle", "status"),
    ("bundle", "status", "1"),
    ("update", "list"),
    ("update", "status"),
)
CHANGES: Final = (
    ("enroll", "tablet", "--tag", "floor=2", "--ttl", "1h"),
    ("enroll", "kitchen", "--force"),
    ("renew", "kitchen"),
    ("suspend", "kitchen"),
    ("revoke", "kitchen"),
    ("delete", "newcomer"),
    ("group", "kitchen", "lab"),
    ("group", "kitchen", "--none"),
    ("allow", "phone", "house", "floor=1"),
    ("disallow", "phone", "kitchen"),
    ("tag", "kitchen", "room=left", "--remove", "floor"),
    ("key", "create", "watch", "--allow", "kitchen", "--expires", "24h"),
    ("operator", "add", "eve", "--role", "admin"),
    ("operator", "role", "ada", "operator"),
    ("operator", "remove", "ada"),
    ("operator", "link", "ada"),
    ("operator", "key", "create", "ada", "--expires", "24h"),
    ("config", "set", "kitchen", "threshold=0.5", "bundle=bbbb"),
    ("config", "unset", "--all", "threshold"),
    ("alarms", "ack", "3", "--note", "on it"),
    ("alarms", "set", "offload", "--group", "house", "--above", "0.5", "--for", "10m"),
    ("alarms", "set", "errors", "--all", "--off"),
    ("alarms", "unset", "offline", "--group", "house"),
    ("alarms", "mute", "--device", "kitchen", "--for", "2h"),
    ("bundle", "rename", BUNDLE, "Summer"),
    ("bundle", "remove", SPARE_BUNDLE),
    ("bundle", "rollout", "bbbb", "--group", "house", "--stages", "50,100"),
    ("bundle", "pause"),
    ("bundle", "rollback"),
    ("update", "rollout", VERSION, "kitchen"),
)
REFUSED_THERE: Final = (  # and here, with the same line
    ("resume", "kitchen"),
    ("key", "revoke", "0" * 16),
    ("operator", "key", "revoke", "0" * 16),
    ("operator", "add", "ada"),
    ("operator", "link", "eve"),
    ("operator", "role", "ada", "queen"),
    ("bundle", "resume"),
    ("bundle", "rollout", "bbbb", "--max-failed", "2"),
    ("device", "oven"),
    ("alarms", "ack", "2"),
    ("alarms", "ack", "3", "99"),
    ("alarms", "list", "--kind", "heat"),
    ("alarms", "list", "--state", "shut"),
    ("alarms", "rules", "--device", "oven"),
    ("alarms", "set", "offload", "--above", "0.5"),
    ("alarms", "set", "offload", "--all"),
    ("alarms", "set", "offload", "--all", "--above", "7"),
    ("alarms", "set", "offline", "--all", "--above", "0.5"),
    ("alarms", "set", "worker", "--device", "kitchen", "--off"),
    ("alarms", "set", "offline", "--all", "--for", "31d"),
    ("alarms", "set", "offline", "--all", "--for", "soon"),
    ("alarms", "mute", "--all", "--for", "367d"),
    ("alarms", "unset", "offload", "--all"),
    ("config", "set", "--all", "treshold=1"),
    ("config", "set", "kitchen", "threshold=2"),
    ("enroll", "kitchen"),
)
NEED_THE_FOLDER: Final = (
    ("init", "--host", "localhost", "--bundle", "folder"),
    ("up",),
    ("server",),
    ("systemd", "--out", "units"),
    ("bridge", "--host", "localhost"),
    ("backup", "file"),
    ("restore", "file"),
    ("console",),
    ("bundle", "add", "folder"),
    ("update", "add", "x.whl"),
    ("broker", "config", "--out", "x"),
    ("broker", "rules"),
    ("authority", "rotate"),
    ("authority", "retire"),
    ("enroll", "tablet", "--out", "folder"),
    ("renew", "kitchen", "--out", "folder"),
)
PROMPTS: Final = (("prompt", "kitchen", "hi"), ("chat", "kitchen"))  # in test_remote_prompt.py
WITHOUT_A_FLEET: Final = {
    "bench",
    "bundle sign",
    "bundle verify",
    "demo",
    "export",
    "heads calibrate",
    "heads draw",
    "heads evaluate",
    "heads profile",
    "heads train",
    "plan",
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> FleetHome:
    return make_fleet(tmp_path_factory.mktemp("remote") / "template")


@pytest.fixture(scope="module")
def server(template: FleetHome) -> Iterator[ApiOfTests]:
    with serving(template) as opened:
        yield opened


def remote(server: ApiOfTests, *arguments: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
    return run("--server", server.url, *arguments, FLEET_KEY=key)


def commands(group: Any = None, prefix: str = "") -> Iterator[str]:
    """Yield the name of each command, after that of its group."""
    for name, command in (group or vars(get_command(app)))["commands"].items():
        if "commands" in vars(command):
            yield from commands(vars(command), f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}"


def test_every_command_is_tried_here() -> None:
    tables = (*READS, *CHANGES, *REFUSED_THERE, *NEED_THE_FOLDER, *PROMPTS, ("doctor",))
    tried = {name for words in tables for name in accumulate(words[:3], "{} {}".format)}
    assert set(commands()) - tried == WITHOUT_A_FLEET


@pytest.mark.parametrize("words", READS, ids=" ".join)
def test_a_command_shows_the_same_there(
    words: tuple[str, ...], server: ApiOfTests, template: FleetHome
) -> None:
    here = run(*words, "--json", FLEET_HOME=str(template.folder))
    there = remote(server, *words, "--json")
    assert here.returncode == there.returncode == 0, there.stderr
    shown, expected = (steady(json.loads(each.stdout), template) for each in (there, here))
    assert shown == expected
    table = run(*words, FLEET_HOME=str(template.folder)).stdout
    assert DURATION.sub("", remote(server, *words).stdout) == DURATION.sub("", table)


@pytest.mark.parametrize("words", CHANGES, ids=" ".join)
def test_a_command_changes_the_same_there(
    words: tuple[str, ...], template: FleetHome, tmp_path: Path
) -> None:
    mine = copy_of(template, tmp_path / "mine")
    other = copy_of(template, tmp_path / "other")
    here = run(*words, "--json", FLEET_HOME=str(mine.folder))
    assert here.returncode == 0, here.stderr
    with serving(other) as server:
        there = remote(server, *words, "--json")
    assert there.returncode == 0, there.stderr
    with mine.registry() as registry:  # an acknowledgement has the name of its operator
        expected = json.loads(here.stdout.replace(f'"{registry.actor}"', '"admin"'))
    assert steady(json.loads(there.stdout), other) == steady(expected, mine)
    assert newest_change(other, "admin") == newest_change(mine, None)


def newest_change(home: FleetHome, actor: str | None) -> Any:
    """Return the newest change, and check its actor."""
    with home.registry() as registry:
        (row,) = registry.audit_log.entries(limit=1)
        assert row.actor == (actor or registry.actor)
    return steady((row.action, row.subject, row.details), home)


@pytest.mark.parametrize("words", REFUSED_THERE, ids=" ".join)
def test_a_command_is_refused_with_the_same_line_there(
    words: tuple[str, ...], server: ApiOfTests, template: FleetHome
) -> None:
    here = run(*words, FLEET_HOME=str(template.folder))
    there = remote(server, *words)
    assert here.returncode == there.returncode == 1
    assert there.stderr == here.stderr


@pytest.mark.parametrize("words", NEED_THE_FOLDER, ids=" ".join)
def test_a_command_that_needs_the_folder_says_so(
    words: tuple[str, ...], server: ApiOfTests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("file", "x.whl"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    done = remote(server, *words)
    assert done.returncode == 1
    command = local_command(words)
    assert f"'fleet {command}' needs the fleet's folder: {LOCAL_COMMANDS[command]}" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "x.whl"]


def local_command(words: tuple[str, ...]) -> str:
    """Return the key of a command line in `LOCAL_COMMANDS`."""
    options = {" ".join((*words[:n], each)) for n in (1, 2) for each in words if each[0] == "-"}
    names = {" ".join(words[:n]) for n in (1, 2)} | options
    (found,) = names & LOCAL_COMMANDS.keys()
    return found


def test_the_guide_lists_the_commands_that_need_the_folder_and_why() -> None:
    rows = re.findall(r"^\| `fleet ([^`]+)` \| (.*) \|$", GUIDE.read_text(), re.MULTILINE)
    assert dict(rows) == LOCAL_COMMANDS
    assert {local_command(words) for words in NEED_THE_FOLDER} == LOCAL_COMMANDS.keys()


def test_the_guide_lists_the_commands_without_a_fleet() -> None:
    (line,) = re.findall(r"These use no fleet[^:]*: (.*?)\.\n", GUIDE.read_text(), re.DOTALL)
    assert set(re.findall(r"`fleet ([^`]+)`", line)) == WITHOUT_A_FLEET


def test_the_doctor_examines_this_machine_and_the_fleet_there(
    server: ApiOfTests, template: FleetHome
) -> None:
    here = json.loads(run("doctor", "--json", FLEET_HOME=str(template.folder)).stdout)
    there = json.loads(remote(server, "doctor", "--json").stdout)
    assert there["packages"] == here["packages"]
    assert steady(there["fleet"], template) == steady(here["fleet"], template)


def test_the_key_may_stand_in_a_file_and_the_server_in_the_environment(
    server: ApiOfTests, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    words = ("--key-file", str(tmp_path / "key"), "devices")
    done = run(*words, FLEET_SERVER=server.url)
    assert "kitchen" in done.stdout


@pytest.mark.parametrize(
    ("words", "key", "says"),
    [
        (("--server", "URL", "devices"), "", "set FLEET_KEY, or give --key-file"),
        (("--server", "URL", "devices"), "fleet-1-2", "that is no key of an operator"),
        (("--server", "URL", "devices"), KEY + "-other", "expected a key of an operator"),
        (("--server", "URL", "--key-file", "/no/key", "devices"), "", "/no/key"),
        (("--server", "URL", "devices", "--home", "/tmp"), KEY, "--home and --server exclude"),
        (("--server", "URL/v1", "devices"), KEY, "expected https://HOST:PORT"),
        (("--server", "ftp://localhost", "devices"), KEY, "expected https://HOST:PORT"),
        (("--server", "http://192.0.2.1:1", "devices"), KEY, "use https"),
        (("--server", "http://127.0.0.1:1", "devices"), KEY, "no connection to"),
        (("--key-file", "x", "devices"), KEY, "--key-file is for --server URL"),
        (
            ("--server", "https://localhost:1", "--ca-file", "/no/ca.pem", "devices"),
            KEY,
            "/no/ca.pem has no usable certificates",
        ),
    ],
)  # fmt: skip
def test_a_server_or_a_key_that_is_not_usable(
    words: tuple[str, ...], key: str, says: str, server: ApiOfTests
) -> None:
    done = run(*(word.replace("URL", server.url) for word in words), FLEET_KEY=key)
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_viewer_may_look_and_not_change(server: ApiOfTests) -> None:
    viewer = KEYS[OperatorRole.VIEWER]
    assert "kitchen" in remote(server, "devices", key=viewer).stdout
    done = remote(server, "suspend", "kitchen", key=viewer)
    assert "this needs the role admin" in done.stderr


def test_the_authority_of_the_fleet_is_trusted_and_no_other(
    template: FleetHome, tmp_path: Path
) -> None:
    pair = template.server_tls(tmp_path / "tls")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pair.cert_file, pair.key_file)
    with serving(template, tls) as server:
        ca = str(template.ca_folder / "ca.pem")
        words = ("--server", server.url, "devices")
        assert "kitchen" in run("--ca-file", ca, *words, FLEET_KEY=KEY).stdout
        done = run(*words, FLEET_KEY=KEY)
    assert "its certificate is not trusted" in done.stderr
    assert "--ca-file" in done.stderr


def test_a_server_that_does_not_answer_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_access, "CALL_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        done = run("--server", url, "devices", FLEET_KEY=KEY)
    assert "did not answer in time" in done.stderr


def test_a_server_that_is_none_of_a_fleet_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, "-m", "fleet.cli", "--server", url, "devices"]
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={"FLEET_KEY": KEY, "PATH": ""}
        ) as process:
            listener.settimeout(WAIT_S)
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
                _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert "its software may have another version" in errors


def test_a_machine_without_a_database_is_enough(server: ApiOfTests) -> None:
    program = "import sys; sys.modules['sqlalchemy'] = None; from fleet.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--server", server.url, "devices"],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
        env={"FLEET_KEY": KEY, "PATH": ""},
    )
    assert "kitchen" in done.stdout, done.stderr


def test_the_next_command_of_a_process_uses_its_own_folder(
    server: ApiOfTests, tmp_path: Path
) -> None:
    assert "kitchen" in remote(server, "devices").stdout
    done = run("devices", FLEET_HOME=str(tmp_path))
    assert "no fleet in" in done.stderr


class _Hostile(FleetAccess):
    """A server that puts control characters into each text that it can."""

    def __init__(self, access: FleetAccess) -> None:
        self._access = access

    def call(self, operation: Operation[Any, Any], request: Any) -> Any:
        response = msgspec.to_builtins(self._access.call(operation, request))
        for holder, key in list(texts(response)):
            kept = holder[key]
            holder[key] = kept if key == "next_page" else TEXT
            try:
                msgspec.convert(response, operation.response)
            except msgspec.ValidationError:
                holder[key] = kept
        return msgspec.convert(response, operation.response)


def texts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each text in a value of JSON, as the container and the key there."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(each, str):
            yield value, key
        elif isinstance(each, dict | list):
            yield from texts(each)


@pytest.mark.parametrize("words", [*READS, *CHANGES, ("doctor",)], ids=" ".join)
def test_a_hostile_server_controls_no_terminal(
    words: tuple[str, ...], template: FleetHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = copy_of(template, tmp_path / "fleet")
    with home.registry() as registry:
        access = _Hostile(LocalAccess(OperationContext(registry, home)))
        monkeypatch.setattr(remote_access, "RemoteAccess", lambda *_: nullcontext(access))
        for options in ((), ("--json",)):
            printed = run("--server", "https://a", *words, *options, FLEET_KEY=KEY, COLUMNS="200")
            assert not HIDDEN.search(printed.stdout + printed.stderr), printed
            assert bool(printed.stdout) == (not printed.stderr)
            if words in CHANGES:
                break
