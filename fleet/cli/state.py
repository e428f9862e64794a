"""The operator's folder: certificate authority, registry, identities, and where the broker is."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import platformdirs
from msgspec import Meta, Struct

from fleet.access import Role
from fleet.cli.lazy import load
from fleet.errors import ConfigError
from fleet.identity import Identity, ServerTls

if TYPE_CHECKING:
    from fleet.registry.store import Registry

STATE_FILE: Final = "fleet.json"
DEFAULT_PORT: Final = 8883
COLLECTOR: Final = "collector"
WORKER: Final = "worker-1"  # the first of those that `fleet up` starts


class StateConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the broker listens, which bundle the fleet serves, and what it remembers.

    `registry` is the URL of a PostgreSQL database; None is a SQLite file in the folder.
    """

    host: str
    port: Annotated[int, Meta(ge=1, le=65535)]
    bundle: str
    registry: str | None = None
    retention_days: Annotated[int, Meta(ge=1)] = 90


class State:
    """One fleet, as its operator holds it on disk."""

    def __init__(self, folder: Path, config: StateConfig) -> None:
        self.folder = folder
        self.config = config

    @staticmethod
    def default_folder() -> Path:
        """``$FLEET_HOME``, else the user's data folder."""
        home = os.environ.get("FLEET_HOME")
        return Path(home) if home else platformdirs.user_data_path("cecollm-fleet")

    @classmethod
    def load(cls, folder: Path) -> State:
        """Raises ConfigError when there is no fleet in `folder`."""
        path = folder / STATE_FILE
        try:
            return cls(folder, msgspec.json.decode(path.read_bytes(), type=StateConfig))
        except OSError:
            raise ConfigError(
                f"no fleet in {folder}; start one with 'fleet up', or name its folder with --state"
            ) from None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not usable: {error}") from None

    @classmethod
    def create(cls, folder: Path, config: StateConfig) -> State:
        """Makes the folder, or brings an existing one to `config`; identities follow the broker's address."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = cls(folder, config)
        state.registry().close()  # one that cannot be opened is not written down
        path = folder / STATE_FILE
        path.touch(mode=0o600)  # a registry's URL may hold a password
        path.write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")
        authority = load("provisioning.authority").CertificateAuthority
        if not (folder / "ca").exists():
            authority.create(folder / "ca")
        state.identity(COLLECTOR, Role.SERVER)
        state.identity(WORKER, Role.WORKER)
        return state

    def registry(self) -> Registry:
        """Opens the registry; use it as a context manager."""
        where = self.config.registry or self.folder / "registry.sqlite"
        registry: Registry = load("fleet.registry.store").Registry.open(where)
        return registry

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
        authority = load("provisioning.authority").CertificateAuthority.load(self.folder / "ca")
        with self.registry() as registry:
            identity: Identity = load("provisioning.enroll").enroll(
                registry,
                authority,
                name,
                role,
                out,
                host=self.config.host,
                port=self.config.port,
                group=group,
                targets=allow,
                bundle=bundle or Path(self.config.bundle),
            )
        return identity

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
        from fleet.bundle_store import keep_bundle

        authority = load("provisioning.authority").CertificateAuthority.load(self.folder / "ca")
        kept = keep_bundle(source, self.bundles, authority.sign_bundle)
        manifest, num_bytes = kept.manifest, sum(entry.num_bytes for entry in kept.manifest.files)
        with self.registry() as registry:
            registry.add_bundle(manifest.bundle_id, manifest.model.name, num_bytes)
        return manifest.bundle_id

    def server_tls(self) -> ServerTls:
        """The broker's certificate for its host, made anew when missing."""
        authority = load("provisioning.authority").CertificateAuthority.load(self.folder / "ca")
        tls: ServerTls = authority.server_tls(self.folder / "broker", self.config.host)
        return tls

    def identity(self, name: str, role: Role) -> Identity:
        """One of the fleet's own identities, enrolled at its first use and pointed at the broker's address."""
        out = self.folder / "identities" / name
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two commands may need a new identity at once
            if not self.has_identity(name):
                return self.enroll(name, role, out)
        identity = Identity.load(out)
        current = msgspec.structs.replace(
            identity.config, host=self.config.host, port=self.config.port, bundle=self.config.bundle
        )
        if current != identity.config:
            identity = Identity(out, current)
            identity.save()
        return identity

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


def keeping(folder: Path, config: StateConfig, registry: str | None, retention_days: int | None) -> StateConfig:
    """`config` with a registry and retention: those given, else those that the fleet in `folder` already has.

    Raises:
        ConfigError: the fleet has another registry, where everyone was enrolled.
    """
    kept = State.load(folder).config if (folder / STATE_FILE).exists() else None
    if kept and registry not in (None, kept.registry):
        raise ConfigError(
            f"the fleet in {folder} has another registry, where its devices are enrolled; name a new folder with "
            f"--state, or, if the same database has moved, write its URL into {folder / STATE_FILE}"
        )
    return msgspec.structs.replace(
        config,
        registry=kept.registry if kept else registry,
        retention_days=retention_days or (kept or config).retention_days,
    )
