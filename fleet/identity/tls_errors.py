"""Explanations of TLS failures, with the next step; the same for the broker and the service."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from typing import Final

NOT_YET_VALID: Final = 9  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID
EXPIRED: Final = 10  # OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED


def explain_certificate(error: ssl.SSLCertVerificationError) -> str:
    """Explain why we do not accept a server's certificate."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    if error.verify_code == NOT_YET_VALID:
        return (
            f"its certificate is not valid yet by this machine's clock ({now}), "
            "which is behind; set the clock"
        )
    if error.verify_code == EXPIRED:
        return (
            f"its certificate has expired by this machine's clock ({now}); set the clock if "
            "it is wrong, else the fleet's operator has to start the server again"
        )
    return (
        f"its certificate is not trusted ({error.verify_message}): the connection may be "
        "intercepted, or it is another fleet's; check the address, or join again with a new token"
    )


def depends_on_clock(error: BaseException | None) -> bool:
    """Whether a TLS failure may pass when this machine's clock is set."""
    if not isinstance(error, ssl.SSLCertVerificationError):
        return False
    return error.verify_code in (NOT_YET_VALID, EXPIRED)
