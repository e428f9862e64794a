"""`fleet enroll`, `suspend`, `resume` and `revoke`, and the service of `fleet server`."""

from __future__ import annotations

import json
import shlex
import shutil
import ssl
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from typer.testing import CliRunner

from fleet.bundles.manifest import Bundle
from fleet.cli import app
from fleet.cli.options import format_time, parse_since
from fleet.errors import (
    ConfigError,
    FleetError,
    IdentityError,
    StateError,
    TopicError,
    UnknownDeviceError,
)
from fleet.identity.identity import CA_FILE, Identity
from fleet.protocol.access import Role
from fleet.protocol.enrolment_api import EnrolmentToken
from fleet.server.child_process import child
from fleet.server.home import COLLECTOR, PASSPHRASE, FleetConfig, FleetHome, create_fleet
from tests.brokers import fingerprint_of, free_port
from tests.provisioning.conftest import make_csr

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def fresh_fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FleetHome.create(
        tmp_path_factory.mktemp("fresh") / "state",
        FleetConfig(host=HOST, port=1, bundle="/no/bundle"),
    ).folder


@pytest.fixture
def fleet_folder(tmp_path: Path, fresh_fleet: Path) -> Path:
    """A fleet of its own for each test; its processes do not run."""
    return Path(shutil.copytree(fresh_fleet, tmp_path / "state"))


def fleet(folder: Path, *arguments: str) -> str:
    """Return the output of a command; raise its error."""
    result = CliRunner().invoke(app, [*arguments, "--home", str(folder)], env={"COLUMNS": "200"})
    if result.exception is not None:
        raise result.exception
    return result.stdout


def fleet_json(folder: Path, *arguments: str) -> Any:
    return json.loads(fleet(folder, *arguments, "--json"))


def names(folder: Path) -> set[str]:
    """Return the enrolled names without the fleet's own identities."""
    home = FleetHome.load(folder)
    with home.registry() as registry:
        enrolled = {row.name for row in registry.identities.all()}
    return {name for name in enrolled if not home.has_identity(name)}


def test_a_device_is_enrolled_with_one_line_to_run_on_it(fleet_folder: Path) -> None:
    output = fleet(
        fleet_folder,
        "enroll",
        "kitchen",
        "--group",
        "home",
        "--tag",
        "site=roof",
        "--tag",
        "arch=arm64",
    )
    first, command = output.splitlines()
    assert first.startswith("enrolled device kitchen; run this there, once, before 20")
    words = command.split()
    options = ["--server", "https://127.0.0.1:8443", "--out", "kitchen"]  # a folder each
    assert [*words[:2], *words[3:]] == ["edge-agent", "join", *options]
    assert EnrolmentToken.parse(words[2]).ca_sha256 == FleetHome.load(fleet_folder).ca_sha256()
    (row,) = fleet_json(fleet_folder, "devices")
    assert (row["device"], row["group"], row["state"]) == ("kitchen", "home", "pending")
    assert row["tags"] == {"arch": "arm64", "site": "roof"}


def test_devices_are_shown_with_state_and_tags(fleet_folder: Path) -> None:
    fleet(fleet_folder, "enroll", "kitchen", "--tag", "site=roof")
    shown = fleet(fleet_folder, "devices")
    assert "site=roof" in shown
    assert "pending" in shown


def test_a_token_in_json_has_the_given_lifetime(fleet_folder: Path) -> None:
    output = [fleet_json(fleet_folder, "enroll", "kitchen", *ttl) for ttl in ((), ("--ttl", "24h"))]
    assert set(output[0]) == {"name", "role", "token", "expires_at", "command"}
    assert output[1]["expires_at"] - output[0]["expires_at"] == pytest.approx(23.75 * 3600, abs=60)


def test_a_token_needs_no_key_of_the_authority(fleet_folder: Path) -> None:
    (fleet_folder / "ca" / "ca-key.pem").unlink()
    assert fleet_json(fleet_folder, "enroll", "kitchen")["token"]


