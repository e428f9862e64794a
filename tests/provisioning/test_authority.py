"""Certificates: content, acceptance, and storage of their keys."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fleet.errors import IdentityError, TopicError
from fleet.identity.identity import Identity, ServerTls
from fleet.protocol.access import Role
from provisioning.authority import CertificateAuthority
from tests.identities import issue_identity


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, host: str) -> str:
    """Do a TLS handshake in memory, and return the CN that the server sees.

    Raises:
        ssl.SSLError: one end refuses.
    """
    client.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    server.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    to_server = ssl.MemoryBIO()
    to_client = ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_hostname=host)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    done: set[ssl.SSLObject] = set()
    for _ in range(10):
        for end in (near, far):
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                pass
        if len(done) == 2:
            subject = dict(pair[0] for pair in (far.getpeercert() or {})["subject"])  # type: ignore[misc]
            return str(subject["commonName"])
    raise AssertionError("the handshake did not end")


def server_context(tls: ServerTls) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls.ca_file)
    context.load_cert_chain(tls.cert_file, tls.key_file)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@pytest.mark.parametrize("host", ["broker.lan", "localhost", "127.0.0.1"])
def test_client_and_broker_accept_each_other_by_the_strict_rules(
    authority: CertificateAuthority, tmp_path: Path, host: str
) -> None:
    tls = authority.server_tls(tmp_path / "broker", "broker.lan")
    device = issue_identity(
        authority, "edge-1", Role.DEVICE, tmp_path / "edge-1", host="broker.lan"
    )
    assert handshake(device.ssl_context(), server_context(tls), host) == "edge-1"


def test_a_client_refuses_a_broker_of_another_name(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    tls = authority.server_tls(tmp_path / "broker", "broker.lan")
    device = issue_identity(
        authority, "edge-1", Role.DEVICE, tmp_path / "edge-1", host="broker.lan"
    )
    with pytest.raises(ssl.SSLCertVerificationError, match=r"not valid for 'elsewhere.lan'"):
        handshake(device.ssl_context(), server_context(tls), "elsewhere.lan")


def test_a_client_refuses_a_broker_that_shows_a_devices_certificate(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    device = issue_identity(authority, "edge-1", Role.DEVICE, tmp_path / "edge-1")
    thief = issue_identity(authority, "edge-2", Role.DEVICE, tmp_path / "edge-2")
    posing_as_server = ServerTls(
        *(thief.folder / name for name in ("ca.pem", "cert.pem", "key.pem"))
    )
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        handshake(device.ssl_context(), server_context(posing_as_server), "localhost")


def test_a_broker_refuses_a_client_of_another_fleet(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    tls = authority.server_tls(tmp_path / "broker", "localhost")
    other = CertificateAuthority.create(tmp_path / "other")
    stranger = issue_identity(other, "edge-1", Role.DEVICE, tmp_path / "edge-1")
    (stranger.folder / "ca.pem").write_bytes(tls.ca_file.read_bytes())
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        handshake(stranger.ssl_context(), server_context(tls), "localhost")


def test_a_certificate_carries_name_role_key_type_and_its_end(
    authority: CertificateAuthority,
) -> None:
    created = authority.certify("edge-1", Role.DEVICE)
    certificate = x509.load_pem_x509_certificate(created.issued.pem.encode())
    subject = {attribute.oid: attribute.value for attribute in certificate.subject}
    assert subject == {NameOID.COMMON_NAME: "edge-1", NameOID.ORGANIZATIONAL_UNIT_NAME: "device"}
    public_key = certificate.public_key()
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    assert public_key.curve.name == "secp256r1"
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == 90
    assert certificate.not_valid_after_utc.timestamp() == created.issued.not_after


def test_a_private_key_does_not_show(authority: CertificateAuthority) -> None:
    assert "PRIVATE KEY" not in repr(authority.certify("edge-1", Role.DEVICE))


def test_keys_are_readable_by_their_owner_alone(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    issue_identity(authority, "edge-1", Role.DEVICE, tmp_path / "edge-1")
    modes = {
        path: (tmp_path / path).stat().st_mode & 0o777
        for path in ("ca", "ca/ca-key.pem", "edge-1/key.pem")
    }
    assert modes == {"ca": 0o700, "ca/ca-key.pem": 0o600, "edge-1/key.pem": 0o600}


def test_an_identity_folder_holds_four_files_and_loads(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    issued = issue_identity(
        authority,
        "edge-1",
        Role.DEVICE,
        tmp_path / "edge-1",
        host="broker.lan",
        bundle=tmp_path / "bundle",
    )
    assert {path.name for path in issued.folder.iterdir()} == {
        "ca.pem",
        "cert.pem",
        "key.pem",
        "identity.json",
    }
    loaded = Identity.load(tmp_path / "edge-1")
    assert loaded == issued
    assert loaded.config.bundle == str(tmp_path / "bundle")


def test_an_authority_that_is_loaded_again_signs_for_the_same_fleet(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    tls = authority.server_tls(tmp_path / "broker", "localhost")
    again = CertificateAuthority.load(tmp_path / "ca")
    device = issue_identity(again, "edge-1", Role.DEVICE, tmp_path / "edge-1")
    assert handshake(device.ssl_context(), server_context(tls), "localhost") == "edge-1"


@pytest.mark.usefixtures("authority")
def test_an_authority_is_never_overwritten(tmp_path: Path) -> None:
    before = (tmp_path / "ca" / "ca-key.pem").read_bytes()
    with pytest.raises(IdentityError, match="name an empty or new folder"):
        CertificateAuthority.create(tmp_path / "ca")
    assert (tmp_path / "ca" / "ca-key.pem").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"ca"}


def test_a_missing_authority_is_named(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=r"cannot read .*ca\.pem: .*; restore it; 'fleet up'"):
        CertificateAuthority.load(tmp_path)


@pytest.mark.usefixtures("authority")
@pytest.mark.parametrize("name", ["ca.pem", "ca-key.pem"])
def test_an_altered_authority_does_not_load(tmp_path: Path, name: str) -> None:
    (tmp_path / "ca" / name).write_text("nonsense")
    with pytest.raises(IdentityError, match="does not load"):
        CertificateAuthority.load(tmp_path / "ca")


@pytest.mark.usefixtures("authority")
def test_an_authority_with_anothers_key_does_not_load(tmp_path: Path) -> None:
    CertificateAuthority.create(tmp_path / "other")
    (tmp_path / "ca" / "ca-key.pem").write_bytes((tmp_path / "other" / "ca-key.pem").read_bytes())
    with pytest.raises(IdentityError, match="is not the key of"):
        CertificateAuthority.load(tmp_path / "ca")


def test_a_name_that_may_not_stand_in_a_topic_gets_no_certificate(
    authority: CertificateAuthority,
) -> None:
    with pytest.raises(TopicError):
        authority.certify("edge/+", Role.DEVICE)


def test_an_invalid_host_is_refused(authority: CertificateAuthority, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="expected a host name in ASCII or an IP address"):
        authority.server_tls(tmp_path / "broker", "bröker.lan")


def test_an_encrypted_key_opens_with_its_passphrase_alone(tmp_path: Path) -> None:
    CertificateAuthority.create(tmp_path / "ca", "correct horse")
    stored = (tmp_path / "ca" / "ca-key.pem").read_text()
    assert stored.startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert CertificateAuthority.load(tmp_path / "ca", "correct horse").certify(
        "edge-1", Role.DEVICE
    )
    with pytest.raises(IdentityError, match="does not open with this passphrase"):
        CertificateAuthority.load(tmp_path / "ca", "battery staple")
    with pytest.raises(
        IdentityError,
        match=r"ca-key.pem is encrypted: expected its passphrase.*FLEET_CA_PASSPHRASE",
    ):
        CertificateAuthority.load(tmp_path / "ca")


@pytest.mark.usefixtures("authority")
def test_a_key_that_is_not_encrypted_needs_no_passphrase(tmp_path: Path) -> None:
    assert CertificateAuthority.load(tmp_path / "ca", "for another fleet")
