"""What a device reports of each generation, and what workers and devices say of themselves."""

from __future__ import annotations

from typing import Annotated, TypeAlias, TypeVar

import msgpack
import msgspec
from msgspec import Meta, Struct

from fleet.errors import DecodeError, OversizedError
from fleet.messages import Id

MAX_REPORT_BYTES = 16 * 1024
MAX_STATUS_BYTES = 16 * 1024

Amount: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 53)]
Milliseconds: TypeAlias = Annotated[float, Meta(ge=0, le=1e12)]
# Seconds since 1970, UTC, up to the year 9999: what a calendar can show.
Timestamp: TypeAlias = Annotated[float, Meta(ge=0, lt=253_402_300_800)]
Label: TypeAlias = Annotated[str, Meta(max_length=200)]
Source: TypeAlias = Annotated[str, Meta(pattern=r"\A(exit:[0-9]{1,4}|cloud|fallback|lookup)\Z")]


class Switch(Struct, frozen=True):
    """From the answer's token number `token` on the mode was `mode`, because of `reason`."""

    token: Amount
    mode: Label
    reason: Label


class GenerationReport(Struct, frozen=True):
    """One answer, counted. `generation` is unique in the fleet, so a report that comes twice counts once."""

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


class DeviceStatus(Struct, frozen=True):
    """Retained birth of a device, and with `online` false its last will."""

    online: bool
    epoch: Amount
    bundle_id: Label = ""
    version: Label = ""
    mode: Label = ""


class WorkerStatus(Struct, frozen=True):
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
        raise OversizedError(f"expected a report of at most {MAX_REPORT_BYTES} bytes, got {len(payload)}")
    try:
        raw = msgpack.unpackb(
            payload, max_str_len=4096, max_map_len=256, max_array_len=256, max_bin_len=0, max_ext_len=0
        )
        return msgspec.convert(raw, GenerationReport)
    except (ValueError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise DecodeError(f"expected a generation report, got {len(payload)} bytes that are none: {error}") from None


def encode_status(status: DeviceStatus | WorkerStatus) -> bytes:
    return msgspec.json.encode(status)


StatusT = TypeVar("StatusT", DeviceStatus, WorkerStatus)


def decode_status(payload: bytes, kind: type[StatusT]) -> StatusT:
    """Raises OversizedError or DecodeError."""
    if len(payload) > MAX_STATUS_BYTES:
        raise OversizedError(f"expected a status of at most {MAX_STATUS_BYTES} bytes, got {len(payload)}")
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(
            f"expected a {kind.__name__} in JSON, got {len(payload)} bytes that are none: {error}"
        ) from None