def test_a_folder_is_made_offline_with_the_address_of_the_service(
    fleet_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "kitchen"
    output = fleet(fleet_folder, "enroll", "kitchen", "--tag", "site=roof", "--out", str(out))
    assert f"next: edge-agent run {out}" in output
    assert Identity.load(out).config.server == "https://127.0.0.1:8443"
    with FleetHome.load(fleet_folder).registry() as registry:
        (row,) = registry.identities.all(Role.DEVICE)
        assert (row.state, row.tags) == ("active", {"site": "roof"})
        assert registry.identities.role_of(row.fingerprint) == ("kitchen", Role.DEVICE)


def test_an_identity_is_replaced_with_force(fleet_folder: Path, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "kitchen"))
    fleet(fleet_folder, "enroll", "kitchen", *out)
    with pytest.raises(IdentityError, match="--force"):
        fleet(fleet_folder, "enroll", "kitchen")
    assert fleet_json(fleet_folder, "enroll", "kitchen", "--force")["token"]
    fleet(fleet_folder, "enroll", "kitchen", "--force", *out)


def test_an_identity_that_is_replaced_keeps_what_is_not_given(fleet_folder: Path) -> None:
    fleet(fleet_folder, "enroll", "kitchen", "--group", "home", "--tag", "floor=1")
    fleet(fleet_folder, "enroll", "phone", "--role", "app", "--allow", "kitchen")
    fleet(fleet_folder, "enroll", "kitchen", "--force", "--tag", "floor=2")
    fleet(fleet_folder, "enroll", "phone", "--force")
    with FleetHome.load(fleet_folder).registry() as registry:
        rows = {row.name: row for row in registry.identities.all()}
    assert (rows["kitchen"].group, rows["kitchen"].tags) == ("home", {"floor": "2"})
    assert (rows["phone"].role, rows["phone"].targets) == ("app", ("kitchen",))
    fleet(fleet_folder, "enroll", "kitchen", "--force", "--role", "app")
    fleet(fleet_folder, "revoke", "phone")
    fleet(fleet_folder, "enroll", "phone", "--role", "app", "--force")
    with FleetHome.load(fleet_folder).registry() as registry:
        rows = {row.name: row for row in registry.identities.all()}
    assert (rows["kitchen"].group, rows["kitchen"].tags) == (None, {})
    assert rows["phone"].targets == ()


def test_printed_commands_can_be_pasted(fleet_folder: Path, tmp_path: Path) -> None:
    output = fleet(fleet_folder, "enroll", "kitchen", "--out", str(tmp_path / "my kitchen"))
    command = output.strip().partition("next: ")[2]
    assert shlex.split(command) == ["edge-agent", "run", str(tmp_path / "my kitchen")]
    output = fleet(fleet_folder, "broker", "config", "--out", str(tmp_path / "my mq"))
    command = output.strip().partition("next: ")[2].partition(", see README")[0]
    assert shlex.split(command) == ["mosquitto", "-c", str(tmp_path / "my mq" / "mosquitto.conf")]
    readme = (tmp_path / "my mq" / "README").read_text()
    lines = [shlex.split(line) for line in readme.splitlines() if line.startswith("    ")]
    assert all(line[1:].count(str(tmp_path / "my mq")) <= 1 for line in lines)
    assert ["mosquitto", "-c", str(tmp_path / "my mq" / "mosquitto.conf")] in lines
    assert ["fleet", "server", "--no-broker", "--mosquitto", str(tmp_path / "my mq")] in lines


@pytest.mark.parametrize(("user", "is_warned"), [(0, True), (1000, False)])
def test_a_mosquitto_that_would_run_as_root_is_pointed_out(
    fleet_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: int, is_warned: bool
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: user)
    arguments = ["broker", "config", "--out", str(tmp_path / "mq"), "--home", str(fleet_folder)]
    assert ("run as root" in CliRunner().invoke(app, arguments).stderr) is is_warned


