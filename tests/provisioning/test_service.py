"""The HTTPS service, asked as devices and strangers do."""

from __future__ import annotations

import dataclasses
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fleet.errors import ConfigError, RegistryError
from fleet.identity.enrolment import Enrolment
from fleet.identity.identity import CA_FILE, Identity, IdentityConfig
from fleet.protocol.access import Role
from fleet.protocol.enrolment_api import MAX_BODY_BYTES, JoinReply
from fleet.registry.settings import Scope, Target
from fleet.registry.store import Registry
from provisioning.authority import CertificateAuthority
from provisioning.enrolment_service import EnrolmentService
from provisioning.fleet_address import FleetAddress
from provisioning.rate_limit import RateLimit
from provisioning.service import EnrolmentServer
from tests.provisioning.conftest import HOST, TIMEOUT_S, Desk, make_csr

# Joining.


def test_a_device_with_a_token_gets_its_certificate_and_all_that_it_needs(desk: Desk) -> None:
    csr, key = make_csr("edge-1")
    answer = desk.join(desk.invite("edge-1"), csr)
    assert answer.status == 200
    reply = msgspec.json.decode(answer.body, type=JoinReply)
    certificate = x509.load_pem_x509_certificate(reply.certificate.encode())
    assert certificate.public_key() == key.public_key()
    assert certificate.subject.rfc4514_string() == "CN=edge-1,OU=device"
    assert (reply.name, reply.role, reply.host, reply.port) == ("edge-1", Role.DEVICE, HOST, 8883)
    assert (reply.server, reply.topic_prefix, reply.bundle_id) == (
        "https://127.0.0.1:8443",
        "ce/v1",
        "b1",
    )
    assert (reply.ca, reply.config.version) == (desk.authority.pem, 0)
    assert desk.registry.grants("edge-1") is not None


def test_who_asks_with_the_same_key_again_gets_the_same_reply(desk: Desk) -> None:
    token = desk.invite()
    csr, key = make_csr("edge-1")
    first = desk.join(token, csr)
    again, _ = make_csr("edge-1", key)  # another request for the same key: the reply was lost
    assert desk.join(token, again).body == first.body


def test_another_key_finds_the_token_used(desk: Desk) -> None:
    token = desk.invite()
    assert desk.join(token, make_csr()[0]).status == 200
    answer = desk.join(token, make_csr()[0])
    assert (answer.status, answer.code) == (410, "used_token")


def test_of_twenty_keys_at_once_one_wins(desk: Desk) -> None:
    token = desk.invite()
    requests = [make_csr()[0] for _ in range(20)]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda csr: desk.join(token, csr), requests))
    assert sorted(answer.status for answer in answers) == [200] + [410] * 19


def test_a_token_that_is_too_old_is_refused(desk: Desk) -> None:
    token = desk.invite(ttl_s=-1)
    answer = desk.join(token, make_csr()[0])
    assert (answer.status, answer.code) == (410, "expired_token")


def test_an_unknown_token_and_a_wrong_secret_look_the_same(desk: Desk) -> None:
    token = desk.invite()
    unknown = desk.join(dataclasses.replace(token, id="0" * 16), make_csr()[0])
    wrong = desk.join(token, make_csr()[0], secret="0" * 64)
    assert (unknown.status, unknown.code) == (401, "unknown_token")
    assert (wrong.status, wrong.body) == (unknown.status, unknown.body)
    assert desk.join(token, make_csr()[0]).status == 200


def test_a_request_for_another_name_is_a_conflict_and_the_token_stays_good(desk: Desk) -> None:
    token = desk.invite()
    answer = desk.join(token, make_csr("edge-2")[0])
    assert (answer.status, answer.code) == (409, "other_name")
    assert desk.join(token, make_csr("edge-1")[0]).status == 200


def test_who_was_revoked_before_it_joined_is_refused(desk: Desk) -> None:
    token = desk.invite()
    desk.registry.revoke("edge-1")
    answer = desk.join(token, make_csr()[0])
    assert (answer.status, answer.code) == (403, "bad_state")


