"""Offline enrolment: registry, identity folders, and refusals before either changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fleet.errors import ConfigError, FleetError, IdentityError, TopicError
from fleet.identity.identity import Identity
from fleet.protocol.access import Grants, Role
from fleet.registry.store import Registry
from provisioning.authority import CertificateAuthority
from tests.identities import enroll_identity


class OfflineFleet:
    """A registry and an authority; folders have the names of the identities."""

    def __init__(self, registry: Registry, authority: CertificateAuthority, folder: Path) -> None:
        self.registry = registry
        self.folder = folder
        self._authority = authority

    def enroll(self, name: str, role: Role = Role.DEVICE, **options: Any) -> Identity:
        out = options.pop("out", self.folder / name)
        return enroll_identity(self.registry, self._authority, name, role, out, **options)


@pytest.fixture
def fleet(registry: Registry, authority: CertificateAuthority, tmp_path: Path) -> OfflineFleet:
    return OfflineFleet(registry, authority, tmp_path / "out")


def test_the_registry_knows_the_certificate_that_was_written(fleet: OfflineFleet) -> None:
    identity = fleet.enroll("edge-1", group="kitchen")
    certificate = x509.load_pem_x509_certificate((identity.folder / "cert.pem").read_bytes())
    (row,) = fleet.registry.identities.all()
    assert (row.name, row.role, row.group) == ("edge-1", "device", "kitchen")
    assert row.fingerprint == certificate.fingerprint(hashes.SHA256()).hex()
    assert row.not_after == certificate.not_valid_after_utc.timestamp()


def test_an_app_is_allowed_devices_and_groups(fleet: OfflineFleet) -> None:
    fleet.enroll("edge-1", group="kitchen")
    fleet.enroll("edge-2")
    fleet.enroll("phone", Role.APP, targets=["kitchen", "edge-2"])
    assert fleet.registry.identities.grants("phone") == Grants(
        Role.APP, "phone", ("edge-1", "edge-2")
    )


def test_only_devices_and_workers_have_a_bundle(fleet: OfflineFleet, tmp_path: Path) -> None:
    roles = {
        "edge-1": Role.DEVICE,
        "worker-1": Role.WORKER,
        "phone": Role.APP,
        "watcher": Role.SERVER,
    }
    bundles = {
        name: fleet.enroll(name, role, bundle=tmp_path).config.bundle
        for name, role in roles.items()
    }
    assert bundles == {
        "edge-1": str(tmp_path),
        "worker-1": str(tmp_path),
        "phone": None,
        "watcher": None,
    }


def test_an_enrolled_name_is_refused_and_nothing_is_written(
    fleet: OfflineFleet, tmp_path: Path
) -> None:
    fleet.enroll("edge-1")
    with pytest.raises(IdentityError, match="'edge-1' is enrolled already"):
        fleet.enroll("edge-1", out=tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_force_replaces_an_identity(fleet: OfflineFleet) -> None:
    first = fleet.enroll("edge-1")
    old = (first.folder / "cert.pem").read_bytes()
    fleet.enroll("edge-1", force=True)
    assert (first.folder / "cert.pem").read_bytes() != old
    assert len(fleet.registry.identities.all()) == 1


def test_a_folder_that_holds_an_identity_is_refused_and_the_name_stays_free(
    fleet: OfflineFleet,
) -> None:
    fleet.enroll("edge-1")
    with pytest.raises(IdentityError, match="is the identity of edge-1, expected that of edge-2"):
        fleet.enroll("edge-2", out=fleet.folder / "edge-1")
    assert fleet.registry.identities.grants("edge-2") is None


def test_a_folder_that_cannot_be_made_leaves_the_name_free(
    fleet: OfflineFleet, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(IdentityError, match="cannot make the folder"):
        fleet.enroll("edge-1", out=tmp_path / "file" / "edge-1")
    assert fleet.registry.identities.grants("edge-1") is None


@pytest.mark.parametrize(
    ("name", "role", "options", "error", "message"),
    [
        ("Edge 1", Role.DEVICE, {}, TopicError, "expected 1 to 63 characters"),
        ("edge-1", Role.DEVICE, {"group": "a/b"}, TopicError, "group 'a/b'"),
        ("phone", Role.APP, {"targets": ["#"]}, TopicError, "target '#'"),
        ("edge-1", Role.DEVICE, {"targets": ["edge-2"]}, ConfigError, "leave --allow out"),
        ("fleet", Role.DEVICE, {}, ConfigError, "'fleet' stands for any device"),
        ("phone", Role.APP, {"group": "kitchen"}, ConfigError, "leave --group out"),
        ("phone", Role.APP, {"targets": ["attic"]}, IdentityError, "cannot allow 'attic'"),
    ],
)
def test_an_invalid_enrolment_is_refused_and_changes_nothing(
    fleet: OfflineFleet,
    name: str,
    role: Role,
    options: dict[str, Any],
    error: type[FleetError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        fleet.enroll(name, role, **options)
    assert fleet.registry.identities.all() == []
