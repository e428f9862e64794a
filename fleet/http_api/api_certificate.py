"""The certificate of an HTTP API, which follows its files."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

from fleet.errors import ConfigError

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
        """Load the files again if they have changed. Raises ConfigError."""
        try:
            files = (self._cert_file, self._key_file)
            changed = tuple(file.stat().st_mtime_ns for file in files)
            if changed != self._loaded:
                self.context.load_cert_chain(self._cert_file, self._key_file)
                self._loaded = changed
        except OSError as error:  # also of ssl
            raise ConfigError(
                f"cannot use the certificate {self._cert_file} with the key {self._key_file}: "
                f"{error.strerror or error}; {REMEDY}"
            ) from None
