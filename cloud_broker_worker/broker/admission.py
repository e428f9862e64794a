"""Who may come in: a CONNECT packet and a certificate, judged without touching any session."""

from __future__ import annotations

import hashlib
import secrets
import ssl
from dataclasses import dataclass
from typing import Any, Final

from amqtt.mqtt.connack import NOT_AUTHORIZED, UNACCEPTABLE_PROTOCOL_VERSION
from amqtt.mqtt.connect import ConnectPacket
from amqtt.session import Session

from cloud_broker_worker.broker.packets import Packet
from cloud_broker_worker.broker.rights_cache import CertificateHolder, RightsCache
from fleet.protocol.access import Action

MQTT_3_1_1: Final = 4


@dataclass(frozen=True)
class ConnectRefusal:
    """Why a client stays outside; `code` is CONNACK's."""

    code: int
    reason: str


def admit(
    packet: Packet | None, holder: CertificateHolder | None, rights: RightsCache
) -> Session | ConnectRefusal:
    """The session of a client that has shown the certificate of `holder`, or why it gets none.

    Its client id and user name are the certificate's name. Without a client id it gets one of its own below that name,
    so that ``mosquitto_sub`` and ``mosquitto_pub`` can run side by side with one app's certificate. Every session is
    clean.
    """
    if not isinstance(packet, ConnectPacket):
        return ConnectRefusal(
            NOT_AUTHORIZED, f"expected CONNECT first, got {type(packet).__name__}"
        )
    if packet.proto_name != "MQTT" or packet.proto_level != MQTT_3_1_1:
        return ConnectRefusal(
            UNACCEPTABLE_PROTOCOL_VERSION, f"expected MQTT 3.1.1, got level {packet.proto_level}"
        )
    client_id = None if packet.client_id_is_random else packet.client_id
    name = holder.name if holder else None
    if holder is None or client_id not in (None, name) or packet.username not in (None, name):
        return ConnectRefusal(
            NOT_AUTHORIZED,
            f"certificate of {name!r}, client id {str(client_id)[:80]!r}, user name {str(packet.username)[:80]!r}: "
            "expected one and the same name",
        )
    grants = rights.fresh(holder)
    if grants is None:
        return ConnectRefusal(
            NOT_AUTHORIZED,
            f"{name!r} is not enrolled, not active, or has another certificate now than the one it shows "
            f"(SHA-256 {holder.fingerprint[:16]}...); enroll it with 'fleet enroll {name}'",
        )
    if packet.will_flag and not grants.may(Action.PUBLISH, packet.will_topic or ""):
        return ConnectRefusal(
            NOT_AUTHORIZED, f"{name!r} may not publish its will to {str(packet.will_topic)[:200]!r}"
        )
    session = Session()
    session.client_id = client_id or f"{holder.name}/{secrets.token_hex(8)}"
    session.clean_session = True
    session.keep_alive = packet.keep_alive
    session.will_flag = packet.will_flag
    session.will_topic = packet.will_topic
    session.will_message = packet.will_message
    session.will_qos = packet.will_qos
    session.will_retain = packet.will_retain_flag
    return session


def holder_of(tls: ssl.SSLObject | None) -> CertificateHolder | None:
    """Who has shown a certificate, which TLS has verified: one with exactly one CN."""
    subject: Any = (tls.getpeercert() or {}).get("subject", ()) if tls else ()
    names = [value for attributes in subject for key, value in attributes if key == "commonName"]
    der = tls.getpeercert(binary_form=True) if tls else None
    return (
        CertificateHolder(str(names[0]), hashlib.sha256(der).hexdigest())
        if len(names) == 1 and der
        else None
    )
