"""The decision on a CONNECT packet and a certificate; it touches no session."""

from __future__ import annotations

import hashlib
import secrets
import ssl
from dataclasses import dataclass
from typing import Any

from cloud_broker_worker.broker.packets import (
    MQTT_3_1_1,
    ClientPacket,
    ConnectCode,
    ConnectPacket,
)
from cloud_broker_worker.broker.rights_cache import CertificateHolder, RightsCache
from fleet.protocol.access import Grants


@dataclass(frozen=True)
class Admission:
    """An admitted client: the holder of its certificate, its role's rights and its client id."""

    holder: CertificateHolder
    grants: Grants
    client_id: str
    packet: ConnectPacket


@dataclass(frozen=True)
class ConnectRefusal:
    """The reason for a refused CONNECT."""

    code: ConnectCode
    reason: str


async def admit(
    packet: ClientPacket | None, holder: CertificateHolder | None, rights: RightsCache
) -> Admission | ConnectRefusal:
    """Decide on a client with the certificate of `holder`.

    Its client id and user name are the certificate's name. A client without a client id gets a
    random one below that name, so that ``mosquitto_sub`` and ``mosquitto_pub`` can run at the same
    time with one app's certificate.
    """
    if not isinstance(packet, ConnectPacket):
        got = type(packet).__name__ if packet else "the end of the connection"
        return ConnectRefusal(ConnectCode.NOT_AUTHORIZED, f"expected CONNECT first, got {got}")
    if packet.protocol != "MQTT" or packet.level != MQTT_3_1_1:
        return ConnectRefusal(ConnectCode.UNACCEPTABLE_VERSION, _version_reason(packet))
    names = {packet.client_id or None, packet.username, None}
    if holder is None or names - {None, holder.name}:
        name = holder.name if holder else None
        return ConnectRefusal(
            ConnectCode.NOT_AUTHORIZED,
            f"certificate of {name!r}, client id {packet.client_id[:80]!r}, "
            f"user name {str(packet.username)[:80]!r}: expected one and the same name",
        )
    grants = await rights.read(holder)
    if grants is None:
        return _refuse_unknown(holder, rights)
    client_id = packet.client_id or f"{holder.name}/{secrets.token_hex(8)}"
    return Admission(holder, grants, client_id, packet)


def _version_reason(packet: ConnectPacket) -> str:
    version = "MQTT 5" if packet.level == 5 else f"{packet.protocol[:20]!r} level {packet.level}"
    return f"expected MQTT 3.1.1, got {version}; choose version 3.1.1 in the client"


def _refuse_unknown(holder: CertificateHolder, rights: RightsCache) -> ConnectRefusal:
    if rights.is_registry_away:
        return ConnectRefusal(
            ConnectCode.UNAVAILABLE,
            f"the rights of {holder.name!r} are unknown, and the registry cannot be read",
        )
    return ConnectRefusal(
        ConnectCode.NOT_AUTHORIZED,
        f"{holder.name!r} is not enrolled, not active, or now has another certificate than this "
        f"one (SHA-256 {holder.fingerprint[:16]}...); see 'fleet identities': "
        f"'fleet resume {holder.name}' if it is suspended, else 'fleet enroll {holder.name}'",
    )


def certificate_holder(tls: ssl.SSLObject | None) -> CertificateHolder | None:
    """Return the holder of a connection's verified certificate, which must have exactly one CN."""
    subject: Any = (tls.getpeercert() or {}).get("subject", ()) if tls else ()
    names = [value for attributes in subject for key, value in attributes if key == "commonName"]
    der = tls.getpeercert(binary_form=True) if tls else None
    if len(names) != 1 or not der:
        return None
    return CertificateHolder(str(names[0]), hashlib.sha256(der).hexdigest())