def test_a_device_is_told_what_is_wanted_of_it_and_an_app_no_bundle(desk: Desk) -> None:
    desk.invite("edge-1")
    version = desk.registry.change_settings(
        Target(Scope.ALL),
        lambda settings: msgspec.structs.replace(settings, bundle="b2", threshold=0.5),
    )
    reply = desk.joined("edge-1")
    assert (reply.bundle_id, reply.config.version, reply.config.settings.threshold) == (
        "b2",
        version,
        0.5,
    )
    assert desk.joined("phone", Role.APP).bundle_id is None


# What is no request.


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"id": "x"}',
        b'{"id": "00", "secret": "00", "csr": "x", "more": 1}',
        b"\xff",
    ],
)
def test_a_body_that_is_none_is_refused(desk: Desk, body: bytes) -> None:
    answer = desk.ask("POST", "/v1/join", body)
    assert (answer.status, answer.code) == (400, "undecodable")


def test_what_is_no_signing_request_is_refused_and_the_token_stays_good(desk: Desk) -> None:
    token = desk.invite()
    answer = desk.join(token, "nonsense")
    assert (answer.status, answer.code) == (400, "bad_csr")
    assert desk.join(token, make_csr()[0]).status == 200


def test_a_body_that_is_too_large_is_refused_unread(desk: Desk) -> None:
    answer = desk.ask("POST", "/v1/join", b"x" * (MAX_BODY_BYTES + 1))
    assert (answer.status, answer.code) == (413, "oversized")


def test_so_is_one_that_does_not_say_how_large_it_is(desk: Desk) -> None:
    chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    reply = _raw(
        desk, b"POST /v1/join HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk
    )
    assert b" 413 " in reply.splitlines()[0]
    assert b'"oversized"' in reply


def test_a_client_that_says_nothing_is_put_out(desk: Desk) -> None:
    start = time.monotonic()
    assert _raw(desk, b"") == b""
    assert _raw(desk, b"POST /v1/join HTT") == b""
    assert time.monotonic() - start < TIMEOUT_S


def test_a_client_that_speaks_too_slowly_is_put_out(desk: Desk) -> None:
    start = time.monotonic()
    with _connection(desk) as link, suppress(OSError):
        while time.monotonic() - start < TIMEOUT_S:
            link.sendall(b"x")
            time.sleep(0.2)
    assert time.monotonic() - start < TIMEOUT_S


def test_a_body_that_does_not_come_is_not_waited_for(desk: Desk) -> None:
    reply = _raw(desk, b"POST /v1/join HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
    assert b" 408 " in reply.splitlines()[0]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/join", 405),
        ("GET", "/v1/crl", 404),
        ("DELETE", "/v1/ca", 405),
    ],
)
def test_other_paths_and_methods_are_refused_in_the_same_form(
    desk: Desk, method: str, path: str, status: int
) -> None:
    answer = desk.ask(method, path)
    assert (answer.status, answer.code) == (status, "protocol")


# Limits.


def test_too_many_joins_from_one_address_have_to_wait(
    tmp_path: Path, registry: Registry, authority: CertificateAuthority
) -> None:
    office = EnrolmentService(
        registry=registry,
        authority=authority,
        site=FleetAddress(host=HOST, port=8883),
        find_bundle=lambda _: None,
    )
    tls = authority.server_tls(tmp_path / "broker", HOST)
    with EnrolmentServer(HOST, 0, tls, office, joins=RateLimit(10, 3)) as service:
        desk = Desk(tmp_path, registry, authority, service)
        answers = [desk.join(desk.invite(), "nonsense") for _ in range(4)]
        assert [answer.status for answer in answers] == [400, 400, 400, 429]
        assert answers[-1].code == "busy"
        assert 1 <= int(answers[-1].headers["Retry-After"]) <= 6
        assert desk.ask("GET", "/v1/ca").status == 200


def test_joins_that_succeed_do_not_count(
    tmp_path: Path, registry: Registry, authority: CertificateAuthority
) -> None:
    office = EnrolmentService(
        registry=registry,
        authority=authority,
        site=FleetAddress(host=HOST, port=8883),
        find_bundle=lambda _: None,
    )
    tls = authority.server_tls(tmp_path / "broker", HOST)
    with EnrolmentServer(HOST, 0, tls, office, joins=RateLimit(1, 1)) as service:
        desk = Desk(tmp_path, registry, authority, service)
        answers = [desk.join(desk.invite(f"edge-{i}"), make_csr()[0]) for i in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 200]


