"""Joining: from a token to an identity folder, and all refusals."""

from __future__ import annotations

import socket
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from edge_agent.provisioning.join import join_fleet, own_key
from edge_agent.state.bundle_slots import Slots, SlotStore
from edge_agent.state.desired_state import load_desired
from fleet.errors import (
    BusyError,
    ConfigError,
    IdentityError,
    ServiceAwayError,
    ServiceError,
    TokenError,
    TokenNameError,
    UsedTokenError,
)
from fleet.identity.credentials import fingerprint, lifetime
from fleet.identity.identity import Identity
from fleet.protocol.desired_config import DesiredConfig, Settings
from fleet.protocol.enrolment_api import EnrolmentToken
from fleet.protocol.modes import Mode
from provisioning.authority import CertificateAuthority
from tests.brokers import HOST, WAIT_S, free_port, wait_until
from tests.edge_agent.fleet_service import SECRET, TOKEN_ID, FleetService


def test_a_token_becomes_an_identity_that_the_service_knows(
    service: FleetService, tmp_path: Path
) -> None:
    identity = join_fleet(service.token, service.url, tmp_path / "out")
    assert identity == Identity.load(tmp_path / "out")
    assert (identity.name, identity.config.server) == ("kitchen", service.url)
    identity.ssl_context()


def test_the_key_and_its_folder_are_private(service: FleetService, tmp_path: Path) -> None:
    out = join_fleet(service.token, service.url, tmp_path / "out").folder
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert stat.S_IMODE((out / "key.pem").stat().st_mode) == 0o600


