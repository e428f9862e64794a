"""Reports of generations, their receipts, and the statuses of devices and workers."""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

import msgpack
import msgspec
from msgspec import Meta, Struct

from fleet.errors import DecodeError, FleetError, OversizedError
from fleet.protocol.counts import GenerationCounts
from fleet.protocol.types import MAX_LABEL_LENGTH, Amount, Id, Label, Milliseconds, Timestamp
from fleet.utils.validation import JSON_ERRORS

MAX_REPORT_BYTES: Final = 16 * 1024
MAX_REPORT_ITEMS: Final = 256
MAX_STATUS_BYTES: Final = 16 * 1024
MAX_LOAD_BYTES: Final = 256
MAX_RECEIPT_BYTES: Final = 256 * 1024
MAX_RECEIPT_ITEMS: Final = 1024

UNKNOWN_CODE: Final = "unknown"
"""The code of a `ConfigProblem` that an older device published as a plain text."""


class Switch(Struct, frozen=True):
    """A change to `mode` at the answer's token number `token`, with its reason."""

    token: Amount
    mode: Label
    reason: Label


class GenerationReport(GenerationCounts, frozen=True, kw_only=True):
    """The counts of one answer, or the sum of `answers` of them.

    `generation` is unique in the fleet, so that a report that arrives twice counts once. A device
    adds reports up when it has no room for all of them; the times of a sum are means.
    """

    generation: Id
    app: Id
    request: Id
    session: Id | None
    worker: Id | None
    bundle_id: Id
    mode: Label
    started_at: Timestamp
    ttft_ms: Milliseconds
    tpot_ms: Milliseconds
    finish_reason: Label
    switches: tuple[Switch, ...] = ()
    answers: Annotated[int, Meta(ge=1, le=1 << 53)] = 1


class ReportReceipt(Struct, frozen=True):
    """The generations of a device that it need not send again.

    `refused` gives the reason why a report can never be stored. An empty receipt means that the
    collector is running.
    """

    stored: tuple[Id, ...] = ()
    refused: dict[Id, Label] = {}


class ConfigProblem(Struct, frozen=True):
    """The reason why a device does not follow its desired configuration, or drops events.

    With `is_final` the device has abandoned this version; otherwise it tries again by itself.
    """

    code: Label
    message: Label
    is_final: bool

    @classmethod
    def of(cls, error: FleetError, *, is_final: bool = True) -> ConfigProblem:
        """Return the problem with an error's code and text."""
        return cls(error.code, str(error)[:MAX_LABEL_LENGTH], is_final)


class DeviceStatus(Struct, frozen=True, kw_only=True):
    """The retained birth message of a device, and with `online` false its last will.

    `config_version` is the version of the desired configuration that the device follows, 0 for
    none; `config_error` is the reason why it does not follow a newer one. `software_error` is the
    reason why it does not run the desired version of its software. `event_error` is the reason why
    it dropped an event: the first one of a minute, until the configuration changes.
    """

    online: bool
    epoch: Amount
    bundle_id: Label = ""
    version: Label = ""
    mode: Label = ""
    config_version: Amount = 0
    config_error: ConfigProblem | None = None
    software_error: ConfigProblem | None = None
    event_error: ConfigProblem | None = None


class DeviceLoad(Struct, frozen=True, kw_only=True):
    """The requests that a device has: those that it answers now, and those that wait."""

    num_running: Amount = 0
    num_waiting: Amount = 0


class WorkerStatus(Struct, frozen=True, kw_only=True):
    """The retained birth message of a worker, and with `online` false its last will."""

    online: bool
    epoch: Amount
    bundle_ids: tuple[Label, ...] = ()
    version: Label = ""
    num_sessions: Amount = 0
    draining: bool = False
    weights: Label = ""


def encode_report(report: GenerationReport) -> bytes:
    """Return a report as a msgpack map."""
    packed: bytes = msgpack.packb(msgspec.to_builtins(report))
    return packed


def decode_report(payload: bytes) -> GenerationReport:
    """Return the report in a payload.

    Raises:
        OversizedError: it is too long.
        DecodeError: it is no report.
    """
    _check_size(payload, MAX_REPORT_BYTES, "a report")
    try:
        return msgspec.convert(_unpack(payload, MAX_REPORT_ITEMS), GenerationReport)
    except UNREADABLE as error:
        raise DecodeError(
            f"expected a generation report, got {len(payload)} unreadable bytes: {error}"
        ) from None


def generation_of(payload: bytes) -> str | None:
    """Return the generation named in bytes that are no report, so that it can be refused."""
    try:
        items = _unpack(payload[:MAX_REPORT_BYTES], MAX_REPORT_ITEMS)
        return msgspec.convert(items, _Named).generation
    except UNREADABLE:
        return None


def encode_receipt(receipt: ReportReceipt) -> bytes:
    """Return a receipt as a msgpack map."""
    packed: bytes = msgpack.packb(msgspec.to_builtins(receipt))
    return packed


def decode_receipt(payload: bytes) -> ReportReceipt:
    """Return the receipt in a payload.

    Raises:
        OversizedError: it is too long.
        DecodeError: it is no receipt.
    """
    _check_size(payload, MAX_RECEIPT_BYTES, "a receipt")
    try:
        return msgspec.convert(_unpack(payload, MAX_RECEIPT_ITEMS), ReportReceipt)
    except UNREADABLE as error:
        raise DecodeError(
            f"expected a receipt, got {len(payload)} unreadable bytes: {error}"
        ) from None


class _Named(Struct):
    generation: Id


UNREADABLE: Final = (ValueError, RecursionError, msgpack.exceptions.UnpackException)


def _check_size(payload: bytes, max_bytes: int, kind: str) -> None:
    if len(payload) > max_bytes:
        raise OversizedError(f"expected {kind} of at most {max_bytes} bytes, got {len(payload)}")


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
    """Return a status as JSON."""
    return msgspec.json.encode(status)


StatusT = TypeVar("StatusT", DeviceStatus, WorkerStatus)


def decode_status(payload: bytes, kind: type[StatusT]) -> StatusT:
    """Return the status in a payload; of an empty one, which clears a retained status, offline.

    Raises:
        OversizedError: it is too long.
        DecodeError: it is no status.
    """
    if not payload:
        return kind(online=False, epoch=0)
    _check_size(payload, MAX_STATUS_BYTES, "a status")
    try:
        return msgspec.convert(_upgraded(msgspec.json.decode(payload)), kind)
    except JSON_ERRORS as error:
        raise DecodeError(
            f"expected a {kind.__name__} in JSON, got {len(payload)} unreadable bytes: {error}"
        ) from None


def encode_load(load: DeviceLoad) -> bytes:
    """Return a load as JSON."""
    return msgspec.json.encode(load)


def decode_load(payload: bytes) -> DeviceLoad:
    """Return the load in a payload.

    Raises:
        OversizedError: it is too long.
        DecodeError: it is no load.
    """
    _check_size(payload, MAX_LOAD_BYTES, "a load")
    try:
        return msgspec.json.decode(payload, type=DeviceLoad)
    except JSON_ERRORS as error:
        raise DecodeError(
            f"expected a DeviceLoad in JSON, got {len(payload)} unreadable bytes: {error}"
        ) from None


def _upgraded(fields: object) -> object:
    """Turn a text in `config_error`, of an older device, into a problem that is not final."""
    if isinstance(fields, dict) and isinstance(text := fields.get("config_error"), str):
        problem = {"code": UNKNOWN_CODE, "message": text, "is_final": False}
        return fields | {"config_error": problem if text else None}
    return fields