def test_without_a_registry_it_says_so_and_where_it_is_stays_in_the_log(
    desk: Desk, tmp_path: Path
) -> None:
    token = desk.invite()
    (tmp_path / "registry.sqlite").rename(tmp_path / "elsewhere")
    desk.registry.close()
    (tmp_path / "registry.sqlite").mkdir()
    answer = desk.join(token, make_csr()[0])
    assert (answer.status, answer.code) == (503, RegistryError.code)
    assert str(tmp_path) not in answer.body.decode()


def test_a_port_that_is_taken_is_named(
    tmp_path: Path, registry: Registry, authority: CertificateAuthority
) -> None:
    office = EnrolmentService(
        registry=registry,
        authority=authority,
        site=FleetAddress(host=HOST, port=8883),
        find_bundle=lambda _: None,
    )
    tls = authority.server_tls(tmp_path / "broker", HOST)
    with (
        EnrolmentServer(HOST, 0, tls, office) as first,
        pytest.raises(ConfigError, match=rf"{first.port}: the port is in use.*--service-port"),
    ):
        EnrolmentServer(HOST, first.port, tls, office).__enter__()


# Without and with a certificate.


def test_anybody_can_have_the_authoritys_certificate(desk: Desk) -> None:
    assert desk.ask("GET", "/v1/ca").body.decode() == desk.authority.pem


def test_anybody_can_have_the_revoked_certificates(
    tmp_path: Path, registry: Registry, authority: CertificateAuthority
) -> None:
    office = EnrolmentService(
        registry=registry,
        authority=authority,
        site=FleetAddress(host=HOST, port=8883),
        find_bundle=lambda _: None,
        crl=lambda: "a list",
    )
    with EnrolmentServer(
        HOST, 0, authority.server_tls(tmp_path / "broker", HOST), office
    ) as service:
        assert Desk(tmp_path, registry, authority, service).ask("GET", "/v1/crl").body == b"a list"


def test_a_device_renews_with_a_new_key_and_gets_the_same_when_it_asks_again(desk: Desk) -> None:
    identity = desk.identity()
    csr, key = make_csr("edge-1")
    first = desk.renew(identity, csr)
    again = desk.renew(identity, csr)
    assert first.status == 200
    assert again.body == first.body
    certificate = x509.load_pem_x509_certificate(first.json["certificate"].encode())
    assert certificate.public_key() == key.public_key()
    renewed = _with_certificate(identity, first.json["certificate"], key)
    assert desk.renew(renewed, make_csr()[0]).status == 200
    assert desk.renew(identity, make_csr()[0]).status == 200  # the old one is good until its end


def test_renewal_needs_a_certificate(desk: Desk) -> None:
    answer = desk.renew(None, make_csr()[0])
    assert (answer.status, answer.code) == (401, "bad_credentials")


def test_a_certificate_of_our_authority_that_the_registry_does_not_know_is_refused(
    desk: Desk,
) -> None:
    desk.identity()
    copy = desk.authority.issue("edge-1", Role.DEVICE, desk.folder / "copy", HOST, 8883)
    answer = desk.renew(copy, make_csr()[0])
    assert (answer.status, answer.code) == (401, "bad_credentials")


def test_a_certificate_of_another_authority_is_not_let_in(desk: Desk) -> None:
    desk.identity()
    stranger = CertificateAuthority.create(desk.folder / "other").issue(
        "edge-1", Role.DEVICE, desk.folder / "stranger", HOST, 8883
    )
    (stranger.folder / CA_FILE).write_text(desk.authority.pem)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        desk.renew(stranger, make_csr()[0])


@pytest.mark.parametrize("change", [Registry.revoke, Registry.suspend])
def test_who_was_revoked_or_suspended_can_neither_renew_nor_have_files(
    desk: Desk, change: object
) -> None:
    desk.write_bundle()
    identity = desk.identity()
    change(desk.registry, "edge-1")  # type: ignore[operator]
    answers = [
        desk.renew(identity, make_csr()[0]),
        desk.ask("GET", "/v1/bundles/b1/manifest.json", None, identity),
    ]
    assert [(answer.status, answer.code) for answer in answers] == [(403, "bad_state")] * 2


