"""The options of the fleet's HTTP API, and its certificate."""

from __future__ import annotations

import os
import shutil
import ssl
from pathlib import Path

import pytest

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


def test_files_that_are_no_certificate_are_named(tmp_path: Path) -> None:
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    with pytest.raises(ConfigError, match=r"text\.pem with the key .*both in PEM"):
        ApiCertificate(text, text)
