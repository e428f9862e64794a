"""Certificate rotation: the time of renewal, and the replacement of a certificate and its key.

Certificate and key are two files, and no file system replaces two at once. So both are written to
one file, `renewed.pem`, in one step, which takes precedence from then on
(`Identity.load_certificate`). Then each file is replaced and `renewed.pem` removed. A process that
dies at any point leaves a matching pair, and the next process completes the replacement.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from fleet.identity.identity import CERT_FILE, KEY_FILE, RENEWED_FILE, holds_pair
from fleet.utils.atomic_files import sync_folder, write_file

DUE: Final = 2 / 3  # of a certificate's life
SPREAD: Final = 1 / 30  # of its life: devices that joined together must not renew together

log = logging.getLogger(__name__)


def renewal_in_s(not_before: float, not_after: float, now: float, draw: float = 0.0) -> float:
    """Return the seconds until a certificate is due; 0 if it is due now.

    It is due at `DUE` of its life and up to `SPREAD` later; `draw` is a number from [0, 1).
    """
    return max(0.0, not_before + (not_after - not_before) * (DUE + SPREAD * draw) - now)


def replace_pair(folder: Path, certificate: bytes, key: bytes) -> None:
    """Replace the certificate and key (PEM, PKCS 8) in `folder`. Raises OSError."""
    write_file(folder / RENEWED_FILE, certificate + key)
    finish_renewal(folder)


def finish_renewal(folder: Path) -> None:
    """Complete a replacement that was interrupted, if there is one. Raises OSError.

    A `renewed.pem` that holds no pair, as after a loss of power, is removed.
    """
    renewed = folder / RENEWED_FILE
    if not renewed.exists():
        return
    if not holds_pair(renewed):
        log.warning("%s holds no certificate with its key; it is removed", renewed)
        renewed.unlink(missing_ok=True)
        return
    certificate, key_begin, key = renewed.read_bytes().partition(b"-----BEGIN PRIVATE KEY-----")
    write_file(folder / KEY_FILE, key_begin + key)
    write_file(folder / CERT_FILE, certificate, mode=0o644)
    renewed.unlink(missing_ok=True)
    sync_folder(folder)
