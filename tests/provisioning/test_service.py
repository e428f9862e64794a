"""The HTTPS service: requests of devices and of strangers."""

from __future__ import annotations

import dataclasses
import logging
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
from fleet.registry.store import Registry
from fleet.registry.targets import Scope, Target
from fleet.transport import http_listener
from fleet.utils.rate_limited_log import RateLimitedLog
from provisioning.authority import CertificateAuthority
from provisioning.enrolment_service import EnrolmentService
from provisioning.fleet_address import FleetAddress
from provisioning.rate_limit import RateLimit
from provisioning.service import EnrolmentServer
from tests.identities import issue_identity
from tests.provisioning.conftest import HOST, TIMEOUT_S, ServiceBench, make_csr

# Joining.


def test_a_device_with_a_token_receives_its_certificate_and_configuration(
    bench: ServiceBench,
) -> None:
    csr, key = make_csr("edge-1")
    response = bench.join(bench.invite("edge-1"), csr)
    assert response.status == 200
    reply = msgspec.json.decode(response.body, type=JoinReply)
    certificate = x509.load_pem_x509_certificate(reply.certificate.encode())
    assert certificate.public_key() == key.public_key()
    assert certificate.subject.rfc4514_string() == "CN=edge-1,OU=device"
    assert (reply.name, reply.role, reply.host, reply.port) == ("edge-1", Role.DEVICE, HOST, 8883)
    assert (reply.server, reply.topic_prefix, reply.bundle_id) == (
        "https://127.0.0.1:8443",
        "ce/v1",
        "b1",
    )
    assert (reply.ca, reply.config.version) == (bench.authority.pem, 0)
    assert bench.registry.identities.grants("edge-1") is not None


def test_a_repeated_request_with_the_same_key_gets_the_same_reply(bench: ServiceBench) -> None:
    token = bench.invite()
    csr, key = make_csr("edge-1")
    first = bench.join(token, csr)
    again, _ = make_csr("edge-1", key)  # another request for the same key: the reply was lost
    assert bench.join(token, again).body == first.body


def test_another_key_finds_the_token_used(bench: ServiceBench) -> None:
    token = bench.invite()
    assert bench.join(token, make_csr()[0]).status == 200
    response = bench.join(token, make_csr()[0])
    assert (response.status, response.code) == (410, "used_token")


def test_only_one_of_twenty_keys_at_once_wins(bench: ServiceBench) -> None:
    token = bench.invite()
    requests = [make_csr()[0] for _ in range(20)]
    with ThreadPoolExecutor(20) as pool:
        responses = list(pool.map(lambda csr: bench.join(token, csr), requests))
    assert sorted(response.status for response in responses) == [200] + [410] * 19


def test_an_expired_token_is_refused(bench: ServiceBench) -> None:
    token = bench.invite(ttl_s=-1)
    response = bench.join(token, make_csr()[0])
    assert (response.status, response.code) == (410, "expired_token")


def test_an_unknown_token_and_a_wrong_secret_look_the_same(bench: ServiceBench) -> None:
    token = bench.invite()
    unknown = bench.join(dataclasses.replace(token, id="0" * 16), make_csr()[0])
    wrong = bench.join(token, make_csr()[0], secret="0" * 64)
    assert (unknown.status, unknown.code) == (401, "unknown_token")
    assert (wrong.status, wrong.body) == (unknown.status, unknown.body)
    assert bench.join(token, make_csr()[0]).status == 200


def test_a_request_for_another_name_is_a_conflict_and_the_token_stays_valid(
    bench: ServiceBench,
) -> None:
    token = bench.invite()
    response = bench.join(token, make_csr("edge-2")[0])
    assert (response.status, response.code) == (409, "other_name")
    assert bench.join(token, make_csr("edge-1")[0]).status == 200


def test_a_name_that_was_revoked_before_it_joined_is_refused(bench: ServiceBench) -> None:
    token = bench.invite()
    bench.registry.identities.revoke("edge-1")
    response = bench.join(token, make_csr()[0])
    assert (response.status, response.code) == (403, "bad_state")


def test_a_device_receives_its_desired_configuration_and_an_app_no_bundle(
    bench: ServiceBench,
) -> None:
    bench.invite("edge-1")
    version = bench.registry.desired_state.change_settings(
        Target(Scope.ALL),
        lambda settings: msgspec.structs.replace(settings, bundle="b2", threshold=0.5),
    )
    reply = bench.joined("edge-1")
    assert (reply.bundle_id, reply.config.version, reply.config.settings.threshold) == (
        "b2",
        version,
        0.5,
    )
    assert bench.joined("phone", Role.APP).bundle_id is None


# Malformed requests.


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
def test_a_malformed_body_is_refused(bench: ServiceBench, body: bytes) -> None:
    response = bench.ask("POST", "/v1/join", body)
    assert (response.status, response.code) == (400, "undecodable")


