"""What a device reports of each generation, and what workers and devices say of themselves."""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias, TypeVar

import msgpack
import msgspec
from msgspec import Meta, Struct

from fleet.errors import DecodeError, OversizedError
from fleet.protocol.messages import Id

MAX_REPORT_BYTES = 16 * 1024
NOT_YET = "not yet: "  # what a `config_error` begins with that passes by itself
MAX_STATUS_BYTES = 16 * 1024
MAX_RECEIPT_BYTES = 256 * 1024
MAX_RECEIPT_ITEMS = 1024
MAX_LABEL_LENGTH = 200

Amount: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 53)]
Milliseconds: TypeAlias = Annotated[float, Meta(ge=0, le=1e12)]
# Seconds since 1970, UTC, up to the year 9999: what a calendar can show.
Timestamp: TypeAlias = Annotated[float, Meta(ge=0, lt=253_402_300_800)]
Label: TypeAlias = Annotated[str, Meta(max_length=MAX_LABEL_LENGTH)]
Source: TypeAlias = Annotated[str, Meta(pattern=r"\A(exit:[0-9]{1,4}|cloud|fallback|lookup)\Z")]


class Switch(Struct, frozen=True):
    """From the answer's token number `token` on the mode was `mode`, because of `reason`."""

    token: Amount
    mode: Label
    reason: Label


class GenerationReport(Struct, frozen=True, kw_only=True):
    """One answer, counted. `generation` is unique in the fleet, so a report that comes twice counts once.

    With `answers` above 1 it is the sum of so many, made by a device that had no room for all of them. Of `judged`
    tokens that an exit was sure of, the cloud chose the same for `agreed`.
    """

    generation: Id
    app: Id
    request: Id
    session: Id | None
    worker: Id | None
    bundle_id: Id
    mode: Label
    started_at: Timestamp
    prompt_tokens: Amount
    tokens: Amount
    sources: dict[Source, Amount]
    assists: Amount
    bytes_up: Amount
    bytes_down: Amount
    ttft_ms: Milliseconds
    tpot_ms: Milliseconds
    finish_reason: Label
    verifies: Amount = 0
    drafted: Amount = 0
    switches: tuple[Switch, ...] = ()
    answers: Annotated[int, Meta(ge=1, le=1 << 53)] = 1
    judged: Amount = 0
    agreed: Amount = 0


class ReportReceipt(Struct, frozen=True):
    """What has become of a device's reports: none of these generations needs to be sent again.

    `refused` gives the reason why a report can never be stored. A receipt of nothing says that the collector is there.
    """

    stored: tuple[Id, ...] = ()
    refused: dict[Id, Label] = {}


class DeviceStatus(Struct, frozen=True, kw_only=True):
    """Retained birth of a device, and with `online` false its last will.

    `config_version` is that of the desired configuration which it follows, 0 for none; `config_error` says why it
    cannot follow a newer one.
    """

    online: bool
    epoch: Amount
    bundle_id: Label = ""
    version: Label = ""
    mode: Label = ""
    config_version: Amount = 0
    config_error: Label = ""


class WorkerStatus(Struct, frozen=True, kw_only=True):
    """Retained birth of a worker, and with `online` false its last will."""

    online: bool
    epoch: Amount
    bundle_ids: tuple[Label, ...] = ()
    version: Label = ""
    num_sessions: Amount = 0
    draining: bool = False


def encode_report(report: GenerationReport) -> bytes:
    packed: bytes = msgpack.packb(msgspec.to_builtins(report))
    return packed


def decode_report(payload: bytes) -> GenerationReport:
    """Raises OversizedError or DecodeError."""
    if len(payload) > MAX_REPORT_BYTES:
        raise OversizedError(
            f"expected a report of at most {MAX_REPORT_BYTES} bytes, got {len(payload)}"
        )
    try:
        return msgspec.convert(_unpack(payload, max_items=256), GenerationReport)
    except NO_MESSAGE as error:
        raise DecodeError(
            f"expected a generation report, got {len(payload)} bytes that are none: {error}"
        ) from None


def generation_of(payload: bytes) -> str | None:
    """The generation that bytes which are no report speak of, if they do: that much is needed to refuse them."""
    try:
        return msgspec.convert(
            _unpack(payload[:MAX_REPORT_BYTES], max_items=256), _Named
        ).generation
    except NO_MESSAGE:
        return None


def encode_receipt(receipt: ReportReceipt) -> bytes:
    packed: bytes = msgpack.packb(msgspec.to_builtins(receipt))
    return packed


def decode_receipt(payload: bytes) -> ReportReceipt:
    """Raises OversizedError or DecodeError."""
    if len(payload) > MAX_RECEIPT_BYTES:
        raise OversizedError(
            f"expected a receipt of at most {MAX_RECEIPT_BYTES} bytes, got {len(payload)}"
        )
    try:
        return msgspec.convert(_unpack(payload, max_items=MAX_RECEIPT_ITEMS), ReportReceipt)
    except NO_MESSAGE as error:
        raise DecodeError(
            f"expected a receipt, got {len(payload)} bytes that are none: {error}"
        ) from None


class _Named(Struct):
    generation: Id


NO_MESSAGE: Final = (ValueError, RecursionError, msgpack.exceptions.UnpackException)


def _unpack(payload: bytes, max_items: int) -> object:
    value: object = msgpack.unpackb(
        payload,
        max_str_len=4096,
        max_map_len=max_items,
        max_array_len=max_items,
        max_bin_len=0,
        max_ext_len=0,
    )
    return value


def encode_status(status: DeviceStatus | WorkerStatus) -> bytes:
    return msgspec.json.encode(status)


StatusT = TypeVar("StatusT", DeviceStatus, WorkerStatus)


def decode_status(payload: bytes, kind: type[StatusT]) -> StatusT:
    """Raises OversizedError or DecodeError."""
    if len(payload) > MAX_STATUS_BYTES:
        raise OversizedError(
            f"expected a status of at most {MAX_STATUS_BYTES} bytes, got {len(payload)}"
        )
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(
            f"expected a {kind.__name__} in JSON, got {len(payload)} bytes that are none: {error}"
        ) from None
