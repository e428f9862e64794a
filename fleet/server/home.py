"""The operator's folder: certificate authority, registry, identities, and where the broker is."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import logging
import os
import ssl
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import platformdirs
from msgspec import Meta, Struct

from fleet.bundles.manifest import read_manifest
from fleet.errors import BundleError, ConfigError, FleetError
from fleet.identity.enrolment import Enrolment
from fleet.identity.identity import CA_FILE, Identity, ServerTls
from fleet.protocol.access import Role
from fleet.utils.optional_imports import load

if TYPE_CHECKING:
    from fleet.registry.store import Registry

log = logging.getLogger(__name__)

STATE_FILE: Final = "fleet.json"
DEFAULT_PORT: Final = 8883
DEFAULT_SERVICE_PORT: Final = 8443
PASSPHRASE: Final = "FLEET_CA_PASSPHRASE"
COLLECTOR: Final = "collector"
EMBEDDED: Final = "amqtt"  # the brokers that `fleet up` starts
MOSQUITTO: Final = "mosquitto"
WORKER: Final = "worker-1"  # the first of those that `fleet up` starts


class FleetConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the broker listens, which bundle the fleet serves, and what it remembers.

    `registry` is the URL of a PostgreSQL database; None is a SQLite file in the folder. The HTTPS service is at
    `service_port`, 0 is none, and on the broker's host unless `service_host` says another.
    """

    host: str
    port: Annotated[int, Meta(ge=1, le=65535)]
    bundle: str
    registry: str | None = None
    retention_days: Annotated[int, Meta(ge=1)] = 90
    service_port: Annotated[int, Meta(ge=0, le=65535)] = DEFAULT_SERVICE_PORT
    service_host: str | None = None