def test_a_malformed_signing_request_is_refused_and_the_token_stays_valid(
    bench: ServiceBench,
) -> None:
    token = bench.invite()
    response = bench.join(token, "nonsense")
    assert (response.status, response.code) == (400, "bad_csr")
    assert bench.join(token, make_csr()[0]).status == 200


def test_a_body_that_is_too_large_is_refused_unread(bench: ServiceBench) -> None:
    response = bench.ask("POST", "/v1/join", b"x" * (MAX_BODY_BYTES + 1))
    assert (response.status, response.code) == (413, "oversized")


def test_a_chunked_body_that_is_too_large_is_refused(bench: ServiceBench) -> None:
    chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    reply = _raw(
        bench, b"POST /v1/join HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk
    )
    assert b" 413 " in reply.splitlines()[0]
    assert b'"oversized"' in reply


def test_a_silent_client_is_disconnected(bench: ServiceBench) -> None:
    start = time.monotonic()
    assert _raw(bench, b"") == b""
    assert _raw(bench, b"POST /v1/join HTT") == b""
    assert time.monotonic() - start < TIMEOUT_S


def test_a_slow_client_is_disconnected(bench: ServiceBench) -> None:
    start = time.monotonic()
    with _connection(bench) as link, suppress(OSError):
        while time.monotonic() - start < TIMEOUT_S:
            link.sendall(b"x")
            time.sleep(0.2)
    assert time.monotonic() - start < TIMEOUT_S


def test_a_missing_body_is_a_timeout(bench: ServiceBench) -> None:
    reply = _raw(bench, b"POST /v1/join HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
    assert b" 408 " in reply.splitlines()[0]


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 1\r\nContent-Length: 2\r\n",
        b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
        b"X: " + b"x" * 20_000 + b"\r\n",
        b"X: a\0b\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\n",
        b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
    ],
)
def test_a_malformed_request_is_refused_in_the_same_form(bench: ServiceBench, head: bytes) -> None:
    reply = _raw(bench, b"POST /v1/join HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n")
    assert b" 400 " in reply.splitlines()[0]
    assert b'"undecodable"' in reply


def test_strangers_add_one_line_to_the_log_and_not_their_bytes(
    bench: ServiceBench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = RateLimitedLog(logging.getLogger("tests"), 600.0)
    monkeypatch.setattr(http_listener, "log", limited)
    for line in (b"\x16\x03\x01 hello", b"GET / HTTP/9.9", b"GET /" + b"x" * 20_000 + b" HTTP/1.1"):
        reply = _raw(bench, line + b"\r\nHost: x\r\n\r\n")
        assert b'"undecodable"' in reply
    (record,) = caplog.records
    assert record.exc_info is None
    assert "a request of 127.0.0.1 gets the status 400: " in record.message


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
    bench: ServiceBench, method: str, path: str, status: int
) -> None:
    response = bench.ask(method, path)
    assert (response.status, response.code) == (status, "protocol")


def test_an_expectation_that_is_none_is_refused_in_the_same_form(bench: ServiceBench) -> None:
    response = bench.ask("GET", "/v1/ca", headers={"Expect": "nonsense"})
    assert (response.status, response.code) == (417, "protocol")


# Limits.


def test_too_many_joins_from_one_address_must_wait(
    tmp_path: Path, registry: Registry, authority: CertificateAuthority
) -> None:
    enrolment = EnrolmentService(
        registry=registry,
        authority=authority,
        address=FleetAddress(host=HOST, port=8883),
        find_bundle=lambda _: None,
    )
    tls = authority.server_tls(tmp_path / "broker", HOST)
    with EnrolmentServer(HOST, 0, tls, enrolment, joins=RateLimit(10, 3)) as service:
        bench = ServiceBench(tmp_path, registry, authority, service)
        responses = [bench.join(bench.invite(), "nonsense") for _ in range(4)]
        assert [response.status for response in responses] == [400, 400, 400, 429]
        assert responses[-1].code == "busy"
        assert 1 <= int(responses[-1].headers["Retry-After"]) <= 6
        assert bench.ask("GET", "/v1/ca").status == 200


def test_joins_that_succeed_do_not_count(
    tmp_path: Path, registry: Registry, authority: CertificateAuthority
) -> None:
    enrolment = EnrolmentService(
        registry=registry,
        authority=authority,
        address=FleetAddress(host=HOST, port=8883),
        find_bundle=lambda _: None,
    )
    tls = authority.server_tls(tmp_path / "broker", HOST)
    with EnrolmentServer(HOST, 0, tls, enrolment, joins=RateLimit(1, 1)) as service:
        bench = ServiceBench(tmp_path, registry, authority, service)
        responses = [bench.join(bench.invite(f"edge-{i}"), make_csr()[0]) for i in range(3)]
        assert [response.status for response in responses] == [200, 200, 200]