def test_a_folder_with_other_files_is_refused_and_keeps_its_rights(
    service: FleetService, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    out.mkdir()
    out.chmod(0o755)
    (out / "agent.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(IdentityError, match=r"holds other files \('notes\.txt'\)"):
        join_fleet(service.token, service.url, out)
    assert service.requests == []
    (out / "notes.txt").unlink()
    join_fleet(service.token, service.url, out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


def test_the_desired_configuration_is_stored(service: FleetService, tmp_path: Path) -> None:
    service.config = DesiredConfig(7, Settings(mode=Mode.STANDALONE))
    service.bundle_id = "b1"
    join_fleet(service.token, service.url, tmp_path)
    assert load_desired(tmp_path) == service.config
    assert SlotStore(tmp_path).load().current == "b1"


def test_a_request_with_a_lost_reply_is_repeated_with_the_same_key(
    service: FleetService, tmp_path: Path
) -> None:
    service.trouble.num_lost_replies = 2
    join_fleet(service.token, service.url, tmp_path)
    assert len(service.keys) == 3
    assert len(set(service.keys)) == 1


def test_a_device_that_died_before_the_reply_joins_with_the_key_that_it_had(
    service: FleetService, tmp_path: Path
) -> None:
    key = own_key(tmp_path)
    join_fleet(service.token, service.url, tmp_path)
    assert (tmp_path / "key.pem").read_bytes() == key


def test_a_service_with_another_ca_receives_no_secret(
    service: FleetService, tmp_path: Path
) -> None:
    foreign = CertificateAuthority.create(tmp_path / "foreign")
    token = EnrolmentToken(fingerprint(foreign._ca_pem), TOKEN_ID, SECRET)
    with pytest.raises(ServiceError, match="the connection may be intercepted"):
        join_fleet(token, service.url, tmp_path / "out")
    assert [path for _, path, _ in service.requests] == ["/v1/ca"]


def test_a_server_with_the_right_ca_but_no_certificate_of_it_is_not_trusted(
    tmp_path: Path,
) -> None:
    class Impostor(FleetService):
        @property
        def ca(self) -> bytes:
            return true._ca_pem

    true = CertificateAuthority.create(tmp_path / "true")
    with Impostor(tmp_path / "impostor").running() as impostor:
        with pytest.raises(ServiceError, match="is not trusted"):
            join_fleet(
                EnrolmentToken(fingerprint(true._ca_pem), TOKEN_ID, SECRET),
                impostor.url,
                tmp_path / "out",
            )
        assert impostor.keys == []


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [(410, "bad_token", TokenError), (403, "bad_identity", IdentityError)],
)
def test_a_refusal_is_our_error_with_its_message(
    service: FleetService, tmp_path: Path, status: int, code: str, kind: type[Exception]
) -> None:
    service.refuse(status, code, "the token was used")
    with pytest.raises(kind, match="the token was used"):
        join_fleet(service.token, service.url, tmp_path / "out")
    assert len(service.requests) == 2
    assert not (tmp_path / "out").exists()


def test_a_refusal_leaves_a_key_that_was_there_before(
    service: FleetService, tmp_path: Path
) -> None:
    key = own_key(tmp_path)
    service.refuse(410, "bad_token", "the token was used")
    with pytest.raises(TokenError):
        join_fleet(service.token, service.url, tmp_path)
    assert (tmp_path / "key.pem").read_bytes() == key


def test_the_key_stays_while_the_service_is_away(service: FleetService, tmp_path: Path) -> None:
    service.refuse(503, "registry", "the registry is away")
    service.trouble.num_lost_replies = 1
    with pytest.raises(ServiceAwayError):
        join_fleet(service.token, service.url, tmp_path / "out", timeout_s=0.1)
    assert (tmp_path / "out" / "key.pem").exists()


def test_an_unknown_error_code_is_a_service_error(service: FleetService, tmp_path: Path) -> None:
    service.refuse(418, "teapot", "short and stout")
    with pytest.raises(ServiceError, match="short and stout"):
        join_fleet(service.token, service.url, tmp_path)


def test_a_service_that_is_temporarily_unavailable_is_asked_again(
    service: FleetService, tmp_path: Path
) -> None:
    service.refuse(503, "registry", "the registry is away", times=2)
    join_fleet(service.token, service.url, tmp_path)


def test_a_retry_after_header_is_obeyed(service: FleetService, tmp_path: Path) -> None:
    service.refuse(429, "busy", "too many", retry_after="1")
    started = time.monotonic()
    join_fleet(service.token, service.url, tmp_path)
    assert time.monotonic() - started >= 1.0


def test_a_retry_after_beyond_the_deadline_ends_the_attempt(
    service: FleetService, tmp_path: Path
) -> None:
    service.refuse(429, "busy", "too many", retry_after="600")
    with pytest.raises(ServiceAwayError, match="too many") as caught:
        join_fleet(service.token, service.url, tmp_path)
    assert not isinstance(caught.value, BusyError)


def test_a_closed_port_is_an_error_at_the_deadline(tmp_path: Path) -> None:
    url = f"https://{HOST}:{free_port()}"
    with pytest.raises(ServiceAwayError, match=f"no connection to {url}"):
        join_fleet(EnrolmentToken("0" * 64, TOKEN_ID, SECRET), url, tmp_path, timeout_s=0.5)


def test_the_port_of_the_broker_is_named_at_once(tmp_path: Path) -> None:
    tls = CertificateAuthority.create(tmp_path / "ca").server_tls(tmp_path / "server", HOST)
    context = tls.ssl_context()
    with socket.create_server((HOST, 0)) as broker:

        def refuse() -> None:
            for _ in range(2):
                connection, _address = broker.accept()
                with connection, suppress(OSError):
                    context.wrap_socket(connection, server_side=True).recv(1)

        thread = threading.Thread(target=refuse)
        thread.start()
        with pytest.raises(ServiceError, match="probably the broker's port") as refused:
            join_fleet(
                EnrolmentToken("0" * 64, TOKEN_ID, SECRET),
                f"https://{HOST}:{broker.getsockname()[1]}",
                tmp_path / "device",
            )
        thread.join(WAIT_S)
    assert not isinstance(refused.value, ServiceAwayError)


def test_a_server_that_speaks_no_tls_is_named(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as plain:

        def greet() -> None:
            connection, _ = plain.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(1000)

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(ServiceError, match="TLS failed"):
            join_fleet(
                EnrolmentToken("0" * 64, TOKEN_ID, SECRET),
                f"https://{HOST}:{plain.getsockname()[1]}",
                tmp_path,
            )
        thread.join(WAIT_S)


def test_a_clock_that_is_behind_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    valid_from_tomorrow = timedelta(days=-1)
    monkeypatch.setattr("provisioning.authority.CLOCK_SKEW", valid_from_tomorrow)
    with (
        FleetService(tmp_path / "service").running() as service,
        pytest.raises(ServiceError, match="set the clock"),
    ):
        join_fleet(service.token, service.url, tmp_path / "out", timeout_s=0.5)


def test_a_device_whose_clock_is_set_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    authority = CertificateAuthority.create(tmp_path / "authority")
    with monkeypatch.context() as patch:
        patch.setattr("provisioning.authority.CLOCK_SKEW", timedelta(days=-1))
        early = FleetService(tmp_path / "early", authority)
    later = FleetService(tmp_path / "later", authority)  # as valid as by the right clock
    later.port = early.port
    later.url = early.url
    with ThreadPoolExecutor(1) as pool:
        with early.running():
            joining = pool.submit(join_fleet, early.token, early.url, tmp_path / "out")
            wait_until(lambda: "set the clock" in caplog.text, "the device waits")
        with later.running():
            assert joining.result(WAIT_S).name == "kitchen"


def test_a_certificate_that_has_expired_by_this_clock_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("provisioning.authority.LEAF_LIFE", timedelta(0))
    with (
        FleetService(tmp_path / "service").running() as service,
        pytest.raises(ServiceError, match="has expired by this machine's clock"),
    ):
        join_fleet(service.token, service.url, tmp_path / "out", timeout_s=0.5)


def test_a_complete_folder_stays_when_the_token_was_used(
    service: FleetService, tmp_path: Path
) -> None:
    identity = join_fleet(service.token, service.url, tmp_path)
    before = (identity.folder / "cert.pem").read_bytes()
    service.refuse(410, "used_token", "another key has used this token")
    with pytest.raises(UsedTokenError, match="is complete: it is the identity of kitchen"):
        join_fleet(service.token, service.url, tmp_path)
    assert (identity.folder / "cert.pem").read_bytes() == before
    identity.ssl_context()


def test_a_new_token_mends_an_expired_folder_and_keeps_the_rest(
    service: FleetService, tmp_path: Path
) -> None:
    service.bundle_id = "b1"
    service.life = timedelta(seconds=1)
    identity = join_fleet(service.token, service.url, tmp_path)
    old_key = (tmp_path / "key.pem").read_bytes()
    (tmp_path / "agent.json").write_text('{"mode": "standalone"}')
    (tmp_path / "reports.sqlite").write_bytes(b"kept")
    SlotStore(tmp_path).save(Slots(current="b0", previous="b1"))
    service.life = timedelta(days=90)
    service.broker_port = 1884
    mended = join_fleet(service.token, service.url, tmp_path)
    assert lifetime((tmp_path / "cert.pem").read_bytes())[1] > time.time() + 80 * 86_400
    assert (tmp_path / "key.pem").read_bytes() != old_key
    assert (mended.name, mended.config.port) == (identity.name, 1884)
    assert (tmp_path / "agent.json").read_text() == '{"mode": "standalone"}'
    assert (tmp_path / "reports.sqlite").read_bytes() == b"kept"
    assert SlotStore(tmp_path).load() == Slots(current="b0", previous="b1")
    assert not (tmp_path / "joining-key.pem").exists()
    mended.ssl_context()


def test_the_request_to_mend_a_folder_names_its_identity(
    service: FleetService, tmp_path: Path
) -> None:
    join_fleet(service.token, service.url, tmp_path)
    join_fleet(service.token, service.url, tmp_path)
    requests = [x509.load_pem_x509_csr(csr.encode()) for csr in service.signing_requests]
    assert [each.subject.rfc4514_string() for each in requests] == ["", "CN=kitchen"]


def test_a_token_for_another_name_leaves_a_complete_folder(
    service: FleetService, tmp_path: Path
) -> None:
    join_fleet(service.token, service.url, tmp_path)
    service.refuse(403, "other_name", "the signing request is for 'kitchen'")
    names = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(TokenNameError, match="name another folder with --out"):
        join_fleet(service.token, service.url, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("name", ["identity.json", "cert.pem", "ca.pem", "key.pem"])
def test_a_damaged_folder_is_made_again_by_a_token(
    service: FleetService, tmp_path: Path, name: str
) -> None:
    join_fleet(service.token, service.url, tmp_path)
    (tmp_path / name).write_bytes(b"")
    join_fleet(service.token, service.url, tmp_path).ssl_context()
    assert Identity.load(tmp_path).name == "kitchen"


def test_a_joining_device_says_once_that_it_waits(
    service: FleetService, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service.refuse(503, "registry", "the registry is away", times=2)
    join_fleet(service.token, service.url, tmp_path)
    assert [each for each in caplog.messages if "away" in each] == [
        "the registry is away; trying again"
    ]


@pytest.mark.parametrize(
    "url", ["http://a:1", "a:8443", "https://", "https://a/b", "https://u:p@a", "https://a:x"]
)
def test_an_address_that_is_no_service_is_refused_before_anything_is_made(
    tmp_path: Path, url: str
) -> None:
    with pytest.raises(ConfigError, match="expected https://HOST:PORT"):
        join_fleet(EnrolmentToken("0" * 64, TOKEN_ID, SECRET), url, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_certificate_for_another_key_is_not_accepted(
    service: FleetService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = service.authority.certify(
        "kitchen", Identity.load(service.identity(tmp_path / "id").folder).config.role
    )
    monkeypatch.setattr(service, "_certify", lambda csr: (other.issued.pem, b""))
    with pytest.raises(IdentityError, match="for another key than ours"):
        join_fleet(service.token, service.url, tmp_path / "out")
    assert not (tmp_path / "out" / "identity.json").exists()


def test_a_certificate_for_another_name_is_not_accepted(
    service: FleetService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.edge_agent.fleet_service.certify_key", _certify_another_name)
    with pytest.raises(IdentityError, match="expected kitchen"):
        join_fleet(service.token, service.url, tmp_path)


def _certify_another_name(
    authority: CertificateAuthority, key: object, name: str, life: timedelta
) -> bytes:
    from tests.edge_agent.certify import certify_key

    return certify_key(authority, key, "cellar", life)  # type: ignore[arg-type]
