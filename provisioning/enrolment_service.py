"""What the service decides, without HTTP: who joins, who renews, who gets which file of a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fleet.bundles.manifest import MANIFEST_FILE, read_manifest
from fleet.bundles.signature import SIGNATURE_FILE
from fleet.errors import AccessError, BundleError, CredentialsError
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
    """Blocks on the registry and on the disk; any thread may call.

    `find_bundle` gives the folder of a bundle by its id, None where there is none; `crl` the PEM of the newest list of
    revoked certificates, None before there is one. `bundle_id` is of the fleet's bundle, for who is told no other.
    """

    registry: Registry
    authority: CertificateAuthority
    site: FleetAddress
    find_bundle: FindBundle
    crl: Callable[[], str | None] = lambda: None
    bundle_id: str | None = None

    def join(self, request: JoinRequest, peer: str) -> JoinReply:
        """Gives a certificate for a token.

        Raises:
            CsrError: the signing request is not one that we take.
            TokenError, StateError, RegistryError: as `Registry.join`.
        """
        asked = SigningRequest.parse(request.csr)
        claim = Claim(request.id, request.secret, asked.key_hash, asked.name)
        joined = self.registry.join(claim, self._signing(asked), actor=peer)
        role = Role(joined.role)
        config = self.registry.desired_configs([joined.name]).get(
            joined.name, DesiredConfig(0, Settings())
        )
        return JoinReply(
            name=joined.name,
            role=role,
            certificate=joined.pem,
            ca=self.authority.pem,
            host=self.site.host,
            port=self.site.port,
            server=self.site.server or "",
            topic_prefix=PREFIX,
            config=config,
            bundle_id=config.settings.bundle or self.bundle_id if role in SERVING else None,
            shared_subscriptions=self.site.shared_subscriptions,
        )

    def renew(self, request: RenewRequest, fingerprint: str | None) -> RenewReply:
        """Gives a certificate for a new key to whoever has shown the one with `fingerprint`.

        Raises:
            CredentialsError, StateError, TokenNameError, CsrError, RegistryError: as `Registry.renew`.
        """
        asked = SigningRequest.parse(request.csr)
        renewed = self.registry.renew(
            _shown(fingerprint), asked.key_hash, self._signing(asked), csr_name=asked.name
        )
        return RenewReply(renewed.pem)

    def bundle_file(self, bundle_id: str, name: str, fingerprint: str | None) -> Path:
        """The path of a bundle's file, for a device or worker.

        Raises:
            CredentialsError, StateError, RegistryError: as `Registry.role_of`.
            AccessError: whoever asks serves no bundle.
            BundleError: there is no such bundle, or it has no such file.
        """
        who, role = self.registry.role_of(_shown(fingerprint))
        if role not in SERVING:
            raise AccessError(
                f"{who!r} is an identity of the role {role}: expected a device or a worker"
            )
        folder = self.find_bundle(bundle_id) if NAME.fullmatch(bundle_id) else None
        if folder is None:
            raise BundleError(f"no bundle {bundle_id[:80]!r} here; see 'fleet bundle list'")
        names = {
            MANIFEST_FILE,
            SIGNATURE_FILE,
            *(entry.path for entry in read_manifest(folder).files),
        }
        if name not in names or not (folder / name).is_file():
            raise BundleError(
                f"bundle {bundle_id} has no file {name[:80]!r}; its manifest names those that it has"
            )
        return folder / name

    def _signing(self, asked: SigningRequest) -> Callable[[str, Role], IssuedCertificate]:
        return lambda name, role: self.authority.sign(asked.public_key, name, role)


def _shown(fingerprint: str | None) -> str:
    if fingerprint is None:
        raise CredentialsError(
            "expected a client certificate of this fleet, got none; join with 'edge-agent join'"
        )
    return fingerprint
