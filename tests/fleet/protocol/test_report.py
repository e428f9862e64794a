"""Reports of generations, receipts, and statuses."""

from typing import Any

import msgpack
import msgspec
import pytest

from fleet.errors import DecodeError, OversizedError
from fleet.protocol.report import (
    MAX_RECEIPT_BYTES,
    MAX_REPORT_BYTES,
    MAX_STATUS_BYTES,
    ConfigProblem,
    DeviceLoad,
    DeviceStatus,
    GenerationReport,
    ReportReceipt,
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

REPORT = GenerationReport(
    generation="g1",
    app="app",
    request="r1",
    session="s1",
    worker="w1",
    bundle_id="b1",
    mode="collaborative",
    started_at=1_700_000_000.5,
    prompt_tokens=12,
    tokens=4,
    sources={"exit:8": 1, "exit:15": 1, "cloud": 1, "fallback": 1},
    assists=2,
    bytes_up=4096,
    bytes_down=512,
    ttft_ms=81.5,
    tpot_ms=12.25,
    finish_reason="stop",
)


def altered(**changes: Any) -> bytes:
    packed: bytes = msgpack.packb(msgspec.to_builtins(REPORT) | changes)
    return packed


def test_a_report_comes_back_as_it_was() -> None:
    assert decode_report(encode_report(REPORT)) == REPORT


def test_a_report_of_a_generation_without_a_session_comes_back_as_it_was() -> None:
    alone = msgspec.structs.replace(REPORT, session=None, worker=None, mode="standalone")
    assert decode_report(encode_report(alone)) == alone


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": -1},
        {"tokens": 1 << 60},
        {"tokens": "4"},
        {"sources": {"exit:8; drop table": 1}},
        {"sources": {"cloud\n": 1}},
        {"sources": {"cloud": -1}},
        {"generation": "../g"},
        {"generation": "g1\n"},
        {"app": "A"},
        {"ttft_ms": -1.0},
        {"ttft_ms": float("nan")},
        {"tpot_ms": float("inf")},
        {"started_at": float("nan")},
        {"started_at": -1.0},
        {"started_at": 1e15},
        {"mode": "m" * 201},
    ],
)
def test_a_report_with_a_value_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DecodeError, match="expected a generation report"):
        decode_report(altered(**changes))


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", b"hello", b"\x80", b"\x91" * 10_000, altered() + b"x"]
)
def test_bytes_that_are_no_report_are_refused(payload: bytes) -> None:
    with pytest.raises(DecodeError, match="expected a generation report"):
        decode_report(payload)


def test_a_report_that_is_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(OversizedError, match=f"got {MAX_REPORT_BYTES + 1}"):
        decode_report(bytes(MAX_REPORT_BYTES + 1))


def test_a_report_without_a_number_of_answers_is_one_answer() -> None:
    old = {name: value for name, value in msgspec.to_builtins(REPORT).items() if name != "answers"}
    assert decode_report(msgpack.packb(old)).answers == 1


@pytest.mark.parametrize(
    ("payload", "generation"),
    [
        (altered(tokens=-1), "g1"),
        (altered(generation="../g"), None),
        (msgpack.packb({"generation": "g2"}), "g2"),
        (b"\xc1", None),
        (b"\x91" * 10_000, None),
        (altered(app="a" * MAX_REPORT_BYTES), None),
    ],
)
def test_the_generation_is_read_from_a_payload_that_is_no_report(
    payload: bytes, generation: str | None
) -> None:
    assert generation_of(payload) == generation


@pytest.mark.parametrize(
    "receipt",
    [
        ReportReceipt(),
        ReportReceipt(("g1", "g2")),
        ReportReceipt(("g1",), {"g3": "does not add up"}),
    ],
)
def test_a_receipt_comes_back_as_it_was(receipt: ReportReceipt) -> None:
    assert decode_receipt(encode_receipt(receipt)) == receipt


