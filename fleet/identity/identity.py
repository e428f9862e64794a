"""An identity folder: name, role, certificate, key, and how to reach the broker."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from fleet.errors import IdentityError
from fleet.protocol.access import Role
from fleet.protocol.messages import Id

IDENTITY_FILE: Final = "identity.json"
CA_FILE: Final = "ca.pem"
CERT_FILE: Final = "cert.pem"
KEY_FILE: Final = "key.pem"
RENEWED_FILE: Final = "renewed.pem"


class IdentityConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `identity.json` holds. `bundle` is the folder of the model that a device or worker serves.

    `shared_subscriptions` says that the broker has them (MQTT 5 section 4.8.2; mosquitto has them for 3.1.1, too).
    `server` is the base URL of the fleet's service, ``https://HOST:PORT``, where certificates are renewed and bundles
    are; without it the identity is renewed by hand.
    """

    name: Id
    role: Role
    host: str
    port: Annotated[int, Meta(ge=1, le=65535)]
    bundle: str | None = None
    shared_subscriptions: bool = False
    server: str | None = None


@dataclass(frozen=True)
class Identity:
    """Who a process is. The private key stays in its file and never shows in a repr."""

    folder: Path
    config: IdentityConfig

    @classmethod
    def load(cls, folder: Path) -> Identity:
        """Raises IdentityError when a file is missing or `identity.json` is not one."""
        path = folder / IDENTITY_FILE
        try:
            config = msgspec.json.decode(path.read_bytes(), type=IdentityConfig)
        except OSError as error:
            raise IdentityError(
                f"no identity in {folder}: cannot read {IDENTITY_FILE} ({error.strerror}); "
                "make one with 'fleet enroll NAME --out DIR'"
            ) from None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise IdentityError(
                f"{path} is not usable: {error}; make it again with 'fleet enroll'"
            ) from None
        for name in (CA_FILE, CERT_FILE, KEY_FILE):
            if not (folder / name).is_file():
                raise IdentityError(
                    f"{folder / name} is missing; make the identity again with 'fleet enroll'"
                )
        return cls(folder, config)

    def save(self) -> None:
        """Writes `identity.json`; certificate and key are not touched."""
        path = self.folder / IDENTITY_FILE
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self.config), indent=2) + b"\n")

    @property
    def name(self) -> str:
        return self.config.name

    def ssl_context(self) -> ssl.SSLContext:
        """TLS 1.2 or later, our certificate, and only the fleet's own CA trusted.

        Raises:
            IdentityError: the files do not load.
        """
        try:
            context = ssl.create_default_context(
                ssl.Purpose.SERVER_AUTH, cafile=self.folder / CA_FILE
            )
        except (ssl.SSLError, OSError) as error:
            raise IdentityError(
                f"the CA certificate of {self.name} in {self.folder} does not load: {error}; enroll it again"
            ) from None
        self.load_certificate(context)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context

    def load_certificate(self, context: ssl.SSLContext) -> None:
        """Puts our certificate and key, as they are on disk now, into `context`; its next connection uses them.

        `renewed.pem` holds both of a renewal whose files are not in their places yet, and goes before them.

        Raises:
            IdentityError: the files do not load.
        """
        renewed = self.folder / RENEWED_FILE
        try:
            if renewed.exists():
                context.load_cert_chain(renewed)
            else:
                context.load_cert_chain(self.folder / CERT_FILE, self.folder / KEY_FILE)
        except (ssl.SSLError, OSError) as error:
            raise IdentityError(
                f"certificate of {self.name} in {self.folder} does not load: {error}; enroll it again"
            ) from None


@dataclass(frozen=True)
class ServerTls:
    """The files of a server: the CA whose clients it takes, its own certificate and key."""

    ca_file: Path
    cert_file: Path
    key_file: Path

    def ssl_context(self) -> ssl.SSLContext:
        """TLS 1.2 or later, and no client without a certificate of the fleet's own CA.

        Raises:
            IdentityError: the files do not load.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_verify_locations(self.ca_file)
        except (ssl.SSLError, OSError) as error:
            raise IdentityError(
                f"the CA certificate {self.ca_file} does not load: {error}; restore it"
            ) from None
        self.load_certificate(context)
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context

    def load_certificate(self, context: ssl.SSLContext) -> None:
        """Puts certificate and key, as they are on disk now, into `context`; connections from then on see them.

        Raises:
            IdentityError: the files do not load.
        """
        try:
            context.load_cert_chain(self.cert_file, self.key_file)
        except (ssl.SSLError, OSError) as error:
            raise IdentityError(
                f"the broker's certificate {self.cert_file} does not load: {error}; make it again with 'fleet up'"
            ) from None