def test_an_error_of_the_registry_does_not_reveal_its_path(
    bench: ServiceBench, tmp_path: Path
) -> None:
    token = bench.invite()
    (tmp_path / "registry.sqlite").rename(tmp_path / "elsewhere")
    bench.registry.close()
    (tmp_path / "registry.sqlite").mkdir()
    response = bench.join(token, make_csr()[0])
    assert (response.status, response.code) == (503, RegistryError.code)
    assert str(tmp_path) not in response.body.decode()


def test_a_port_in_use_is_named(
    tmp_path: Path, registry: Registry, authority: CertificateAuthority
) -> None:
    enrolment = EnrolmentService(
        registry=registry,
        authority=authority,
        address=FleetAddress(host=HOST, port=8883),
        find_bundle=lambda _: None,
    )
    tls = authority.server_tls(tmp_path / "broker", HOST)
    with (
        EnrolmentServer(HOST, 0, tls, enrolment) as first,
        pytest.raises(ConfigError, match=rf"{first.port}: the port is in use.*--service-port"),
    ):
        EnrolmentServer(HOST, first.port, tls, enrolment).__enter__()


# Without and with a certificate.


def test_any_client_can_fetch_the_authoritys_certificate(bench: ServiceBench) -> None:
    assert bench.ask("GET", "/v1/ca").body.decode() == bench.authority.pem


def test_any_client_can_fetch_the_revocation_list(
    tmp_path: Path, registry: Registry, authority: CertificateAuthority
) -> None:
    enrolment = EnrolmentService(
        registry=registry,
        authority=authority,
        address=FleetAddress(host=HOST, port=8883),
        find_bundle=lambda _: None,
        crl=lambda: "a list",
    )
    with EnrolmentServer(
        HOST, 0, authority.server_tls(tmp_path / "broker", HOST), enrolment
    ) as service:
        assert (
            ServiceBench(tmp_path, registry, authority, service).ask("GET", "/v1/crl").body
            == b"a list"
        )


def test_a_repeated_renewal_with_the_same_key_gets_the_same_certificate(
    bench: ServiceBench,
) -> None:
    identity = bench.identity()
    csr, key = make_csr("edge-1")
    first = bench.renew(identity, csr)
    again = bench.renew(identity, csr)
    assert first.status == 200
    assert again.body == first.body
    certificate = x509.load_pem_x509_certificate(first.json["certificate"].encode())
    assert certificate.public_key() == key.public_key()
    renewed = _with_certificate(identity, first.json["certificate"], key)
    assert bench.renew(renewed, make_csr()[0]).status == 200
    assert (
        bench.renew(identity, make_csr()[0]).status == 200
    )  # the old one stays valid until it expires


def test_renewal_needs_a_certificate(bench: ServiceBench) -> None:
    response = bench.renew(None, make_csr()[0])
    assert (response.status, response.code) == (401, "bad_credentials")


def test_a_certificate_of_our_authority_outside_the_registry_is_refused(
    bench: ServiceBench,
) -> None:
    bench.identity()
    copy = issue_identity(bench.authority, "edge-1", Role.DEVICE, bench.folder / "copy")
    response = bench.renew(copy, make_csr()[0])
    assert (response.status, response.code) == (401, "bad_credentials")


def test_a_certificate_of_another_authority_is_rejected(bench: ServiceBench) -> None:
    bench.identity()
    other = CertificateAuthority.create(bench.folder / "other")
    stranger = issue_identity(other, "edge-1", Role.DEVICE, bench.folder / "stranger")
    (stranger.folder / CA_FILE).write_text(bench.authority.pem)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        bench.renew(stranger, make_csr()[0])


@pytest.mark.parametrize("change", ["revoke", "suspend"])
def test_a_revoked_or_suspended_identity_can_neither_renew_nor_fetch_files(
    bench: ServiceBench, change: str
) -> None:
    bench.write_bundle()
    identity = bench.identity()
    getattr(bench.registry.identities, change)("edge-1")
    responses = [
        bench.renew(identity, make_csr()[0]),
        bench.ask("GET", "/v1/bundles/b1/manifest.json", None, identity),
    ]
    assert [(response.status, response.code) for response in responses] == [(403, "bad_state")] * 2


def test_a_replaced_identitys_old_certificate_is_revoked(bench: ServiceBench) -> None:
    identity = bench.identity()
    bench.registry.identities.enroll([Enrolment(name="edge-1")], 900, replace=True)
    assert bench.renew(identity, make_csr()[0]).status == 403
    bench.joined("phone", Role.APP)


