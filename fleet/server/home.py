"""The operator's folder: certificate authority, registry, identities and the broker's address."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import logging
import os
import re
import ssl
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta, Struct

from fleet.bundles.manifest import Manifest, read_manifest
from fleet.bundles.software import SoftwareManifest, keep_software
from fleet.bundles.store import delete_bundle, keep_bundle
from fleet.errors import BundleError, ConfigError, FleetError, IdentityError
from fleet.identity.enrolment import Enrolment
from fleet.identity.identity import CA_FILE, Identity, ServerTls
from fleet.protocol.access import Role, is_operator
from fleet.utils.atomic_files import made_folder, write_file
from fleet.utils.host_address import check_host
from fleet.utils.json_text import HALF_PAIR
from fleet.utils.optional_imports import needs
from fleet.utils.paths import absolute_path, user_data_folder
from fleet.utils.printable import HIDDEN, command_line
from fleet.utils.text_files import decode_json, describe_read_error
from provisioning.authority import (
    CertificateAuthority,
    finish_retirement,
    successor_folder,
)
from provisioning.fleet_address import FleetAddress, base_url
from provisioning.own_certificates import is_due, renew_own

if TYPE_CHECKING:
    from fleet.registry.store import Registry
    from provisioning.service import EnrolmentServer

log = logging.getLogger(__name__)

FLEET_FILE: Final = "fleet.json"
REGISTRY_FILE: Final = "registry.sqlite"
DEFAULT_PORT: Final = 8883
DEFAULT_SERVICE_PORT: Final = 8443
HOME: Final = "FLEET_HOME"
PASSPHRASE: Final = "FLEET_CA_PASSPHRASE"
MAX_PASSPHRASE_BYTES: Final = 1023  # the limit of OpenSSL
COLLECTOR: Final = "collector"
GATEWAY: Final = "http-api"  # sends the prompts of the HTTP API
CONSOLE_GATEWAY: Final = "console-gateway"  # sends the prompts of operators
EMBEDDED: Final = "embedded"  # the brokers that `fleet up` starts
MOSQUITTO: Final = "mosquitto"
WORKER: Final = "worker-1"  # the first worker that `fleet up` starts
CRL_CACHE_S: Final = 60
QUOTES: Final = "'\""
MAX_RETENTION_DAYS: Final = 36_500


class FleetConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The broker's address, the bundle that the fleet serves, the registry and its retention.

    `registry` is the URL of a PostgreSQL database; None is a SQLite file in the folder. The HTTPS
    service is at `service_port` (0: no service), on the broker's host unless `service_host` names
    another.
    """

    host: str
    port: Annotated[int, Meta(ge=1, le=65535)]
    bundle: str
    registry: str | None = None
    retention_days: Annotated[int, Meta(ge=1, le=MAX_RETENTION_DAYS)] = 90
    service_port: Annotated[int, Meta(ge=0, le=65535)] = DEFAULT_SERVICE_PORT
    service_host: str | None = None

    def __post_init__(self) -> None:
        """Check hosts and ports. A decoder reports the ValueError in its own error."""
        check_host(self.host)
        if self.service_host is not None:
            check_host(self.service_host)
        if self.port == self.service_port:
            raise ValueError(
                f"broker and service both have port {self.port}; give one of them another, "
                "with --port or --service-port"
            )