class FleetHome:
    """One fleet, as its operator holds it on disk."""

    def __init__(self, folder: Path, config: FleetConfig) -> None:
        self.folder = folder
        self.config = config

    @staticmethod
    def default_folder() -> Path:
        """``$FLEET_HOME``, else the user's data folder."""
        home = os.environ.get("FLEET_HOME")
        return Path(home) if home else platformdirs.user_data_path("cecollm-fleet")

    @classmethod
    def load(cls, folder: Path) -> FleetHome:
        """Raises ConfigError when there is no fleet in `folder`."""
        path = folder / STATE_FILE
        try:
            return cls(folder, msgspec.json.decode(path.read_bytes(), type=FleetConfig))
        except OSError:
            raise ConfigError(
                f"no fleet in {folder}; start one with 'fleet up', or name its folder with --home"
            ) from None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not usable: {error}") from None

    @classmethod
    def create(cls, folder: Path, config: FleetConfig) -> FleetHome:
        """Makes the folder, or brings an existing one to `config`; identities follow the broker's address."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = cls(folder, config)
        state.registry().close()  # one that cannot be opened is not written down
        path = folder / STATE_FILE
        path.touch(mode=0o600)  # a registry's URL may hold a password
        path.write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")
        authority = load("provisioning.authority").CertificateAuthority
        if not (folder / "ca").exists():
            authority.create(folder / "ca", os.environ.get(PASSPHRASE))
        state.identity(COLLECTOR, Role.SERVER)
        state.identity(WORKER, Role.WORKER)
        return state

    def registry(self) -> Registry:
        """Opens the registry; use it as a context manager."""
        where = self.config.registry or self.folder / "registry.sqlite"
        registry: Registry = load("fleet.registry.store").Registry.open(where)
        return registry

    def authority(self) -> Any:
        """The certificate authority, its key opened by ``$FLEET_CA_PASSPHRASE`` where it is encrypted.

        Raises:
            IdentityError: it is missing, or its key cannot be opened.
        """
        authority = load("provisioning.authority").CertificateAuthority
        return authority.load(self.folder / "ca", os.environ.get(PASSPHRASE))

    def ca_sha256(self) -> str:
        """SHA-256 of the authority's certificate; its key is not needed."""
        pem = (self.folder / "ca" / CA_FILE).read_text()
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()

    def site(self, bundle: Path | None = None, *, shared_subscriptions: bool = False) -> Any:
        """Where identities find this fleet."""
        module = load("provisioning.fleet_address")
        config = self.config
        host = config.service_host or config.host
        server = module.base_url(host, config.service_port) if config.service_port else None
        return module.Site(
            config.host, config.port, server, bundle or Path(config.bundle), shared_subscriptions
        )

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
        """Enrols `name` and writes its identity folder to `out`; raises IdentityError when the name is taken."""
        (identity,) = self.enroll_all(
            {out: Enrolment(name=name, role=role, group=group, targets=allow)}, self.site(bundle)
        )
        return identity

    def enroll_all(
        self, enrolments: Mapping[Path, Enrolment], site: Any, *, force: bool = False
    ) -> Sequence[Identity]:
        """Enrols all or none, and writes a folder for each; raises FleetError when one of them cannot be."""
        with self.registry() as registry:
            identities: Sequence[Identity] = load("provisioning.offline_enrolment").enroll_all(
                registry, self.authority(), enrolments, site, force=force
            )
        return identities

    @property
    def bundles(self) -> Path:
        """Where the bundles lie that the server hands out, each in a folder of its id's name."""
        return self.folder / "bundles"

    def keep_bundle(self, source: Path) -> str:
        """Takes the bundle in `source` among those that the server hands out, signed by the fleet; gives its id.

        Raises:
            BundleError: a file is missing or altered.
            ConfigError: the fleet's folder cannot be written.
        """
        from fleet.bundles.store import keep_bundle

        kept = keep_bundle(source, self.bundles, self.authority().sign_bundle)
        manifest = kept.manifest
        num_bytes = sum(entry.num_bytes for entry in kept.manifest.files)
        with self.registry() as registry:
            registry.add_bundle(manifest.bundle_id, manifest.model.name, num_bytes)
        return manifest.bundle_id

    def server_tls(self, folder: Path | None = None) -> ServerTls:
        """The certificate of broker and service for their hosts, made anew in `folder`, by default the fleet's own."""
        hosts = filter(None, (self.config.host, self.config.service_host))
        tls: ServerTls = self.authority().server_tls(folder or self.folder / "broker", *hosts)
        return tls

    def bundle_folder(self, bundle_id: str) -> Path | None:
        """Where a bundle of that id is: among those that were added, or the fleet's own."""
        for folder in (self.bundles / bundle_id, Path(self.config.bundle)):
            if bundle_id_of(folder) == bundle_id:
                return folder
        return None

    def service(self, registry: Registry, listen: str, tls: ServerTls) -> Any:
        """The HTTPS service, not yet started."""
        authority = self.authority()

        @lru_cache(maxsize=1)
        def crl_of_minute(minute: int) -> str:
            del minute  # anybody may ask, and signing costs something
            return str(authority.crl(registry.revoked_certificates()).decode())

        office = load("provisioning.enrolment_service").EnrolmentService(
            registry=registry,
            authority=authority,
            site=self.site(),
            find_bundle=self.bundle_folder,
            crl=lambda: crl_of_minute(int(time.time() // 60)),
            bundle_id=bundle_id_of(Path(self.config.bundle)),
        )
        return load("provisioning.service").EnrolmentServer(
            listen, self.config.service_port, tls, office
        )

    def identity(self, name: str, role: Role) -> Identity:
        """One of the fleet's own identities, enrolled at its first use and pointed at the broker's address."""
        out = self.folder / "identities" / name
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two commands may need a new identity at once
            if not self.has_identity(name):
                return self.enroll(name, role, out)
            identity = Identity.load(out)
            self._renew_if_due(identity)
        current = msgspec.structs.replace(
            identity.config,
            host=self.config.host,
            port=self.config.port,
            bundle=self.config.bundle,
            server=self.site().server,
        )
        if current != identity.config:
            identity = Identity(out, current)
            identity.save()
        return identity

    def renew_own(self) -> None:
        """Renews those of the fleet's own identities that are due; who uses one takes it at the next connection."""
        for folder in sorted((self.folder / "identities").iterdir()):
            if self.has_identity(folder.name):
                self.identity(folder.name, Identity.load(folder).config.role)

    def _renew_if_due(self, identity: Identity) -> None:
        renewal = load("provisioning.own_certificates")
        if not renewal.is_due(identity.folder):
            return
        try:
            with self.registry() as registry:
                renewal.renew_own(registry, self.authority(), identity)
        except FleetError as error:
            log.warning("the certificate of %s is due and not renewed: %s", identity.name, error)

    def has_identity(self, name: str) -> bool:
        """Whether that is one of the fleet's own."""
        return (self.folder / "identities" / name / "identity.json").exists()

    @contextmanager
    def operator(self) -> Iterator[Identity]:
        """Leases an operator's identity: one per command that runs at a time, since a client id connects once."""
        for number in itertools.count(1):
            identity = self.identity(f"operator-{number}", Role.SERVER)
            with (identity.folder / "lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield identity
                return


def create_fleet(folder: Path, config: FleetConfig) -> FleetHome:
    """`FleetHome.create` for an operator, who is told once when the authority's key lies there as it is."""
    is_new = not (folder / "ca").exists()
    state = FleetHome.create(folder, config)
    if is_new and not os.environ.get(PASSPHRASE):
        key = folder / "ca" / "ca-key.pem"
        print(
            f"fleet: {key} is not encrypted (mode 0600); set {PASSPHRASE} before the first start",
            file=sys.stderr,
        )
    return state


def bundle_id_of(folder: Path) -> str | None:
    """The id of the bundle in `folder`; None when there is none."""
    try:
        return read_manifest(folder).bundle_id
    except BundleError:
        return None


def keeping(
    folder: Path, config: FleetConfig, registry: str | None, retention_days: int | None
) -> FleetConfig:
    """`config` with a registry and retention: those given, else those that the fleet in `folder` already has.

    Raises:
        ConfigError: the fleet has another registry, where everyone was enrolled.
    """
    kept = FleetHome.load(folder).config if (folder / STATE_FILE).exists() else None
    if kept and registry not in (None, kept.registry):
        raise ConfigError(
            f"the fleet in {folder} has another registry, where its devices are enrolled; name a new folder with "
            f"--home, or, if the same database has moved, write its URL into {folder / STATE_FILE}"
        )
    return msgspec.structs.replace(
        config,
        registry=kept.registry if kept else registry,
        retention_days=retention_days or (kept or config).retention_days,
    )
