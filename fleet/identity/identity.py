"""An identity folder: name, role, certificate, key, and the address of the broker."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from fleet.errors import ConfigError, IdentityError
from fleet.protocol.access import Role
from fleet.protocol.types import Id, Port
from fleet.utils.atomic_files import write_file
from fleet.utils.host_address import check_host
from fleet.utils.paths import absolute_path, describe_absence
from fleet.utils.text_files import describe_read_error, read_json

IDENTITY_FILE: Final = "identity.json"
CA_FILE: Final = "ca.pem"
CERT_FILE: Final = "cert.pem"
KEY_FILE: Final = "key.pem"
RENEWED_FILE: Final = "renewed.pem"
KEY_LOG: Final = "SSLKEYLOGFILE"
OTHER_FOLDERS: Final = {"manifest.json": "a bundle", "fleet.json": "a fleet"}
PREPARED: Final = {"agent.json", "lost+found"}  # may be in the folder before the identity
JOIN_AGAIN: Final = "join again with a new token"


class IdentityConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of `identity.json`.

    `bundle` is the folder of the model that a device or worker serves. `shared_subscriptions` is
    true if the broker supports them (MQTT 5 section 4.8.2; mosquitto also for 3.1.1). `server` is
    the base URL of the fleet's service, ``https://HOST:PORT``, which renews certificates and
    offers bundles; without it the identity is renewed by hand.
    """

    name: Id
    role: Role
    host: str
    port: Port
    bundle: str | None = None
    shared_subscriptions: bool = False
    server: str | None = None

    def __post_init__(self) -> None:
        """Check the host. A decoder reports the ValueError in its own error."""
        check_host(self.host)


@dataclass(frozen=True)
class Identity:
    """The identity of a process. The private key stays in its file and never shows in a repr."""

    folder: Path
    config: IdentityConfig

    @classmethod
    def load(cls, folder: Path) -> Identity:
        """Load an identity. Raises IdentityError when a file is missing or malformed."""
        path = folder / IDENTITY_FILE
        try:
            config = read_json(path, IdentityConfig, "make one with 'fleet enroll NAME --out DIR'")
        except ConfigError as error:
            raise IdentityError(f"no usable identity in {folder}: {error}") from None
        for name in (CA_FILE, CERT_FILE, KEY_FILE):
            path = folder / name
            if not path.is_file():
                raise IdentityError(
                    f"{path} {describe_absence(path)}; make the identity again with 'fleet enroll'"
                )
        return cls(folder, config)

    def save(self) -> None:
        """Write `identity.json`, but neither certificate nor key. Raises OSError."""
        content = msgspec.json.format(msgspec.json.encode(self.config), indent=2) + b"\n"
        write_file(self.folder / IDENTITY_FILE, content, mode=0o644)

    def check_role(self, role: Role, remedy: str) -> None:
        """Raise ConfigError, which ends with `remedy`, unless the identity has this role."""
        if self.config.role is not role:
            raise ConfigError(
                f"{self.folder} is the identity of {self.config.role.with_article}, "
                f"expected {role.with_article}'s; {remedy}"
            )

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def bundle(self) -> Path | None:
        """The folder of the model that a device or worker serves. Raises ConfigError."""
        return absolute_path(Path(self.config.bundle)) if self.config.bundle else None

    def ssl_context(self) -> ssl.SSLContext:
        """Return a context for TLS 1.2 or later with our certificate; trusts the fleet's CA only.

        Raises:
            IdentityError: the files do not load.
        """
        file = self.folder / CA_FILE
        what = f"the CA certificate of {self.name} in {self.folder}"
        with _loading(what, JOIN_AGAIN, (file,)):
            context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=file)
        self.load_certificate(context)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context

    def load_certificate(self, context: ssl.SSLContext) -> None:
        """Load our certificate and key from disk into `context`; its next connection uses them.

        A pair in `renewed.pem` takes precedence: it is of a renewal that is not complete yet. The
        context also trusts the CA certificates that are on disk now, in addition to those before.
        Raises IdentityError.
        """
        ca, certificate, key = (self.folder / name for name in (CA_FILE, CERT_FILE, KEY_FILE))
        renewed = self.folder / RENEWED_FILE
        what = f"certificate of {self.name} in {self.folder}"
        with _loading(what, JOIN_AGAIN, (key, certificate, ca, renewed)):
            context.load_verify_locations(ca)
            if holds_pair(renewed):
                context.load_cert_chain(renewed)
            else:
                context.load_cert_chain(certificate, key)