class FleetHome:
    """One fleet, as its operator keeps it on disk."""

    def __init__(self, folder: Path, config: FleetConfig) -> None:
        self.folder = folder
        self.config = config
        self._manifests: dict[str, Manifest] = {}  # a bundle never changes

    @staticmethod
    def default_folder() -> Path:
        """``$FLEET_HOME``, else the user's data folder. Raises ConfigError if there is none."""
        home = os.environ.get(HOME)
        return absolute_path(_plain_path(home)) if home else user_data_folder()

    @classmethod
    def find(cls, folder: Path | None) -> Path:
        """Return the absolute path of `folder`, by default `default_folder`."""
        return absolute_path(folder) if folder else cls.default_folder()

    @staticmethod
    def is_fleet(folder: Path) -> bool:
        """Whether there is a fleet in `folder`. Raises PermissionError."""
        try:
            (folder / FLEET_FILE).stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    @classmethod
    def load(cls, folder: Path | None = None) -> FleetHome:
        """Load the fleet in `folder`, by default `default_folder`.

        Raises:
            ConfigError: there is no fleet in the folder, or its configuration is not usable.
            PermissionError: this user may not read it.
        """
        folder = cls.find(folder)
        path = folder / FLEET_FILE
        if not cls.is_fleet(folder):
            raise ConfigError(
                f"no fleet in {folder}; start one with 'fleet up', or name its folder with --home"
            )
        config: FleetConfig = decode_json(path.read_bytes(), str(path), FleetConfig)
        if not Path(config.bundle).is_absolute():  # each command has a current folder of its own
            raise ConfigError(
                f"{path} has the bundle {config.bundle!r}: expected a whole path, which begins "
                "with /; correct it"
            )
        return cls(folder, config)

    @classmethod
    def create(cls, folder: Path, config: FleetConfig) -> FleetHome:
        """Create a fleet in `folder`, or give an existing fleet the configuration `config`.

        The fleet's own identities get the broker's address of `config`.
        """
        passphrase = ca_passphrase()
        home = cls(folder, config)
        with made_folder(folder):
            home.registry().close()  # the registry must open before the file is written
        home.save()
        finish_retirement(home.ca_folder)
        if not home.ca_folder.exists():
            CertificateAuthority.create(home.ca_folder, passphrase)
        home.identity(COLLECTOR, Role.SERVER)
        home.identity(operator_name(1), Role.SERVER)  # so that its first command needs no registry
        home.identity(WORKER, Role.WORKER)
        return home

    def save(self) -> None:
        """Write `fleet.json` (mode 0600: a registry's URL may hold a password)."""
        data = msgspec.json.format(msgspec.json.encode(self.config), indent=2) + b"\n"
        write_file(self.folder / FLEET_FILE, data)

    @property
    def registry_url(self) -> str:
        """The registry's URL, or the path of its SQLite file."""
        return self.config.registry or str(self.folder / REGISTRY_FILE)

    def registry(self, actor: str | None = None) -> Registry:
        """Open the registry; use it as a context manager. `actor` stands in the audit log.

        Raises:
            ConfigError: its file is missing or empty, although there are certificates of its
                identities, or `fleet.json` names it by a relative path.
        """
        with needs("server"):
            from fleet.registry.database import sqlite_file
            from fleet.registry.store import Registry
        file = sqlite_file(self.registry_url)
        if file and not file.is_absolute():
            raise ConfigError(
                f"{self.folder / FLEET_FILE} has the registry {str(file)!r}: expected a URL with "
                "a whole path, or null for the file in the fleet's folder; correct it"
            )
        if file and self.ca_folder.exists() and _is_empty(file):
            raise ConfigError(
                f"the registry {file} is missing or empty; restore a backup with 'fleet restore', "
                f"or, for a new fleet, remove {self.folder}"
            )
        return Registry.open(self.registry_url, actor)

    def authority(self) -> CertificateAuthority:
        """Load the certificate authority; raises IdentityError when its key cannot be opened."""
        return CertificateAuthority.load(self.ca_folder, ca_passphrase())

    @property
    def ca_folder(self) -> Path:
        """The folder of the certificate authority."""
        return self.folder / "ca"

    def trusted_ca(self) -> str:
        """The CA certificates that the fleet trusts, as `CertificateAuthority.pem`.

        Raises:
            IdentityError: there is no certificate authority. Its key is not needed.
        """
        finish_retirement(self.ca_folder)
        try:
            own = (self.ca_folder / CA_FILE).read_text(encoding="utf-8")
            successor = successor_folder(self.ca_folder) / CA_FILE
            return own + (successor.read_text(encoding="utf-8") if successor.exists() else "")
        except OSError as error:
            reason = describe_read_error(Path(error.filename), error, "restore it")
            raise IdentityError(f"no usable certificate authority: {reason}") from None

    def ca_sha256(self) -> str:
        """SHA-256 of the authority's certificate; its key is not needed.

        Raises:
            IdentityError: the file is damaged.
        """
        file = self.ca_folder / CA_FILE
        try:
            pem = file.read_text(encoding="ascii")
            return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()
        except ValueError as error:
            raise IdentityError(
                f"the authority's certificate {file} is damaged: {error}; restore it"
            ) from None

    def address(
        self, bundle: Path | None = None, *, shared_subscriptions: bool = False
    ) -> FleetAddress:
        """The address of this fleet, as identities hold it; `bundle` is the fleet's by default."""
        config = self.config
        host = config.service_host or config.host
        return FleetAddress(
            host=config.host,
            port=config.port,
            server=base_url(host, config.service_port) if config.service_port else None,
            bundle=bundle or Path(config.bundle),
            shared_subscriptions=shared_subscriptions,
        )

    def shares_subscriptions(self) -> bool:
        """Whether the fleet's own workers share their subscriptions, as with mosquitto."""
        return self.identity(WORKER, Role.WORKER).config.shared_subscriptions

    def enroll(
        self,
        name: str,
        role: Role,
        out: Path,
        *,
        group: str | None = None,
        allow: tuple[str, ...] = (),
        bundle: Path | None = None,
    ) -> Identity:
        """Enrol `name` and write its identity folder to `out`; raises IdentityError."""
        enrolment = Enrolment(name=name, role=role, group=group, targets=allow)
        (identity,) = self.enroll_all({out: enrolment}, self.address(bundle))
        return identity

    def enroll_all(
        self, enrolments: Mapping[Path, Enrolment], address: FleetAddress, *, force: bool = False
    ) -> Sequence[Identity]:
        """Enrol all or none, and write a folder for each; raises FleetError."""
        check_own_names(enrolments.values())
        with needs("server"):
            from provisioning.offline_enrolment import enroll_offline
        with self.registry() as registry:
            return enroll_offline(registry, self.authority(), enrolments, address, force=force)

    @property
    def bundles(self) -> Path:
        """The folder of the bundles that the server offers, each in a folder named by its id."""
        return self.folder / "bundles"

    def keep_bundle(self, source: Path) -> str:
        """Copy the bundle in `source` to those that the server offers, sign it, return its id.

        Raises:
            BundleError: a file is missing or altered.
            ConfigError: the fleet's folder cannot be written.
        """
        manifest = keep_bundle(source, self.bundles, self.authority().sign_bundle).manifest
        num_bytes = sum(entry.num_bytes for entry in manifest.files)
        with self.registry() as registry:
            registry.rollouts.add_bundle(manifest.bundle_id, manifest.model.name, num_bytes)
        return manifest.bundle_id

    def remove_bundle(
        self, bundle: str, *, force: bool = False, actor: str | None = None
    ) -> tuple[str, int]:
        """Remove a bundle from those that the server offers; return its id and the freed bytes.

        `actor` stands in the audit log.

        Raises:
            RolloutError: the bundle is unknown or in use, or, without `force`, a roll-out can go
                back to it.
            ConfigError: its files cannot be deleted.
        """
        own = bundle_id_of(Path(self.config.bundle))
        with self.registry(actor) as registry:
            bundle_id = registry.rollouts.remove_bundle(bundle, own_bundle=own, force=force)
        return bundle_id, delete_bundle(self.bundles, bundle_id)

    @property
    def software(self) -> Path:
        """The folder of the devices' software, with a folder for each version."""
        return self.folder / "software"

    def keep_software(self, wheel: Path) -> SoftwareManifest:
        """Copy a wheel to the versions that the server offers, and sign it.

        Raises:
            SoftwareError: it is not a wheel of this project, or a different wheel of the same
                version was added before.
            ConfigError: the fleet's folder cannot be written.
        """
        return keep_software(wheel, self.software, self.authority().sign_bundle)

    def keep_own_bundle(self) -> None:
        """Offer the fleet's own bundle, as `keep_bundle` does.

        If that fails, log the reason: the server still offers the other bundles.
        """
        try:
            self.keep_bundle(Path(self.config.bundle))
        except FleetError as error:
            log.warning("devices cannot fetch the fleet's bundle: %s", error)

    def server_tls(self, folder: Path | None = None) -> ServerTls:
        """Issue the certificate of broker and service in `folder`, by default the fleet's own."""
        hosts = filter(None, (self.config.host, self.config.service_host))
        return self.authority().server_tls(folder or self.folder / "broker", *hosts)

    def bundle_folder(self, bundle_id: str) -> Path | None:
        """The folder of a bundle: one that was added, or the fleet's own."""
        for folder in (self.bundles / bundle_id, Path(self.config.bundle)):
            if bundle_id_of(folder) == bundle_id:
                return folder
        return None

    def bundle_exits(self, bundle_id: str) -> tuple[int, ...] | None:
        """The exits of a bundle; None when the fleet does not have it."""
        manifest = self.bundle_manifest(bundle_id)
        return manifest.exits if manifest else None

    def bundle_manifest(self, bundle_id: str) -> Manifest | None:
        """Return the manifest of a bundle; None if the fleet does not have it.

        Raises:
            BundleError: it is not usable.
        """
        if bundle_id not in self._manifests and (folder := self.bundle_folder(bundle_id)):
            self._manifests[bundle_id] = read_manifest(folder)
        return self._manifests.get(bundle_id)

    def service(
        self, registry: Registry, listen: str, tls: ServerTls, authority: CertificateAuthority
    ) -> EnrolmentServer:
        """Make the HTTPS service; do not start it."""
        with needs("server"):
            from provisioning.enrolment_service import EnrolmentService
            from provisioning.service import EnrolmentServer
        enrolment = EnrolmentService(
            registry=registry,
            authority=authority,
            address=self.address(),
            find_bundle=self.bundle_folder,
            software=self.software,
            crl=_cached_crl(authority, registry),
            bundle_id=bundle_id_of(Path(self.config.bundle)),
        )
        return EnrolmentServer(listen, self.config.service_port, tls, enrolment)

    def identity(self, name: str, role: Role) -> Identity:
        """One of the fleet's own identities, enrolled at its first use.

        Its configuration follows the broker's address.
        """
        out = self.folder / "identities" / name
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two commands may need a new identity at once
            if not self.has_identity(name):
                return self.enroll(name, role, out)
            identity = self._load_or_mend(name, role)
            self._renew_if_due(identity)
        return self._with_current_address(identity)

    def _load_or_mend(self, name: str, role: Role) -> Identity:
        """Load one of the fleet's own identities; make its files again if they are damaged."""
        out = self.folder / "identities" / name
        try:
            return Identity.load(out)
        except IdentityError as error:
            log.warning("an identity of the fleet is made again: %s", error)
            identity = Identity(out, self.address().identity_config(name, role))
            self.certify_again(identity)
            return identity

    def check_not_own(self, name: str) -> None:
        """Raise ConfigError when `name` is an identity of the server's own or an operator's."""
        role = own_role(name)
        if role in (Role.SERVER, Role.GATEWAY):
            folder = self.folder / "identities" / name
            command = ("fleet", "enroll", name, "--role", role, "--force", "--out", folder)
            raise ConfigError(
                f"the fleet cannot work without its own identity {name}; to replace it, so that "
                f"its old certificate is refused, use {command_line(*command)}"
            )

    def certify_again(self, identity: Identity) -> None:
        """Replace key and certificate in an identity's folder, even if they have expired.

        Raises:
            FleetError: the identity is suspended, revoked or not enrolled, or a file cannot be
                used.
        """
        with self.registry() as registry:
            renew_own(registry, self.authority(), identity)

    def _with_current_address(self, identity: Identity) -> Identity:
        current = msgspec.structs.replace(
            identity.config,
            host=self.config.host,
            port=self.config.port,
            bundle=self.config.bundle,
            server=self.address().server,
        )
        if current != identity.config:
            identity = Identity(identity.folder, current)
            identity.save()
        return identity

    def renew_own(self) -> None:
        """Renew the fleet's own identities that are due, for their next connections.

        An identity whose files cannot be used is logged; the others are renewed.
        """
        for folder in sorted((self.folder / "identities").iterdir()):
            try:
                if self.has_identity(folder.name):
                    role = own_role(folder.name) or Identity.load(folder).config.role
                    self.identity(folder.name, role)
            except (IdentityError, PermissionError) as error:
                log.warning("the identity %s is not renewed: %s", folder.name, _reason(error))

    def _renew_if_due(self, identity: Identity) -> None:
        try:
            ca = (identity.folder / CA_FILE).read_text(encoding="utf-8")
            if is_due(identity.folder) or ca != self.trusted_ca():
                self.certify_again(identity)
        except FleetError as error:
            log.warning("the certificate of %s is due and not renewed: %s", identity.name, error)

    def has_identity(self, name: str) -> bool:
        """Whether `name` is one of the fleet's own identities."""
        return (self.folder / "identities" / name / "identity.json").exists()

    @contextmanager
    def operator(self) -> Iterator[Identity]:
        """Lease an operator's identity for the block.

        Each concurrent command has an identity of its own, since a client id has one connection.
        """
        for number in itertools.count(1):
            identity = self.identity(operator_name(number), Role.SERVER)
            with (identity.folder / "lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield identity
                return


def _cached_crl(authority: CertificateAuthority, registry: Registry) -> Callable[[], str]:
    """The revocation list, signed at most once a minute, since any client may request it."""

    @lru_cache(maxsize=1)
    def crl_of(period: int) -> str:
        del period
        return authority.crl(registry.identities.revoked_certificates()).decode()

    return lambda: crl_of(int(time.time() // CRL_CACHE_S))


def create_fleet(folder: Path, config: FleetConfig) -> FleetHome:
    """Create a fleet for an operator; print a note if the authority's key is not encrypted."""
    is_new = not (folder / "ca").exists()
    home = FleetHome.create(folder, config)
    if is_new and not ca_passphrase():
        key = home.ca_folder / "ca-key.pem"
        print(
            f"fleet: {key} is not encrypted (mode 0600); for a fleet with an encrypted key, stop "
            f"this one, delete {home.ca_folder} alone, set {PASSPHRASE}, start again, and enrol "
            "each device again",
            file=sys.stderr,
        )
    return home


def ca_passphrase() -> str | None:
    """Return the passphrase of the authority's key, from the environment; None if there is none.

    Raises:
        ConfigError: the passphrase is too long for OpenSSL, or not in UTF-8. The message does not
            quote the passphrase.
    """
    passphrase = os.environ.get(PASSPHRASE)
    num_bytes = len(os.environb.get(PASSPHRASE.encode(), b""))
    if num_bytes > MAX_PASSPHRASE_BYTES:
        raise ConfigError(
            f"{PASSPHRASE} has {num_bytes:,} bytes, expected at most {MAX_PASSPHRASE_BYTES:,}; "
            "set a shorter one"
        )
    if passphrase and HALF_PAIR.search(passphrase):  # bytes that are not UTF-8
        raise ConfigError(f"{PASSPHRASE} is not in UTF-8; set it in UTF-8")
    return passphrase


def _plain_path(text: str) -> Path:
    """Return the path in ``$FLEET_HOME``.

    Raises:
        ConfigError: it is empty, or has quotes or control characters, as environment files leave.
    """
    if not text.strip() or HIDDEN.search(text) or text[0] in QUOTES or text[-1] in QUOTES:
        raise ConfigError(
            f"{HOME} is {text[:200]!r}: expected a folder's path, without quotes or control "
            "characters around it; correct it where it is set"
        )
    return Path(text)


def own_role(name: str) -> Role | None:
    """The role of a name that the fleet uses for its own identities; None for other names."""
    if name == COLLECTOR or is_operator(name):
        return Role.SERVER
    if name in (GATEWAY, CONSOLE_GATEWAY):
        return Role.GATEWAY
    return Role.WORKER if re.fullmatch(r"worker-\d+", name) else None


def check_own_names(enrolments: Iterable[Enrolment]) -> None:
    """Raise ConfigError when a name of the fleet's own is to be enrolled in a different role."""
    for each in enrolments:
        role = own_role(each.name)
        if role not in (None, each.role):
            raise ConfigError(
                f"{each.name!r} is a name of the fleet's own, with the role {role}: choose another "
                f"name for {each.role.with_article}"
            )


def operator_name(number: int) -> str:
    """The name of an operator's identity, from 1 on."""
    return f"operator-{number}"


def _is_empty(file: Path) -> bool:
    """Whether a file is missing, or has no bytes, as after a loss of power."""
    try:
        return not file.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return True


def _reason(error: IdentityError | PermissionError) -> str:
    if isinstance(error, PermissionError) and error.filename:
        return describe_read_error(Path(error.filename), error, "change its rights")
    return str(error)


def bundle_id_of(folder: Path) -> str | None:
    """The id of the bundle in `folder`; None when there is none."""
    try:
        return read_manifest(folder).bundle_id
    except BundleError:
        return None
