"""Identity folders."""

import datetime
import errno
import os
import ssl
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fleet.errors import ConfigError, IdentityError
from fleet.identity.identity import CA_FILE, CERT_FILE, IDENTITY_FILE, KEY_FILE, Identity
from fleet.protocol.access import Role

CONFIG = (
    b'{"name": "pi", "role": "device", "host": "localhost", "port": 8883, "bundle": "/srv/bundle"}'
)


def self_signed(name: str) -> tuple[bytes, bytes]:
    """Make a self-signed certificate and its key, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key_pem


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    certificate, key = self_signed("pi")
    (tmp_path / IDENTITY_FILE).write_bytes(CONFIG)
    (tmp_path / CA_FILE).write_bytes(certificate)
    (tmp_path / CERT_FILE).write_bytes(certificate)
    (tmp_path / KEY_FILE).write_bytes(key)
    return tmp_path


def test_an_identity_has_a_name_a_role_and_the_brokers_address(folder: Path) -> None:
    identity = Identity.load(folder)
    assert identity.name == "pi"
    assert identity.config.role is Role.DEVICE
    assert (identity.config.host, identity.config.port) == ("localhost", 8883)
    assert identity.config.bundle == "/srv/bundle"


def test_an_identity_trusts_only_its_own_authority_and_checks_the_brokers_name(
    folder: Path,
) -> None:
    context = Identity.load(folder).ssl_context()
    assert len(context.get_ca_certs()) == 1
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_the_private_key_does_not_show(folder: Path) -> None:
    assert "PRIVATE" not in repr(Identity.load(folder))


def test_the_error_for_a_missing_identity_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="fleet enroll"):
        Identity.load(tmp_path)


@pytest.mark.parametrize("name", [CA_FILE, CERT_FILE, KEY_FILE])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(IdentityError, match=f"{name} is missing"):
        Identity.load(folder)
    (folder / name).mkdir()
    with pytest.raises(IdentityError, match=f"{name} is a folder, expected a file"):
        Identity.load(folder)


def test_an_identity_of_another_role_is_named_with_its_article(folder: Path) -> None:
    identity = Identity.load(folder)
    app = Identity(folder, msgspec.structs.replace(identity.config, role=Role.APP))
    with pytest.raises(ConfigError, match=r"is the identity of an app, expected a device's"):
        app.check_role(Role.DEVICE, "make one")
    app.check_role(Role.APP, "make one")


def test_a_key_that_this_user_may_not_read_is_named_with_its_owner(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    context = Identity.load(folder).ssl_context()
    monkeypatch.setattr(context, "load_cert_chain", refuse)
    monkeypatch.setattr(os, "access", lambda path, _: path.name != KEY_FILE)
    with pytest.raises(IdentityError, match=r"cannot read .*key\.pem: Permission .* its owner"):
        Identity.load(folder).load_certificate(context)


def test_a_key_log_that_cannot_be_written_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", "/nonexistent/keys")
    with pytest.raises(IdentityError, match=r"^cannot write /nonexistent/keys, the file of SSLKEY"):
        Identity.load(folder).ssl_context()


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"{}",
        CONFIG[:-1],
        CONFIG.replace(b"device", b"boss"),
        CONFIG.replace(b"8883", b"0"),
        CONFIG.replace(b"8883", b"65536"),
        CONFIG.replace(b"pi", b"../pi"),
        CONFIG.replace(b'"pi"', b'"pi\\n"'),
        CONFIG.replace(b"localhost", b"\xff"),
        CONFIG.replace(b"bundle", b"bundel"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(folder: Path, config: bytes) -> None:
    (folder / IDENTITY_FILE).write_bytes(config)
    with pytest.raises(IdentityError, match=r"identity.json is (not (usable|in UTF-8)|empty)"):
        Identity.load(folder)


@pytest.mark.parametrize("name", [CA_FILE, CERT_FILE, KEY_FILE])
def test_a_file_that_is_no_pem_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("hello")
    with pytest.raises(IdentityError, match=r"certificate of pi .* does not load"):
        Identity.load(folder).ssl_context()


def test_a_key_that_belongs_to_another_certificate_is_refused(folder: Path) -> None:
    (folder / KEY_FILE).write_bytes(self_signed("pi")[1])
    with pytest.raises(IdentityError, match="does not load"):
        Identity.load(folder).ssl_context()
