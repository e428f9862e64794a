"""What devices say of themselves and of their answers, written in one transaction each."""

from __future__ import annotations

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from fleet.errors import RegistryError
from fleet.registry.devices import check_device
from fleet.registry.models import GenerationRecord, SessionRecord, StatusRecord, TokenCount
from fleet.report import DeviceStatus, GenerationReport


def store_status(db: Session, device: str, status: DeviceStatus, at: float) -> None:
    """Raises UnknownDeviceError. A last will says no more than that the device is gone."""
    check_device(db, device)
    known = db.get(StatusRecord, device)
    if status.online or known is None:
        db.merge(
            StatusRecord(
                device=device,
                online=status.online,
                epoch=status.epoch,
                bundle_id=status.bundle_id,
                version=status.version,
                mode=status.mode,
                last_seen=at,
            )
        )
    elif known.online:
        known.online, known.last_seen = False, at


def store_report(db: Session, device: str, report: GenerationReport) -> bool:
    """False when it is stored already; raises UnknownDeviceError, and RegistryError when it does not add up."""
    if sum(report.sources.values()) != report.tokens:
        raise RegistryError(
            f"generation {report.generation} counts {report.tokens} tokens, "
            f"but its sources add up to {sum(report.sources.values())}"
        )
    check_device(db, device)
    same = (GenerationRecord.device == device, GenerationRecord.generation == report.generation)
    if db.scalar(select(exists().where(*same))):
        return False
    generation = GenerationRecord(
        device=device,
        generation=report.generation,
        app=report.app,
        request=report.request,
        mode=report.mode,
        bundle_id=report.bundle_id,
        started_at=report.started_at,
        prompt_tokens=report.prompt_tokens,
        tokens=report.tokens,
        assists=report.assists,
        bytes_up=report.bytes_up,
        bytes_down=report.bytes_down,
        ttft_ms=report.ttft_ms,
        tpot_ms=report.tpot_ms,
        finish_reason=report.finish_reason,
        worker=report.worker,
        session_id=_session_id(db, device, report),
    )
    db.add(generation)
    db.flush()
    db.add_all(
        TokenCount(generation_id=generation.id, source=source, tokens=tokens)
        for source, tokens in report.sources.items()
    )
    return True


def _session_id(db: Session, device: str, report: GenerationReport) -> int | None:
    if report.session is None:
        return None
    session = db.scalar(select(SessionRecord).filter_by(device=device, session=report.session))
    session = session or SessionRecord(device=device, session=report.session, opened_at=report.started_at)
    session.opened_at = min(session.opened_at, report.started_at)
    session.worker = report.worker or session.worker
    db.add(session)
    db.flush()
    return session.id