def test_times_have_one_zone_that_is_named(
    fleet_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    assert parse_since("2026-01-31T09:00") == parse_since("2026-01-31T14:30+05:30")
    assert format_time(parse_since("2026-01-31T09:00")) == "2026-01-31 09:00 UTC"
    assert " UTC:" in fleet(fleet_folder, "enroll", "kitchen")
    assert "time, UTC" in fleet(fleet_folder, "audit")
    monkeypatch.delenv("TZ")
    time.tzset()


def test_without_a_service_there_is_no_token(tmp_path: Path) -> None:
    FleetHome.create(tmp_path, FleetConfig(host=HOST, port=1, bundle="/no/bundle", service_port=0))
    with pytest.raises(
        ConfigError, match=r"no service to join at; give --out DIR, or start it with --service-port"
    ):
        fleet(tmp_path, "enroll", "kitchen")
    fleet(tmp_path, "enroll", "kitchen", "--out", str(tmp_path / "kitchen"))
    assert Identity.load(tmp_path / "kitchen").config.server is None


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((), ConfigError, "a NAME or --from FILE"),
        (("x", "--from", "y.csv"), ConfigError, "a NAME or --from FILE"),
        (("--from", "y.csv", "--group", "g"), ConfigError, "the file has role, group"),
        (("--from", "/no/file.csv"), ConfigError, "cannot read /no/file.csv"),
        (("x", "--ttl", "soon"), ConfigError, "ttl 'soon': expected a span like 15m"),
        (("x", "--ttl", "31d"), ConfigError, "at most 30d"),
        (("x", "--ttl", "0s"), ConfigError, "expected a span"),
        (("x", "--tag", "roof"), ConfigError, "tag 'roof': expected key=value"),
        (("x", "--tag", "a=1", "--tag", "a=2"), ConfigError, "each key once"),
        (("x", "--tag", "Site=roof"), TopicError, "key of a tag 'Site'"),
        (("x", "--role", "app", "--tag", "a=1"), ConfigError, "only a device has tags"),
        (("x", "--bundle", "/b"), ConfigError, "give --out DIR, too"),
    ],
)
def test_invalid_options_are_refused_and_enrol_no_identity(
    fleet_folder: Path, arguments: tuple[str, ...], error: type[FleetError], says: str
) -> None:
    with pytest.raises(error, match=says) as raised:
        fleet(fleet_folder, "enroll", *arguments)
    assert "\n" not in str(raised.value)
    assert names(fleet_folder) == set()


# A whole batch.

BATCH = """\
name,group,tags,role,allow
phone,,,app,kitchen home
kitchen,home,site=roof arch=arm64,,
hall,,,device,
"""


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    path = tmp_path / "batch.csv"
    path.write_text(BATCH)
    return path


def test_a_file_enrols_a_whole_batch_with_a_token_each(fleet_folder: Path, batch: Path) -> None:
    output = fleet_json(fleet_folder, "enroll", "--from", str(batch))
    assert [(each["name"], each["role"]) for each in output] == [
        ("phone", "app"),
        ("kitchen", "device"),
        ("hall", "device"),
    ]
    assert len({each["token"] for each in output}) == 3
    with FleetHome.load(fleet_folder).registry() as registry:
        rows = {row.name: row for row in registry.identities.all()}
    assert (rows["phone"].targets, rows["kitchen"].group) == (("home", "kitchen"), "home")
    assert rows["kitchen"].tags == {"arch": "arm64", "site": "roof"}
    assert (
        fleet(fleet_folder, "enroll", "--from", str(batch)).count("edge-agent join") == 3
    )  # no device has joined yet


@pytest.mark.parametrize(
    "text",
    [
        "name,group\n\na,home\n,\nb,\n,\n",
        "Name, Group \nA,home\nb,\n".replace("A", "a"),
        "name,group,,\na,home,,\nb,,,\n",
        "\ufeffname,group\r\na,home\r\nb\r\n",
    ],
)
def test_a_file_as_a_spreadsheet_writes_it_is_read(
    fleet_folder: Path, batch: Path, text: str
) -> None:
    batch.write_bytes(text.encode())
    fleet(fleet_folder, "enroll", "--from", str(batch))
    with FleetHome.load(fleet_folder).registry() as registry:
        rows = {row.name: row.group for row in registry.identities.all(Role.DEVICE)}
    assert rows == {"a": "home", "b": None}


@pytest.mark.parametrize("data", [b"name;group\na;home\n", b"sep=,\nname\na\n"])
def test_another_kind_of_file_is_refused_with_the_kind_to_save(
    fleet_folder: Path, batch: Path, data: bytes
) -> None:
    batch.write_bytes(data)
    with pytest.raises(ConfigError, match="save it as CSV with commas between the columns"):
        fleet(fleet_folder, "enroll", "--from", str(batch))
    batch.write_bytes("name\na\n".encode("utf-16"))
    with pytest.raises(ConfigError, match="in UTF-16, expected UTF-8"):
        fleet(fleet_folder, "enroll", "--from", str(batch))


def test_a_file_enrols_a_whole_batch_with_a_folder_each(
    fleet_folder: Path, batch: Path, tmp_path: Path
) -> None:
    output = fleet_json(
        fleet_folder, "enroll", "--from", str(batch), "--out", str(tmp_path / "out")
    )
    assert [Identity.load(Path(each["folder"])).name for each in output] == [
        "phone",
        "kitchen",
        "hall",
    ]