@pytest.mark.parametrize(
    "raw",
    [[], {"stored": "g1"}, {"stored": ["../g"]}, {"refused": {"g1": 7}}, {"stored": ["g"] * 2000}],
)
def test_a_payload_that_is_no_receipt_is_refused(raw: object) -> None:
    with pytest.raises(DecodeError, match="expected a receipt"):
        decode_receipt(msgpack.packb(raw))


def test_a_receipt_that_is_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(OversizedError, match=f"got {MAX_RECEIPT_BYTES + 1}"):
        decode_receipt(bytes(MAX_RECEIPT_BYTES + 1))


@pytest.mark.parametrize(
    "status",
    [
        DeviceStatus(online=True, epoch=7, bundle_id="b1", version="0.1.0", mode="collaborative"),
        DeviceStatus(online=False, epoch=7),
        DeviceStatus(
            online=True,
            epoch=7,
            config_error=ConfigProblem("service_away", "no answer", is_final=False),
        ),
        WorkerStatus(
            online=True, epoch=3, bundle_ids=("b1", "b2"), version="0.1.0", num_sessions=5
        ),
        WorkerStatus(online=False, epoch=3),
    ],
)
def test_a_status_comes_back_as_it_was(status: DeviceStatus | WorkerStatus) -> None:
    decoded: DeviceStatus | WorkerStatus
    if isinstance(status, DeviceStatus):
        decoded = decode_status(encode_status(status), DeviceStatus)
    else:
        decoded = decode_status(encode_status(status), WorkerStatus)
    assert decoded == status


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", None),
        ("not yet: no answer", ConfigProblem("unknown", "not yet: no answer", is_final=False)),
        ("no room", ConfigProblem("unknown", "no room", is_final=False)),
    ],
)
def test_the_text_of_an_older_device_is_a_problem_that_is_not_final(
    text: str, problem: ConfigProblem | None
) -> None:
    payload = msgspec.json.encode({"online": True, "epoch": 1, "config_error": text})
    assert decode_status(payload, DeviceStatus).config_error == problem


@pytest.mark.parametrize(
    "problem", [7, [], {"code": "x"}, {"code": "x", "message": "x" * 201, "is_final": True}]
)
def test_a_status_with_a_malformed_problem_is_refused(problem: object) -> None:
    payload = msgspec.json.encode({"online": True, "epoch": 1, "config_error": problem})
    with pytest.raises(DecodeError, match="expected a DeviceStatus in JSON"):
        decode_status(payload, DeviceStatus)


@pytest.mark.parametrize(
    "payload",
    [
        b"{}",
        b"offline",
        b'{"online": "yes", "epoch": 1}',
        b'{"online": true, "epoch": -1}',
        b'{"online": true, "epoch": 99999999999999999999999}',
        b'{"online": true, "epoch": 1, "mode": "\xff"}',
        b'{"online":' + b"[" * 10_000,
    ],
)
def test_bytes_that_are_no_status_are_refused(payload: bytes) -> None:
    with pytest.raises(DecodeError, match="expected a DeviceStatus in JSON"):
        decode_status(payload, DeviceStatus)


def test_a_load_comes_back_as_it_was_and_other_bytes_are_refused() -> None:
    load = DeviceLoad(num_running=2, num_waiting=7)
    assert decode_load(encode_load(load)) == load
    assert decode_load(b'{"later": 1}') == DeviceLoad()
    for payload in (b"", b"busy", b"[]", b'{"num_running": -1}', b'{"num_waiting": "x"}'):
        with pytest.raises(DecodeError, match="expected a DeviceLoad in JSON"):
            decode_load(payload)
    with pytest.raises(OversizedError, match="a load of at most"):
        decode_load(bytes(1000))


def test_a_status_that_was_cleared_is_offline() -> None:
    assert decode_status(b"", DeviceStatus) == DeviceStatus(online=False, epoch=0)
    assert decode_status(b"", WorkerStatus) == WorkerStatus(online=False, epoch=0)


def test_a_status_that_is_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(OversizedError, match=f"got {MAX_STATUS_BYTES + 1}"):
        decode_status(bytes(MAX_STATUS_BYTES + 1), WorkerStatus)