def check_identity_folder(folder: Path, name: str | None = None) -> None:
    """Check that the identity `name` may be written into a folder; None stands for any name.

    Raises:
        IdentityError: the folder holds another identity, a bundle, a fleet or other files.
    """
    for file, content in OTHER_FOLDERS.items():
        if (folder / file).exists():
            raise IdentityError(f"{folder} holds {content}; name another folder with --out")
    _check_no_other_files(folder)
    holder = _holder(folder)
    if name and holder and holder != name:
        raise IdentityError(
            f"{folder} is the identity of {holder}, expected that of {name} or a new folder; "
            "name another with --out"
        )


def _check_no_other_files(folder: Path) -> None:
    """Refuse a folder with files, but no identity or part of one. Hidden files do not count."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(name for name in names - PREPARED if not name.startswith("."))
    if others and names.isdisjoint((IDENTITY_FILE, KEY_FILE)):
        raise IdentityError(
            f"{folder} holds other files ({others[0]!r}), expected an identity or an empty folder; "
            "name a new one with --out"
        )


def _holder(folder: Path) -> str | None:
    """Return the name in `identity.json`; None if there is none that can be read."""
    with suppress(ConfigError):
        config: IdentityConfig = read_json(folder / IDENTITY_FILE, IdentityConfig, "")
        return config.name
    return None


@contextmanager
def _loading(what: str, remedy: str, files: Sequence[Path]) -> Iterator[None]:
    """Report that `files` in PEM, which the block loads, do not load, as an IdentityError."""
    try:
        yield
    except OSError as error:  # also of ssl
        raise IdentityError(_load_error(error, what, remedy, files)) from None


def _load_error(error: OSError, what: str, remedy: str, files: Sequence[Path]) -> str:
    if error.filename and error.filename == os.environ.get(KEY_LOG):  # Python opens it
        return (
            f"cannot write {error.filename}, the file of {KEY_LOG}: {error.strerror}; unset "
            f"{KEY_LOG}, or name another file there"
        )
    if isinstance(error, PermissionError):
        file = next((each for each in files if not os.access(each, os.R_OK)), files[0])
        return describe_read_error(file, error, remedy)
    return f"{what} does not load: {error}; {remedy}"


def holds_pair(certificate: Path, key: Path | None = None) -> bool:
    """Whether the files hold a certificate and its key in PEM; one file may hold both.

    Raises:
        OSError: a file is unreadable.
    """
    if not certificate.exists() or not (key or certificate).exists():
        return False
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, password="")
    except ssl.SSLError:
        return False
    return True


@dataclass(frozen=True)
class ServerTls:
    """The files of a server: the CA of its clients, its own certificate and key."""

    ca_file: Path
    cert_file: Path
    key_file: Path

    def ssl_context(self) -> ssl.SSLContext:
        """Return a context for TLS 1.2 or later that requires clients' certificates of the CA.

        Raises:
            IdentityError: the files do not load.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with _loading(f"the CA certificate {self.ca_file}", "restore it", (self.ca_file,)):
            context.load_verify_locations(self.ca_file)
        self.load_certificate(context)
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context

    def load_certificate(self, context: ssl.SSLContext) -> None:
        """Load certificate and key into `context`, for new connections. Raises IdentityError.

        The context also trusts the CA certificates that are on disk now.
        """
        files = (self.key_file, self.cert_file, self.ca_file)
        what = f"the broker's certificate {self.cert_file}"
        with _loading(what, "make it again with 'fleet up'", files):
            context.load_verify_locations(self.ca_file)
            context.load_cert_chain(self.cert_file, self.key_file)