def test_renewal_for_another_name_or_with_the_old_key_is_refused(bench: ServiceBench) -> None:
    identity = bench.identity()
    other = bench.renew(identity, make_csr("edge-2")[0])
    assert (other.status, other.code) == (409, "other_name")
    old_key = serialization.load_pem_private_key((identity.folder / "key.pem").read_bytes(), None)
    assert isinstance(old_key, ec.EllipticCurvePrivateKey)
    same = bench.renew(identity, make_csr(None, old_key)[0])
    assert (same.status, same.code) == (400, "bad_csr")


# Bundles.


def test_a_device_and_a_worker_fetch_a_bundles_files(
    bench: ServiceBench, caplog: pytest.LogCaptureFixture
) -> None:
    content = bench.write_bundle()
    for identity in (bench.identity(), bench.identity("worker-1", Role.WORKER)):
        assert bench.ask("GET", "/v1/bundles/b1/edge/block_0.onnx", None, identity).body == content
        assert "files" in bench.ask("GET", "/v1/bundles/b1/manifest.json", None, identity).json
    assert caplog.records == []


def test_a_download_continues_at_its_position(bench: ServiceBench) -> None:
    content = bench.write_bundle()
    identity = bench.identity()
    headers = {"Range": "bytes=1000-"}
    response = bench.ask("GET", "/v1/bundles/b1/edge/block_0.onnx", None, identity, headers)
    assert (response.status, response.body) == (206, content[1000:])
    assert response.headers["Content-Range"] == f"bytes 1000-{len(content) - 1}/{len(content)}"


@pytest.mark.parametrize(
    ("value", "status", "num_bytes"),
    [
        ("bytes=0-9", 206, 10),
        ("Bytes=-10", 206, 10),
        ("bytes=-0", 416, 0),
        ("bytes=99999-", 416, 0),
        ("lines=0-9", 200, 10_240),
        ("bytes=9-0", 200, 10_240),
        ("bytes=0-1,4-5", 200, 10_240),
        ("bytes=-", 200, 10_240),
    ],
)
def test_a_range_that_is_none_does_not_count_and_an_empty_one_is_refused(
    bench: ServiceBench, value: str, status: int, num_bytes: int
) -> None:
    bench.write_bundle()
    path = "/v1/bundles/b1/edge/block_0.onnx"
    response = bench.ask("GET", path, None, bench.identity(), {"Range": value})
    assert (response.status, len(response.body)) == (status, num_bytes)
    if status == 416:
        assert response.headers["Content-Range"] == "bytes */10240"


def test_apps_and_strangers_get_no_files(bench: ServiceBench) -> None:
    bench.write_bundle()
    path = "/v1/bundles/b1/manifest.json"
    stranger = bench.ask("GET", path)
    app = bench.ask("GET", path, None, bench.identity("phone", Role.APP))
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
def test_only_files_in_the_manifest_are_sent(bench: ServiceBench, path: str) -> None:
    bench.write_bundle()
    response = bench.ask("GET", f"/v1/bundles/{path}", None, bench.identity())
    assert response.status == 404
    assert b"PRIVATE" not in response.body


# Versions of the devices' software.


def test_a_device_fetches_a_version_and_nothing_else_of_its_folder(bench: ServiceBench) -> None:
    folder = bench.folder / "software" / "0.9.0"
    folder.mkdir(parents=True)
    manifest = {
        "software_schema": 1,
        "version": "0.9.0",
        "wheel": "cecollm_fleet-0.9.0-py3-none-any.whl",
        "num_bytes": 5,
        "sha256": "0" * 64,
    }
    (folder / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    (folder / manifest["wheel"]).write_text("wheel")  # type: ignore[operator]
    (folder / "secret").write_text("PRIVATE")
    device = bench.identity()

    def fetch(path: str, identity: Identity | None = device) -> tuple[int, bytes]:
        response = bench.ask("GET", f"/v1/software/{path}", None, identity)
        return response.status, response.body

    assert fetch("0.9.0/manifest.json")[0] == 200
    assert fetch("0.9.0/cecollm_fleet-0.9.0-py3-none-any.whl") == (200, b"wheel")
    for path in ("0.9.0/secret", "0.9.1/manifest.json", "..%2fca/manifest.json", "0.9.0"):
        status, body = fetch(path)
        assert status == 404
        assert b"PRIVATE" not in body
    assert fetch("0.9.0/manifest.json", None)[0] == 401
    assert fetch("0.9.0/manifest.json", bench.identity("phone", Role.APP))[0] == 403


def _connection(bench: ServiceBench) -> ssl.SSLSocket:
    plain = socket.create_connection((HOST, bench.service.port), TIMEOUT_S)
    return bench.context().wrap_socket(plain, server_hostname=HOST)


def _raw(bench: ServiceBench, data: bytes) -> bytes:
    """Send bytes, and return the reply until the service closes the connection."""
    with _connection(bench) as link:
        link.sendall(data)
        reply = b""
        while data := link.recv(4096):
            reply += data
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
