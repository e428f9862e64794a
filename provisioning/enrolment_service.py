"""The decisions of the service, without HTTP: joining, renewal, and access to files of bundles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fleet.bundles.manifest import MANIFEST_FILE, read_manifest
from fleet.bundles.signature import SIGNATURE_FILE
from fleet.bundles.software import find_software, read_software
from fleet.errors import AccessError, BundleError, CredentialsError, SoftwareError
from fleet.protocol.access import Role
from fleet.protocol.desired_config import DesiredConfig, Settings
from fleet.protocol.enrolment_api import JoinReply, JoinRequest, RenewReply, RenewRequest
from fleet.protocol.topics import NAME, PREFIX
from fleet.registry.identities.tokens import Claim
from fleet.registry.results import IssuedCertificate
from fleet.registry.store import Registry
from provisioning.authority import CertificateAuthority
from provisioning.csr import SigningRequest
from provisioning.fleet_address import FleetAddress

FindBundle = Callable[[str], Path | None]
SERVING = Role.DEVICE, Role.WORKER


@dataclass(frozen=True, kw_only=True)
class EnrolmentService:
    """The service without HTTP. Any thread may call its methods; they wait for registry and disk.

    `find_bundle` returns the folder of the bundle with an id, or None. `crl` returns the newest
    revocation list in PEM, or None. `bundle_id` is the default bundle for devices and workers whose
    configuration names none. `software` is the folder of the versions of the devices' software, or
    None if there are none.
    """

    registry: Registry
    authority: CertificateAuthority
    address: FleetAddress
    find_bundle: FindBundle
    crl: Callable[[], str | None] = lambda: None
    bundle_id: str | None = None
    software: Path | None = None

    def join(self, request: JoinRequest, peer: str) -> JoinReply:
        """Issue a certificate for a token.

        Raises:
            CsrError: the signing request is refused.
            TokenError, StateError, RegistryError: as for `IdentityRepository.join`.
        """
        csr = SigningRequest.parse(request.csr)
        claim = Claim(request.id, request.secret, csr.key_hash, csr.name)
        joined = self.registry.identities.join(claim, self._signer(csr), actor=peer)
        role = Role(joined.role)
        config = self.registry.desired_state.configs([joined.name]).get(
            joined.name, DesiredConfig(0, Settings())
        )
        return JoinReply(
            name=joined.name,
            role=role,
            certificate=joined.pem,
            ca=self.authority.pem,
            host=self.address.host,
            port=self.address.port,
            server=self.address.server or "",
            topic_prefix=PREFIX,
            config=config,
            bundle_id=config.settings.bundle or self.bundle_id if role in SERVING else None,
            shared_subscriptions=self.address.shared_subscriptions,
        )

    def renew(self, request: RenewRequest, fingerprint: str | None) -> RenewReply:
        """Issue a certificate for a new key to the client whose certificate has `fingerprint`.

        Raises:
            CredentialsError, StateError, TokenNameError, RegistryError: as for
                `IdentityRepository.renew`.
            CsrError: the signing request is refused.
        """
        csr = SigningRequest.parse(request.csr)
        renewed = self.registry.identities.renew(
            _checked(fingerprint), csr.key_hash, self._signer(csr), csr_name=csr.name
        )
        return RenewReply(renewed.pem, self.authority.pem)

    def bundle_file(self, bundle_id: str, name: str, fingerprint: str | None) -> Path:
        """Return the path of a bundle's file, for a device or a worker.

        Raises:
            CredentialsError, StateError, RegistryError: as for `IdentityRepository.role_of`.
            AccessError: the client is neither a device nor a worker.
            BundleError: there is no such bundle, or it has no such file.
        """
        self._check_serving(fingerprint)
        folder = self.find_bundle(bundle_id) if NAME.fullmatch(bundle_id) else None
        if folder is None:
            raise BundleError(f"no bundle {bundle_id[:80]!r} here; see 'fleet bundle list'")
        names = {entry.path for entry in read_manifest(folder).files}
        if name not in names | {MANIFEST_FILE, SIGNATURE_FILE} or not (folder / name).is_file():
            raise BundleError(
                f"bundle {bundle_id} has no file {name[:80]!r}; its manifest lists its files"
            )
        return folder / name

    def software_file(self, version: str, name: str, fingerprint: str | None) -> Path:
        """Return the path of a file of a version of the software, for a device or a worker.

        Raises:
            CredentialsError, StateError, RegistryError: as for `IdentityRepository.role_of`.
            AccessError: the client is neither a device nor a worker.
            SoftwareError: there is no such version, or it has no such file.
        """
        self._check_serving(fingerprint)
        folder = find_software(self.software, version) if self.software else None
        if folder is None:
            raise SoftwareError(f"no version {version[:80]!r} here; see 'fleet update list'")
        if name not in (MANIFEST_FILE, SIGNATURE_FILE, read_software(folder).wheel):
            raise SoftwareError(f"version {version} has no file {name[:80]!r}")
        return folder / name

    def _check_serving(self, fingerprint: str | None) -> None:
        client, role = self.registry.identities.role_of(_checked(fingerprint))
        if role not in SERVING:
            raise AccessError(
                f"{client!r} is an identity of the role {role}: expected a device or a worker"
            )

    def _signer(self, csr: SigningRequest) -> Callable[[str, Role], IssuedCertificate]:
        return lambda name, role: self.authority.sign(csr.public_key, name, role)


def _checked(fingerprint: str | None) -> str:
    if fingerprint is None:
        raise CredentialsError(
            "expected a client certificate of this fleet, got none; join with 'edge-agent join'"
        )
    return fingerprint
