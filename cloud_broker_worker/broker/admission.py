"""The decision on a CONNECT packet and a certificate; it touches no session."""

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
    """The reason for a refused CONNECT; `code` is CONNACK's."""

    code: int
    reason: str


def admit(
    packet: Packet | None, holder: CertificateHolder | None, rights: RightsCache
) -> Session | ConnectRefusal:
    """Return the session of a client with the certificate of `holder`, or the reason for a refusal.

    Its client id and user name are the certificate's name. A client without a client id gets a
    random one below that name, so that ``mosquitto_sub`` and ``mosquitto_pub`` can run at the same
    time with one app's certificate. Every session is clean.
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
            f"certificate of {name!r}, client id {str(client_id)[:80]!r}, "
            f"user name {str(packet.username)[:80]!r}: expected one and the same name",
        )
    grants = rights.fresh(holder)
    if grants is None:
        return ConnectRefusal(
            NOT_AUTHORIZED,
            f"{name!r} is not enrolled, not active, or now has another certificate than this one "
            f"(SHA-256 {holder.fingerprint[:16]}...); enroll it with 'fleet enroll {name}'",
        )
    if packet.will_flag and not grants.permits(Action.PUBLISH, packet.will_topic or ""):
        return ConnectRefusal(
            NOT_AUTHORIZED, f"{name!r} may not publish its will to {str(packet.will_topic)[:200]!r}"
        )
    return _clean_session(packet, client_id or f"{holder.name}/{secrets.token_hex(8)}")


def _clean_session(packet: ConnectPacket, client_id: str) -> Session:
    session = Session()
    session.client_id = client_id
    session.clean_session = True
    session.keep_alive = packet.keep_alive
    session.will_flag = packet.will_flag
    session.will_topic = packet.will_topic
    session.will_message = packet.will_message
    session.will_qos = packet.will_qos
    session.will_retain = packet.will_retain_flag
    return session


def certificate_holder(tls: ssl.SSLObject | None) -> CertificateHolder | None:
    """Return the holder of a connection's verified certificate, which must have exactly one CN."""
    subject: Any = (tls.getpeercert() or {}).get("subject", ()) if tls else ()
    names = [value for attributes in subject for key, value in attributes if key == "commonName"]
    der = tls.getpeercert(binary_form=True) if tls else None
    if len(names) != 1 or not der:
        return None
    return CertificateHolder(str(names[0]), hashlib.sha256(der).hexdigest())
