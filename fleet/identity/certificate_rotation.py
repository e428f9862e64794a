"""When a certificate is due, and a new pair of certificate and key in the place of the old one.

They are two files, and no file system replaces two at once. So both go into one, `renewed.pem`, in one step, and from
then on that is what counts (`Identity.load_certificate`); then each takes its place, and `renewed.pem` goes. A process
that dies anywhere in between leaves a pair that fits, and the next one finishes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fleet.identity.identity import CERT_FILE, KEY_FILE, RENEWED_FILE
from fleet.utils.atomic_files import sync_folder, write_file

DUE: Final = 2 / 3  # of a certificate's life
SPREAD: Final = 1 / 30  # of it, so that devices that joined together do not all ask together


def renewal_in_s(not_before: float, not_after: float, now: float, draw: float = 0.0) -> float:
    """Seconds until a certificate is due, 0 when it is: at two thirds of its life and up to `SPREAD` more by `draw`."""
    return max(0.0, not_before + (not_after - not_before) * (DUE + SPREAD * draw) - now)


def replace_pair(folder: Path, certificate: bytes, key: bytes) -> None:
    """Puts a new certificate and its key (PEM, PKCS 8) in the place of those in `folder`. Raises OSError."""
    write_file(folder / RENEWED_FILE, certificate + key)
    finish_renewal(folder)


def finish_renewal(folder: Path) -> None:
    """Puts key and certificate of `renewed.pem` in their places, if there is one. Raises OSError."""
    renewed = folder / RENEWED_FILE
    if not renewed.exists():
        return
    certificate, key_begin, key = renewed.read_bytes().partition(b"-----BEGIN PRIVATE KEY-----")
    write_file(folder / KEY_FILE, key_begin + key)
    write_file(folder / CERT_FILE, certificate, mode=0o644)
    renewed.unlink()
    sync_folder(folder)
