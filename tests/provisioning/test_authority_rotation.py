"""A rotation of the authority: both are trusted, then the successor alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cryptography import x509

from fleet.bundles.signature import check_signature
from fleet.errors import BundleError, StateError
from fleet.identity.identity import CA_FILE
from fleet.protocol.access import Role
from fleet.registry.store import Registry
from provisioning.authority import CertificateAuthority, successor_folder
from provisioning.authority_rotation import (
    check_retirable,
    not_renewed,
    retire_authority,
    rotate_authority,
)
from provisioning.crl import CrlFile
from provisioning.own_certificates import renew_own
from tests.identities import enroll_identity, issue_identity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    CertificateAuthority.create(tmp_path / "ca")
    return tmp_path / "ca"


def issuer(path: Path) -> x509.Name:
    return x509.load_pem_x509_certificate(path.read_bytes()).issuer


def test_the_successor_signs_for_clients_and_the_old_authority_for_servers(
    folder: Path, tmp_path: Path
) -> None:
    old = CertificateAuthority.load(folder)
    both = rotate_authority(folder, None)
    assert both.successor
    assert both.pem == old.pem + both.successor.pem
    client = issue_identity(both, "kitchen", Role.DEVICE, tmp_path / "kitchen")
    server = both.server_tls(tmp_path / "server", "localhost")
    assert (client.folder / CA_FILE).read_text() == server.ca_file.read_text() == both.pem
    assert issuer(client.folder / "cert.pem") != issuer(server.cert_file)
    assert issuer(server.cert_file) == issuer(folder / CA_FILE)


def test_an_authority_has_one_successor(folder: Path) -> None:
    rotate_authority(folder, None)
    with pytest.raises(StateError, match="fleet authority retire"):
        rotate_authority(folder, None)


def test_an_encrypted_authority_has_an_encrypted_successor(tmp_path: Path) -> None:
    CertificateAuthority.create(tmp_path / "ca", "secret")
    rotate_authority(tmp_path / "ca", "secret")
    key = successor_folder(tmp_path / "ca") / "ca-key.pem"
    assert b"ENCRYPTED" in key.read_bytes()


def test_an_authority_is_retired_when_every_identity_is_renewed(
    folder: Path, tmp_path: Path
) -> None:
    with Registry.open(tmp_path / "registry.sqlite") as registry:
        old = CertificateAuthority.load(folder)
        kitchen = enroll_identity(registry, old, "kitchen", Role.DEVICE, tmp_path / "kitchen")
        with pytest.raises(StateError, match="fleet authority rotate"):
            check_retirable(old, [])
        both = rotate_authority(folder, None)
        left = not_renewed(both, registry.identities.newest_certificates())
        assert left == ["kitchen"]
        with pytest.raises(StateError, match=r"1 identities still use .*: kitchen;"):
            check_retirable(both, left)
        renew_own(registry, both, kitchen)
        assert not_renewed(both, registry.identities.newest_certificates()) == []
    successor = retire_authority(folder, [], None)
    assert both.successor
    assert CertificateAuthority.load(folder).pem == successor.pem == both.successor.pem
    assert sorted(path.name for path in folder.parent.glob("ca*")) == ["ca"]


def test_a_bundle_is_signed_by_the_authority_that_all_devices_trust(
    folder: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundles" / "b1"
    bundle.mkdir(parents=True)
    (bundle / "manifest.json").write_text("{}")
    files = {name: tmp_path / f"{name}.pem" for name in ("old", "both", "new")}
    files["old"].write_text(CertificateAuthority.load(folder).pem)
    both = rotate_authority(folder, None)
    files["both"].write_text(both.pem)
    both.sign_bundle(bundle)
    check_signature(bundle, files["old"])
    check_signature(bundle, files["both"])
    files["new"].write_text(retire_authority(folder, [tmp_path / "bundles"], None).pem)
    check_signature(bundle, files["both"])
    check_signature(bundle, files["new"])
    with pytest.raises(BundleError, match="is no signature"):
        check_signature(bundle, files["old"])


@pytest.mark.parametrize("has_moved", [False, True])
def test_a_retirement_that_was_interrupted_is_completed(folder: Path, has_moved: bool) -> None:
    both = rotate_authority(folder, None)
    assert both.successor
    folder.rename(folder.with_name("ca-retired"))
    if has_moved:
        shutil.move(successor_folder(folder), folder)
    assert CertificateAuthority.load(folder).pem == both.successor.pem


def test_the_revocation_list_of_a_rotated_authority_is_of_both(
    folder: Path, tmp_path: Path
) -> None:
    authority = CertificateAuthority.load(folder)
    crl = CrlFile(tmp_path / "crl.pem", authority)
    assert crl.update([], 0.0) is not None
    assert crl.update([], 0.0) is None
    authority.adopt(rotate_authority(folder, None))
    assert crl.update([], 0.0) == frozenset()
    assert crl.path.read_text().count("BEGIN X509 CRL") == 2
    assert crl.update([], 0.0) is None
    authority.adopt(retire_authority(folder, [], None))
    assert crl.update([], 0.0) == frozenset()
    assert crl.path.read_text().count("BEGIN X509 CRL") == 1
