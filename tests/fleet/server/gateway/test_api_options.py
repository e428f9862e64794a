"""The options of the fleet's HTTP API, and its certificate."""

from __future__ import annotations

import os
import shutil
import ssl
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fleet.errors import ConfigError
from fleet.http_api.api_certificate import ApiCertificate
from fleet.identity.identity import ServerTls
from fleet.server.gateway.api_options import ApiOptions
from provisioning.authority import CertificateAuthority
from tests.brokers import HOST

CERT = Path("/tls/fullchain.pem")
KEY = Path("/tls/privkey.pem")


@pytest.mark.parametrize(
    ("address", "files", "arguments"),
    [
        ("127.0.0.1:8000", (None, None), ["--api", "127.0.0.1:8000"]),
        ("[::1]", (None, None), ["--api", "[::1]:11434"]),
        (
            "0.0.0.0:443",
            (CERT, KEY),
            ["--api", "0.0.0.0:443", "--api-cert", str(CERT), "--api-cert-key", str(KEY)],
        ),
    ],
)
def test_options_come_back_as_a_command_line(
    address: str, files: tuple[Path | None, Path | None], arguments: list[str]
) -> None:
    options = ApiOptions.of(address, *files)
    assert options is not None
    assert options.arguments() == arguments
    assert options.files == [file for file in files if file]


def test_without_an_address_there_is_no_api() -> None:
    assert ApiOptions.of(None, None, None) is None


@pytest.mark.parametrize(
    ("address", "cert", "key"),
    [("h:1", CERT, None), ("h:1", None, KEY), (None, CERT, KEY), (None, None, KEY)],
)
def test_options_that_belong_together_are_given_together(
    address: str | None, cert: Path | None, key: Path | None
) -> None:
    with pytest.raises(ConfigError, match="one of them is missing"):
        ApiOptions.of(address, cert, key)


@pytest.fixture
def files(tmp_path: Path) -> ServerTls:
    return CertificateAuthority.create(tmp_path / "ca").server_tls(tmp_path / "server", HOST)


def test_a_certificate_follows_its_files(tmp_path: Path, files: ServerTls) -> None:
    certificate = ApiCertificate(files.cert_file, files.key_file)
    assert certificate.context.verify_mode is ssl.CERT_NONE
    other = CertificateAuthority.create(tmp_path / "other").server_tls(tmp_path / "new", HOST)
    shutil.copy(other.cert_file, files.cert_file)
    os.utime(files.cert_file, ns=(1, 1))
    with pytest.raises(ConfigError, match="expected a certificate"):
        certificate.follow()  # the key is still that of the former certificate
    shutil.copy(other.key_file, files.key_file)
    certificate.follow()
    files.key_file.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        certificate.follow()


def test_half_a_new_pair_leaves_the_old_certificate_in_use(
    tmp_path: Path, files: ServerTls
) -> None:
    certificate = ApiCertificate(files.cert_file, files.key_file)
    other = CertificateAuthority.create(tmp_path / "other").server_tls(tmp_path / "new", HOST)
    files.cert_file.write_bytes(other.cert_file.read_bytes())
    os.utime(files.cert_file, ns=(1, 1))
    with pytest.raises(ConfigError, match="expected a certificate"):
        certificate.follow()
    accept_a_client(certificate.context)


def accept_a_client(context: ssl.SSLContext) -> None:
    """Let a client without an authority shake hands. Raises SSLError if it cannot."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    any_server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    any_server.check_hostname = False
    any_server.verify_mode = ssl.CERT_NONE
    client = any_server.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client, server):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    assert client.version()


def test_an_encrypted_key_is_refused_without_a_question(tmp_path: Path, files: ServerTls) -> None:
    key = serialization.load_pem_private_key(files.key_file.read_bytes(), None)
    encrypted = tmp_path / "encrypted.pem"
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match=r"encrypted\.pem is encrypted.*openssl pkey"):
        ApiCertificate(files.cert_file, encrypted)


@pytest.mark.parametrize(("begin_day", "end_day"), [(-3, -1), (1, 3)])
def test_a_certificate_that_is_not_valid_now_is_logged(
    begin_day: int, end_day: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = datetime.now(UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now + timedelta(days=begin_day))
        .not_valid_after(now + timedelta(days=end_day))
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / "pair.pem"
    plain = serialization.NoEncryption()
    pkcs8 = serialization.PrivateFormat.PKCS8
    file.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, pkcs8, plain)
    )
    ApiCertificate(file, file)
    assert "clients refuse the certificate" in caplog.text


def test_files_that_are_no_certificate_are_named(tmp_path: Path) -> None:
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    with pytest.raises(ConfigError, match=r"text\.pem with the key .*both in PEM"):
        ApiCertificate(text, text)
