"""A fleet's HTTPS service for tests of devices: it follows the API, or fails on request."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final

import msgspec
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fleet.bundles.manifest import Manifest, read_manifest
from fleet.bundles.signature import sign_bundle
from fleet.identity.identity import IDENTITY_FILE, Identity, IdentityConfig
from fleet.protocol.access import Role
from fleet.protocol.desired_config import DesiredConfig, Settings
from fleet.protocol.enrolment_api import (
    EnrolmentToken,
    JoinReply,
    JoinRequest,
    RenewReply,
    RenewRequest,
    ServiceProblem,
    decode_body,
)
from fleet.protocol.topics import PREFIX
from provisioning.authority import CertificateAuthority, _private_pem
from tests.brokers import HOST, free_port
from tests.edge_agent.certify import certify_key
from tests.identities import issue_identity

SECRET: Final = "5" * 64
TOKEN_ID: Final = "1" * 16
STOP_S: Final = 10.0
SHUTDOWN_S: Final = 0.05


@dataclass(kw_only=True)
class Trouble:
    """The next faults; each occurs once, except `is_mute`."""

    refusals: list[tuple[int, ServiceProblem, dict[str, str]]] = field(default_factory=list)
    num_lost_replies: int = 0
    cuts_after: list[int] = field(default_factory=list)
    num_damaged: int = 0
    ignores_range: bool = False
    is_mute: bool = False


class FleetService:
    """The service. `bundles` has a folder a bundle; `requests` are method, path and Range."""

    def __init__(self, folder: Path, authority: CertificateAuthority | None = None) -> None:
        self.authority = authority or CertificateAuthority.create(folder / "ca")
        self.ca_key = folder / "ca-key.pem"
        self.ca_key.parent.mkdir(exist_ok=True)
        self.ca_key.write_bytes(_private_pem(self.authority._private_key))
        self.port = free_port()
        self.url = f"https://{HOST}:{self.port}"
        self.bundles = folder / "bundles"
        self.trouble = Trouble()
        self.requests: list[tuple[str, str, str]] = []
        self.keys: list[bytes] = []
        self.signing_requests: list[str] = []
        self.new_ca: str | None = None
        self.name = "kitchen"
        self.broker_port = 8883
        self.bundle_id: str | None = None
        self.config = DesiredConfig(1, Settings())
        self.life = timedelta(days=90)
        self._tls = self.authority.server_tls(folder / "server", HOST)
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def ca(self) -> bytes:
        return self._tls.ca_file.read_bytes()

    @property
    def token(self) -> EnrolmentToken:
        from fleet.identity.credentials import fingerprint

        return EnrolmentToken(fingerprint(self.ca), TOKEN_ID, SECRET)

    def identity(self, folder: Path) -> Identity:
        """An identity folder as `edge-agent join` makes it, without joining."""
        issue_identity(self.authority, self.name, Role.DEVICE, folder)
        config = IdentityConfig(
            name=self.name, role=Role.DEVICE, host=HOST, port=self.port, server=self.url
        )
        (folder / IDENTITY_FILE).write_bytes(msgspec.json.encode(config))
        return Identity.load(folder)

    def paths(self, ending: str) -> list[str]:
        """The Ranges of the requests whose path has this ending."""
        return [range_ for _, path, range_ in self.requests if path.endswith(ending)]

    def refuse(
        self, status: int, code: str, message: str, times: int = 1, retry_after: str | None = None
    ) -> None:
        headers = {"Retry-After": retry_after} if retry_after else {}
        self.trouble.refusals += [(status, ServiceProblem(code, message), headers)] * times

    def publish(self, folder: Path) -> Manifest:
        """Sign a copy of a bundle and offer it to devices."""
        manifest = read_manifest(folder)
        copy = self.bundles / manifest.bundle_id
        shutil.copytree(folder, copy)
        sign_bundle(copy, self.ca_key)
        return manifest

    # The server.

    @contextmanager
    def running(self) -> Iterator[FleetService]:
        self._thread.start()
        assert self._ready.wait(STOP_S)
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(STOP_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._stopped = asyncio.Event()
        app = web.Application(middlewares=[self._misbehave])
        app.router.add_get("/v1/ca", self._ca)
        app.router.add_post("/v1/join", self._join)
        app.router.add_post("/v1/renew", self._renew)
        app.router.add_get("/v1/bundles/{bundle}/{file:.+}", self._file)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_verify_locations(self._tls.ca_file)
        context.load_cert_chain(self._tls.cert_file, self._tls.key_file)
        context.verify_mode = ssl.CERT_OPTIONAL
        assert runner.server
        listener = await self._loop.create_server(
            runner.server, HOST, self.port, ssl=context, ssl_shutdown_timeout=SHUTDOWN_S
        )
        self._ready.set()
        await self._stopped.wait()
        listener.close()
        await runner.cleanup()
        await asyncio.sleep(2 * SHUTDOWN_S)  # until open connections are closed

    @web.middleware
    async def _misbehave(self, request: web.Request, handler: web.Handler) -> web.StreamResponse:  # type: ignore[name-defined]
        self.requests.append((request.method, request.path, request.headers.get("Range", "")))
        if self.trouble.is_mute:
            await self._stopped.wait()
        if self.trouble.refusals and request.path != "/v1/ca":
            status, problem, headers = self.trouble.refusals.pop(0)
            return web.Response(status=status, body=msgspec.json.encode(problem), headers=headers)
        response: web.StreamResponse = await handler(request)
        if self.trouble.num_lost_replies and request.method == "POST":
            self.trouble.num_lost_replies -= 1
            _cut(request)
        return response

    async def _ca(self, request: web.Request) -> web.Response:
        return web.Response(body=self.ca)

    async def _join(self, request: web.Request) -> web.Response:
        body = decode_body(await request.read(), JoinRequest)
        if (body.id, body.secret) != (TOKEN_ID, SECRET):
            return _problem(401, "bad_token", "no such token")
        self.signing_requests.append(body.csr)
        certificate, key = self._certify(body.csr)
        self.keys.append(key)
        reply = JoinReply(
            name=self.name,
            role=Role.DEVICE,
            certificate=certificate,
            ca=self.ca.decode(),
            host=HOST,
            port=self.broker_port,
            server=self.url,
            topic_prefix=PREFIX,
            config=self.config,
            bundle_id=self.bundle_id,
        )
        return web.Response(body=msgspec.json.encode(reply))

    async def _renew(self, request: web.Request) -> web.Response:
        if self._peer(request) is None:
            return _problem(401, "bad_identity", "no certificate")
        certificate, key = self._certify(decode_body(await request.read(), RenewRequest).csr)
        self.keys.append(key)
        return web.Response(body=msgspec.json.encode(RenewReply(certificate, self.new_ca)))

    def _certify(self, csr: str) -> tuple[str, bytes]:
        key = x509.load_pem_x509_csr(csr.encode()).public_key()
        spki = key.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return certify_key(self.authority, key, self.name, self.life).decode(), spki

    async def _file(self, request: web.Request) -> web.StreamResponse:
        path = self.bundles / request.match_info["bundle"] / request.match_info["file"]
        if self._peer(request) is None:
            return _problem(401, "bad_identity", "no certificate")
        if not path.is_file():
            return _problem(404, "bad_bundle", f"no file {path.name}")
        data = path.read_bytes()
        start = request.http_range.start or 0
        if self.trouble.num_damaged and path.suffix == ".onnx":
            self.trouble.num_damaged -= 1
            data = bytes(len(data))
        if self.trouble.ignores_range:
            start = 0
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        response = web.StreamResponse(status=206 if start else 200, headers=headers)
        response.content_length = len(data) - start
        await response.prepare(request)
        if self.trouble.cuts_after and path.suffix == ".onnx":
            await response.write(data[start : start + self.trouble.cuts_after.pop(0)])
            await asyncio.sleep(0.1)  # until it has been read
            _cut(request)
        else:
            await response.write(data[start:])
        return response

    @staticmethod
    def _peer(request: web.Request) -> object:
        assert request.transport
        return request.transport.get_extra_info("peercert") or None


def _problem(status: int, code: str, message: str) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(ServiceProblem(code, message)))


def _cut(request: web.Request) -> None:
    assert request.transport
    request.transport.abort()
    raise ConnectionResetError
