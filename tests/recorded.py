"""Messages of every kind on the wire, recorded from real components, and their readers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Final, NamedTuple, TypeAlias

import msgpack
import msgspec
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from fleet.bundles.manifest import Bundle
from fleet.errors import DecodeError, FleetError, PromptError, ProtocolError, TokenError
from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.protocol.codec import (
    decode_to_device,
    decode_to_worker,
    encode,
    pack_chunk,
    unpack_chunk,
)
from fleet.protocol.desired_config import DesiredConfig, Settings, decode_desired, encode_desired
from fleet.protocol.enrolment_api import (
    EnrolmentToken,
    JoinReply,
    JoinRequest,
    RenewReply,
    RenewRequest,
    ServiceProblem,
    decode_body,
)
from fleet.protocol.hidden_states import INT8
from fleet.protocol.messages import (
    PROTOCOL,
    Close,
    Context,
    ContextChunk,
    Open,
    Sampling,
    ToDevice,
    ToWorker,
    Verify,
)
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import ChatMessage, PromptRequest, decode_reply, parse_prompt
from fleet.protocol.report import (
    DeviceStatus,
    WorkerStatus,
    decode_load,
    decode_receipt,
    decode_report,
    decode_status,
    encode_load,
    encode_receipt,
    encode_report,
    encode_status,
    generation_of,
)
from tests.system.memory_fleet import DEVICE, WAIT_S, WORKER, MemoryFleet, memory_fleet

HIDDEN_SIZE: Final = 64  # of the tiny model
BY_HAND: Final = "edge-2"
Reader: TypeAlias = tuple[Callable[[bytes], object], type[FleetError]]


class Recorded(NamedTuple):
    """A recorded message, on a topic or, with an empty topic, over HTTPS or made by hand.

    `kind` is a message's type within a session, and else a name of our own.
    """

    kind: str
    topic: str
    payload: bytes


# Reading, and making bytes again of what was read.


def chunks_of(messages: Iterable[ToWorker | ToDevice]) -> list[ContextChunk]:
    """All context, whether it came by itself or with a question."""
    return [m.chunk for m in messages if isinstance(m, Context | Verify) and m.chunk]


def _session(payload: bytes, decode: Callable[[bytes], ToWorker | ToDevice]) -> None:
    message = decode(payload)
    encode(message)
    for chunk in chunks_of([message]):
        unpack_chunk(chunk, HIDDEN_SIZE)


def _report(payload: bytes) -> None:
    generation_of(payload)
    encode_report(decode_report(payload))


def _body(kind: type[msgspec.Struct]) -> Reader:
    return lambda payload: msgspec.json.encode(decode_body(payload, kind)), DecodeError


SESSION: Final[list[Reader]] = [
    (lambda payload: _session(payload, decode_to_worker), ProtocolError),
    (lambda payload: _session(payload, decode_to_device), ProtocolError),
]
SESSION_KINDS: Final = frozenset(
    kind.__name__.lower() for kind in (*ToWorker.__args__, *ToDevice.__args__)
)
READERS: Final[dict[str, list[Reader]]] = dict.fromkeys(SESSION_KINDS, SESSION) | {
    "prompt": [(lambda payload: msgspec.json.encode(parse_prompt(payload)), PromptError)],
    "reply": [(lambda payload: msgspec.json.encode(decode_reply(payload)), PromptError)],
    "device status": [
        (lambda payload: encode_status(decode_status(payload, DeviceStatus)), ProtocolError)
    ],
    "load": [(lambda payload: encode_load(decode_load(payload)), ProtocolError)],
    "worker status": [
        (lambda payload: encode_status(decode_status(payload, WorkerStatus)), ProtocolError)
    ],
    "stats": [(_report, ProtocolError)],
    "reported": [(lambda payload: encode_receipt(decode_receipt(payload)), ProtocolError)],
    "config": [(lambda payload: encode_desired(decode_desired(payload)), ProtocolError)],
    "enrolment token": [
        (lambda payload: str(EnrolmentToken.parse(payload.decode(errors="replace"))), TokenError)
    ],
    "join request": [_body(JoinRequest)],
    "join reply": [_body(JoinReply)],
    "renew request": [_body(RenewRequest)],
    "renew reply": [_body(RenewReply)],
    "problem": [_body(ServiceProblem)],
}
"""Who reads each kind, and what they may raise; a message of a session, both sides."""


# Recording.


def record(bundle: Bundle) -> list[Recorded]:
    """Record the messages of a device and a worker with the tiny `bundle`, and of a join."""
    said: SimpleQueue[tuple[str, bytes]] = SimpleQueue()
    with memory_fleet() as fleet:
        fleet.watcher.subscribe("ce/#", lambda topic, payload: said.put((topic, payload)))
        fleet.start_worker(bundle)
        fleet.start_device(bundle)
        for request in _requests():
            with suppress(PromptError):
                fleet.ask(request)
        fleet.reports.get(timeout=WAIT_S)
        _talk_by_hand(fleet, bundle.manifest.bundle_id)
    everything = [said.get() for _ in range(said.qsize())]
    recorded = [Recorded(_kind(topic, payload), topic, payload) for topic, payload in everything]
    return recorded + [Recorded(kind, "", payload) for kind, payload in _joining().items()]


def _requests() -> tuple[PromptRequest, ...]:
    chat = (
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "What are rivers, \u00e4hm \u2603 \U0001f30a?"),
    )
    return (
        PromptRequest(prompt="How warm is it?", threshold=1.0, max_new_tokens=8),
        PromptRequest(
            messages=chat,
            mode=Mode.VERIFIED,
            threshold=0.05,
            max_new_tokens=16,
            temperature=0.7,
            seed=3,
        ),
        PromptRequest(
            prompt="0123456789",
            mode=Mode.AUTO,
            target_tpot_ms=0.01,
            min_agreement=0.5,
            max_new_tokens=16,
        ),
        PromptRequest(prompt="It has two exits.", thresholds=(0.5,) * 9),  # the reply is an error
    )


def _talk_by_hand(fleet: MemoryFleet, bundle_id: str) -> None:
    """Messages of a device that provoke the remaining messages of a worker."""
    session = "s1"
    rows = np.random.default_rng(0).standard_normal((4, HIDDEN_SIZE)).astype(np.float16)
    answers: SimpleQueue[bytes] = SimpleQueue()
    fleet.watcher.subscribe(
        topics.to_device(BY_HAND, session), lambda _, payload: answers.put(payload)
    )
    opening = Open(
        session=session,
        epoch=1,
        bundle_id=bundle_id,
        protocol=PROTOCOL,
        sampling=Sampling(),
        max_positions=64,
        deadline_ms=1000,
    )
    fleet.watcher.publish(topics.open_session(BY_HAND), encode(opening))
    answers.get(timeout=WAIT_S)
    for messages in (
        (
            Context(session, pack_chunk(0, 0, rows, INT8)),
            Context(session, pack_chunk(0, 0, rows)),
        ),  # twice: received
        (Context(session, pack_chunk(0, 9, rows)),),  # some are missing: gap
        (Close(session), Context(session, pack_chunk(0, 0, rows))),  # of no session: refused
    ):
        for message in messages:
            fleet.watcher.publish(topics.to_worker(WORKER, BY_HAND, session), encode(message))
        answers.get(timeout=WAIT_S)


def _kind(topic: str, payload: bytes) -> str:
    first, *rest = topic.removeprefix(f"{topics.PREFIX}/").split("/")
    if rest[1:] == ["status"]:
        return "worker status" if first == "w" else "device status"
    if first == "d" and rest[1] != "s":
        return rest[1]
    fields: dict[str, Any] = msgpack.unpackb(payload)
    return str(fields["type"])


def _joining() -> dict[str, bytes]:
    """A signing request stands for certificates, too, which are PEM as it is."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, DEVICE)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name)
    pem = (
        request.sign(ec.generate_private_key(ec.SECP256R1()), SHA256())
        .public_bytes(Encoding.PEM)
        .decode()
    )
    token = EnrolmentToken("5e" * 32, "0123456789abcdef", "c0" * 32)
    config = DesiredConfig(
        7, Settings(mode=Mode.AUTO, thresholds=(0.5, 1.0), target_tpot_ms=40.0, bundle="b1")
    )
    reply = JoinReply(
        name=DEVICE,
        role=Role.DEVICE,
        certificate=pem,
        ca=pem,
        host="fleet.example",
        port=8883,
        server="https://fleet.example:8443",
        topic_prefix=topics.PREFIX,
        config=config,
        bundle_id="b1",
    )
    bodies = {
        "join request": JoinRequest(token.id, token.secret, pem),
        "join reply": reply,
        "renew request": RenewRequest(pem),
        "renew reply": RenewReply(pem),
        "problem": ServiceProblem(TokenError.code, "that token was used; ask for another one"),
    }
    said = {kind: msgspec.json.encode(body) for kind, body in bodies.items()}
    return said | {"config": encode_desired(config), "enrolment token": str(token).encode()}
