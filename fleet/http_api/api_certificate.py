"""The certificate of an HTTP API, which follows its files."""

from __future__ import annotations

import logging
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509

from fleet.errors import ConfigError

log = logging.getLogger(__name__)

REMEDY: Final = (
    "expected a certificate, with those that lead to its authority, and its key, both in PEM"
)


class ApiCertificate:
    """A context for TLS 1.2 or later with the certificate and the key in two files."""

    def __init__(self, cert_file: Path, key_file: Path) -> None:
        """Load the files. Raises ConfigError."""
        self._cert_file = cert_file
        self._key_file = key_file
        self._loaded: tuple[int, ...] = ()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.follow()

    def follow(self) -> None:
        """Load the files again if they have changed. If they cannot be used, the old ones stay.

        Raises:
            ConfigError: a file is missing or unusable, or one of the pair is not replaced yet.
        """
        try:
            files = (self._cert_file, self._key_file)
            changed = tuple(file.stat().st_mtime_ns for file in files)
            if changed != self._loaded:
                # OpenSSL drops the old key from a context that gets another certificate.
                self._load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
                self._load_into(self.context)
                self._loaded = changed
                self._check_dates()
        except OSError as error:  # also of ssl
            raise ConfigError(
                f"cannot use the certificate {self._cert_file} with the key {self._key_file}: "
                f"{error.strerror or error}; {REMEDY}"
            ) from None

    def _load_into(self, context: ssl.SSLContext) -> None:
        # Without a callback, OpenSSL asks for a passphrase in the terminal, and waits.
        context.load_cert_chain(self._cert_file, self._key_file, self._refuse_passphrase)

    def _refuse_passphrase(self) -> str:
        raise ConfigError(
            f"the key {self._key_file} is encrypted, and a server that starts by itself has no "
            "passphrase; decrypt it with 'openssl pkey -in KEY -out NEW', mode 0600, and name NEW"
        )

    def _check_dates(self) -> None:
        """Log a certificate that clients refuse now, because of its dates."""
        try:
            certificate = x509.load_pem_x509_certificate(self._cert_file.read_bytes())
        except ValueError:  # OpenSSL reads more than this library
            return
        begin = certificate.not_valid_before_utc
        end = certificate.not_valid_after_utc
        if not begin <= datetime.now(UTC) <= end:
            log.warning(
                "clients refuse the certificate %s: it is valid from %s to %s; replace it, "
                "or set the clock",
                self._cert_file,
                f"{begin:%Y-%m-%d %H:%M} UTC",
                f"{end:%Y-%m-%d %H:%M} UTC",
            )
