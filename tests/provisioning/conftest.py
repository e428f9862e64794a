"""A separate certificate authority, registry and service for each test."""

from __future__ import annotations

import hashlib
import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fleet.bundles.manifest import SCHEMA_VERSION, FileEntry, Manifest, write_manifest
from fleet.identity.enrolment import Enrolment
from fleet.identity.identity import Identity
from fleet.protocol.access import Role
from fleet.protocol.enrolment_api import JoinReply
from fleet.registry.results import NewToken
from fleet.registry.store import Registry
from provisioning.authority import CertificateAuthority
from provisioning.enrolment_service import EnrolmentService
from provisioning.fleet_address import FleetAddress
from provisioning.rate_limit import RateLimit
from provisioning.service import EnrolmentServer
from tests.identities import enroll_identity
from tests.model_info import TINY_MODEL

HOST: Final = "127.0.0.1"
TIMEOUT_S: Final = 10.0


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "ca")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry.sqlite") as opened:
        yield opened


def make_csr(
    name: str | None = None, key: ec.EllipticCurvePrivateKey | None = None
) -> tuple[str, ec.EllipticCurvePrivateKey]:
    """Make a signing request like a device, and its key."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else [])
    request = (
        x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.PEM).decode(), key


@dataclass(frozen=True)
class Response:
    """A response of the service."""

    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of a `ServiceProblem`."""
        assert set(self.json) == {"code", "message"}
        return str(self.json["code"])


class ServiceBench:
    """A running service with its registry, and a client of it."""

    def __init__(
        self,
        folder: Path,
        registry: Registry,
        authority: CertificateAuthority,
        service: EnrolmentServer,
    ) -> None:
        self.folder = folder
        self.registry = registry
        self.authority = authority
        self.service = service

    def invite(
        self, name: str = "edge-1", role: Role = Role.DEVICE, ttl_s: float = 900
    ) -> NewToken:
        (token,) = self.registry.identities.enroll([Enrolment(name=name, role=role)], ttl_s)
        return token

    def identity(self, name: str = "edge-1", role: Role = Role.DEVICE) -> Identity:
        """Enrol a name offline."""
        return enroll_identity(
            self.registry, self.authority, name, role, self.folder / name, host=HOST, port=8883
        )

    def write_bundle(self) -> bytes:
        """Write a bundle `b1` and a file outside its manifest; return the bytes of the first."""
        folder = self.folder / "bundles" / "b1"
        content = bytes(range(256)) * 40
        (folder / "edge").mkdir(parents=True)
        (folder / "edge" / "block_0.onnx").write_bytes(content)
        (folder / "secret").write_text("PRIVATE")
        entry = FileEntry("edge/block_0.onnx", len(content), hashlib.sha256(content).hexdigest())
        write_manifest(
            folder,
            Manifest(
                schema_version=SCHEMA_VERSION,
                model=TINY_MODEL,
                exits=(1, 2),
                split_layer=2,
                upload_layer=2,
                quantization="fp32",
                top_k=8,
                thresholds=(1.0, 1.0),
                parity={},
                tools={},
                files=(entry,),
            ),
        )
        return content

    def context(self, identity: Identity | None = None) -> ssl.SSLContext:
        if identity:
            return identity.ssl_context()
        return ssl.create_default_context(cadata=self.authority.pem)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        identity: Identity | None = None,
        headers: dict[str, str] | None = None,
    ) -> Response:
        connection = HTTPSConnection(
            HOST, self.service.port, timeout=TIMEOUT_S, context=self.context(identity)
        )
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Response(response.status, response.read(), dict(response.headers))
        finally:
            connection.close()

    def join(self, token: NewToken, csr: str, secret: str | None = None) -> Response:
        body = {"id": token.id, "secret": secret or token.secret, "csr": csr}
        return self.ask("POST", "/v1/join", json.dumps(body).encode())

    def joined(self, name: str = "edge-1", role: Role = Role.DEVICE) -> JoinReply:
        """Enrol a name, and join like a device."""
        csr, _ = make_csr(name)
        response = self.join(self.invite(name, role), csr)
        assert response.status == 200, response.body
        return msgspec.json.decode(response.body, type=JoinReply)

    def renew(self, identity: Identity | None, csr: str) -> Response:
        return self.ask("POST", "/v1/renew", json.dumps({"csr": csr}).encode(), identity)


@pytest.fixture
def bench(
    tmp_path: Path, registry: Registry, authority: CertificateAuthority
) -> Iterator[ServiceBench]:
    address = FleetAddress(host=HOST, port=8883, server="https://127.0.0.1:8443", bundle=tmp_path)
    folders = {"b1": tmp_path / "bundles" / "b1"}
    enrolment = EnrolmentService(
        registry=registry,
        authority=authority,
        address=address,
        find_bundle=folders.get,
        bundle_id="b1",
        software=tmp_path / "software",
    )
    tls = authority.server_tls(tmp_path / "broker", HOST)
    with EnrolmentServer(HOST, 0, tls, enrolment, joins=RateLimit(600, 50), idle_s=1.0) as service:
        yield ServiceBench(tmp_path, registry, authority, service)