def test_a_replaced_identitys_old_certificate_is_revoked(desk: Desk) -> None:
    identity = desk.identity()
    desk.registry.enroll([Enrolment(name="edge-1")], 900, replace=True)
    assert desk.renew(identity, make_csr()[0]).status == 403
    desk.joined("phone", Role.APP)


def test_nobody_renews_for_another_name_or_with_the_old_key(desk: Desk) -> None:
    identity = desk.identity()
    other = desk.renew(identity, make_csr("edge-2")[0])
    assert (other.status, other.code) == (409, "other_name")
    old_key = serialization.load_pem_private_key((identity.folder / "key.pem").read_bytes(), None)
    assert isinstance(old_key, ec.EllipticCurvePrivateKey)
    same = desk.renew(identity, make_csr(None, old_key)[0])
    assert (same.status, same.code) == (400, "bad_csr")


# Bundles.


def test_a_device_and_a_worker_fetch_a_bundles_files(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    content = desk.write_bundle()
    for identity in (desk.identity(), desk.identity("worker-1", Role.WORKER)):
        assert desk.ask("GET", "/v1/bundles/b1/edge/block_0.onnx", None, identity).body == content
        assert "files" in desk.ask("GET", "/v1/bundles/b1/manifest.json", None, identity).json
    assert caplog.records == []


def test_a_download_goes_on_from_where_it_was(desk: Desk) -> None:
    content = desk.write_bundle()
    identity = desk.identity()
    headers = {"Range": "bytes=1000-"}
    answer = desk.ask("GET", "/v1/bundles/b1/edge/block_0.onnx", None, identity, headers)
    assert (answer.status, answer.body) == (206, content[1000:])
    assert answer.headers["Content-Range"] == f"bytes 1000-{len(content) - 1}/{len(content)}"


def test_apps_and_strangers_get_no_files(desk: Desk) -> None:
    desk.write_bundle()
    path = "/v1/bundles/b1/manifest.json"
    stranger = desk.ask("GET", path)
    app = desk.ask("GET", path, None, desk.identity("phone", Role.APP))
    assert (stranger.status, stranger.code) == (401, "bad_credentials")
    assert (app.status, app.code) == (403, "not_allowed")


@pytest.mark.parametrize(
    "path",
    [
        "b2/manifest.json",
        "b1/edge/block_1.onnx",
        "b1/manifest.sig",  # unsigned
        "b1/secret",
        "b1/edge/../secret",
        "b1/edge/..%2fsecret",
        "b1/..%2f..%2fca%2fca-key.pem",
        "b1//etc/passwd",
        "..%2f..%2fca/manifest.json",
        "b1/edge",
    ],
)
def test_nothing_but_what_the_manifest_names_is_given(desk: Desk, path: str) -> None:
    desk.write_bundle()
    answer = desk.ask("GET", f"/v1/bundles/{path}", None, desk.identity())
    assert answer.status == 404
    assert b"PRIVATE" not in answer.body


def _connection(desk: Desk) -> ssl.SSLSocket:
    plain = socket.create_connection((HOST, desk.service.port), TIMEOUT_S)
    return desk.context().wrap_socket(plain, server_hostname=HOST)


def _raw(desk: Desk, data: bytes) -> bytes:
    """Everything that comes back for these bytes, until the service hangs up."""
    with _connection(desk) as link:
        link.sendall(data)
        reply = b""
        while part := link.recv(4096):
            reply += part
            if b"\r\n\r\n" in reply and b"}" in reply:
                break
        return reply


def _with_certificate(
    identity: Identity, certificate: str, key: ec.EllipticCurvePrivateKey
) -> Identity:
    folder = identity.folder.with_name("renewed")
    folder.mkdir()
    (folder / "ca.pem").write_bytes((identity.folder / "ca.pem").read_bytes())
    (folder / "cert.pem").write_text(certificate)
    encoding = (
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "key.pem").write_bytes(key.private_bytes(*encoding))
    return Identity(folder, IdentityConfig(name="edge-1", role=Role.DEVICE, host=HOST, port=8883))