def test_only_the_new_names_of_a_file_are_enrolled(
    fleet_folder: Path, batch: Path, tmp_path: Path
) -> None:
    fleet(fleet_folder, "enroll", "hall", "--out", str(tmp_path / "hall"))
    file = ("--from", str(batch))
    with pytest.raises(IdentityError, match="leave the enrolled names of a file out"):
        fleet(fleet_folder, "enroll", *file)
    output = fleet_json(fleet_folder, "enroll", *file, "--new-only")
    assert [each["name"] for each in output] == ["phone", "kitchen"]
    fleet(fleet_folder, "enroll", *file, "--new-only", "--out", str(tmp_path / "all"))
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["kitchen", "phone"]
    assert fleet(fleet_folder, "enroll", *file, "--new-only").startswith("every name in")
    with pytest.raises(ConfigError, match="--new-only is for"):
        fleet(fleet_folder, "enroll", "attic", "--new-only")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected the columns name, group, tags, role, allow.* got none"),
        ("name\n", "has no rows"),
        ("name,colour\na,red\n", "got name, colour"),
        ("group\nhome\n", "of which only name is required"),
        ("name\nok\nNot Ok\n", "line 3: name 'Not Ok'"),
        ("name,role\nok,\nx,king\n", "line 3: unknown role 'king'"),
        ("name,tags\nok,roof\n", "line 2: tag 'roof': expected key=value"),
        ("name,allow\nok,hall\n", "line 2: only an app is allowed"),
        ("name\nok\nok\n", "batch.csv: 'ok' occurs twice"),
        ("name\nok,more\n", "line 2: more cells than columns"),
        ("name,role,allow\nok,,\nphone,app,attic\n", "cannot allow 'attic'"),
        ("name,group\nok,hall\nhall,\n", "'hall' is the name of a group"),
        ('name\n"ok', "is no CSV file: "),
    ],
)
@pytest.mark.parametrize("offline", [False, True])
def test_one_bad_row_enrols_no_identity(
    fleet_folder: Path, batch: Path, tmp_path: Path, text: str, says: str, offline: bool
) -> None:
    batch.write_text(text, encoding="utf-8")
    extra = ("--out", str(tmp_path / "out")) if offline else ()
    with pytest.raises(FleetError, match=says):
        fleet(fleet_folder, "enroll", "--from", str(batch), *extra)
    assert names(fleet_folder) == set()
    assert not list(tmp_path.glob("out/*/identity.json"))


def test_rows_of_blanks_are_no_rows(fleet_folder: Path, batch: Path) -> None:
    batch.write_text("name,group\nok,hall, \n , \n\t\n", encoding="utf-8")
    fleet(fleet_folder, "enroll", "--from", str(batch))
    assert names(fleet_folder) == {"ok"}


# States.


def test_an_operator_suspends_resumes_and_revokes(fleet_folder: Path, tmp_path: Path) -> None:
    fleet(fleet_folder, "enroll", "kitchen", "--out", str(tmp_path / "kitchen"))
    assert fleet(fleet_folder, "suspend", "kitchen") == "device kitchen is suspended\n"
    assert fleet_json(fleet_folder, "resume", "kitchen")["state"] == "active"
    assert fleet(fleet_folder, "revoke", "kitchen") == "device kitchen is revoked\n"
    with pytest.raises(StateError, match="cannot suspend 'kitchen', which is revoked"):
        fleet(fleet_folder, "suspend", "kitchen")
    with pytest.raises(UnknownDeviceError, match="unknown identity 'oven'"):
        fleet(fleet_folder, "revoke", "oven")


@pytest.mark.parametrize("command", ["suspend", "revoke"])
def test_the_fleets_own_identity_is_replaced_rather_than_revoked(
    tmp_path: Path, command: str
) -> None:
    home = FleetHome.create(tmp_path / "state", FleetConfig(host=HOST, port=1, bundle="/no/bundle"))
    with home.operator() as operator:
        before = fingerprint_of(operator)
        with pytest.raises(ConfigError, match="cannot work without its own identity") as caught:
            fleet(home.folder, command, operator.name)
    command = str(caught.value).rpartition("`fleet ")[2].rstrip("`")
    fleet(home.folder, *shlex.split(command))
    with home.registry() as registry, home.operator() as operator:
        assert registry.identities.admitted(operator.name, before) is None
        assert registry.identities.admitted(operator.name, fingerprint_of(operator)) is not None


# The authority's passphrase.


def test_a_fleet_with_a_passphrase_opens_only_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = FleetConfig(host=HOST, port=1, bundle="/no/bundle")
    monkeypatch.setenv(PASSPHRASE, "correct horse")
    create_fleet(tmp_path / "state", config)
    assert capsys.readouterr().err == ""
    assert b"ENCRYPTED" in (tmp_path / "state" / "ca" / "ca-key.pem").read_bytes()
    out = ("--out", str(tmp_path / "kitchen"))
    monkeypatch.setenv(PASSPHRASE, "battery staple")
    with pytest.raises(IdentityError, match="does not open with this passphrase"):
        fleet(tmp_path / "state", "enroll", "kitchen", *out)
    monkeypatch.delenv(PASSPHRASE)
    with pytest.raises(IdentityError, match=f"is encrypted: .*{PASSPHRASE}"):
        fleet(tmp_path / "state", "enroll", "kitchen", *out)
    assert names(tmp_path / "state") == set()
    monkeypatch.setenv(PASSPHRASE, "correct horse")
    fleet(tmp_path / "state", "enroll", "kitchen", *out)


def test_a_key_that_is_not_encrypted_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(PASSPHRASE, raising=False)
    for _ in range(2):
        create_fleet(tmp_path / "state", FleetConfig(host=HOST, port=1, bundle="/no/bundle"))
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not encrypted" in line
    assert PASSPHRASE in line


def test_the_note_on_a_key_that_is_not_encrypted_names_the_authority_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fleet's folder may hold other files of the user."""
    monkeypatch.delenv(PASSPHRASE, raising=False)
    config = FleetConfig(host=HOST, port=1, bundle="/no/bundle")
    create_fleet(tmp_path, config)
    assert f"delete {tmp_path / 'ca'} alone, set {PASSPHRASE}" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "ca")
    monkeypatch.setenv(PASSPHRASE, "correct horse")
    home = create_fleet(tmp_path, config)
    assert b"ENCRYPTED" in (tmp_path / "ca" / "ca-key.pem").read_bytes()
    own = home.identity(COLLECTOR, Role.SERVER).folder / CA_FILE
    assert own.read_text() == home.trusted_ca()


# The server.


@pytest.fixture
def served(tmp_path: Path) -> Iterator[FleetHome]:
    """`fleet server` in a process of its own."""
    config = FleetConfig(host=HOST, port=free_port(), bundle="/no/bundle", service_port=free_port())
    home = FleetHome.create(tmp_path / "state", config)
    with child("the server", "fleet.cli", "server", "--home", str(home.folder)) as server:
        line = server.wait_ready()
        assert f"service on https://{HOST}:{config.service_port}" in line
        yield home


def test_the_service_may_be_on_another_host_than_the_broker(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    folder = tmp_path / "state"
    address = ("--host", "mqtt.example", "--service-host", "fleet.example")
    fleet(folder, "init", *address, "--bundle", str(tiny_bundle.folder))
    assert fleet_json(folder, "enroll", "kitchen")["command"].endswith(
        "--server https://fleet.example:8443 --out kitchen"
    )
    certificate = x509.load_pem_x509_certificate(
        FleetHome.load(folder).server_tls().cert_file.read_bytes()
    )
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["mqtt.example", "fleet.example", "localhost"]


def test_a_device_joins_at_the_service_of_a_running_fleet(served: FleetHome) -> None:
    output = fleet_json(served.folder, "enroll", "kitchen")
    token = EnrolmentToken.parse(output["command"].split()[2])
    server = output["command"].split()[4]
    csr, _ = make_csr("kitchen")
    body = json.dumps({"id": token.id, "secret": token.secret, "csr": csr}).encode()
    context = ssl.create_default_context(cafile=served.folder / "ca" / "ca.pem")
    request = urllib.request.Request(f"{server}/v1/join", body)
    with urllib.request.urlopen(request, timeout=10, context=context) as response:
        reply = json.load(response)
    assert (reply["name"], reply["port"], reply["server"]) == (
        "kitchen",
        served.config.port,
        server,
    )
    (row,) = fleet_json(served.folder, "devices")
    assert row["state"] == "active"
    with served.registry() as registry:
        joined = registry.audit_log.entries("kitchen")[0]
    assert (joined.actor, joined.action) == (HOST, "join")
