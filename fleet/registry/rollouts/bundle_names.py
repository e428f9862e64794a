"""Names of bundles: a bundle by its id, its name, or the beginning of its id."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.errors import RolloutError
from fleet.registry.models import BundleRecord
from fleet.registry.results import bundle_label

MAX_SHOWN: Final = 80
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
HEX: Final = re.compile(r"[0-9A-Fa-f]+")
PREFIX: Final = re.compile(r"[0-9a-f]{4,31}")


def matching_ids(text: str, names: Mapping[str, str | None]) -> list[str]:
    """Return the ids that a text stands for; `names` has the name of each id.

    The text is an id, else a name, else at least 4 hex digits that ids begin with. A name has
    other letters, too, so hex digits may be capitals.
    """
    if HEX.fullmatch(text):
        text = text.lower()
    if text in names:
        return [text]
    named = [each for each, name in names.items() if name == text]
    if named or not PREFIX.fullmatch(text):
        return named
    return sorted(each for each in names if each.startswith(text))


def find_bundle(db: Session, text: str) -> BundleRecord:
    """Return a bundle, given its id, its name or the beginning of its id.

    Raises:
        RolloutError: no bundle matches, or several do; the message names the bundles.
    """
    offered = select(BundleRecord).where(BundleRecord.removed_at.is_(None))
    records = {
        record.bundle_id: record for record in db.scalars(offered.order_by(BundleRecord.bundle_id))
    }
    ids = matching_ids(text, {each.bundle_id: each.name for each in records.values()})
    if len(ids) == 1:
        return records[ids[0]]
    if ids:
        raise RolloutError(
            f"bundle {text!r} is ambiguous: {_labels(records, ids)}; give more digits, or a name"
        )
    raise RolloutError(
        f"unknown bundle {text[:MAX_SHOWN]!r}: there are {_labels(records, records) or 'none'}; "
        "add it with 'fleet bundle add DIR'"
    )


def _labels(records: Mapping[str, BundleRecord], ids: Collection[str]) -> str:
    return ", ".join(bundle_label(each, records[each].name) for each in ids)


def check_new_name(db: Session, name: str, bundle_id: str) -> None:
    """Raise RolloutError unless a bundle may have this name."""
    if not NAME.fullmatch(name):
        raise RolloutError(
            f"name {name[:MAX_SHOWN]!r}: expected at most 63 letters, digits, dots, hyphens and "
            "underscores, of which the first is a letter or a digit"
        )
    if HEX.fullmatch(name):
        raise RolloutError(f"name {name!r}: it could be the beginning of an id; add a letter")
    other = db.scalar(select(BundleRecord.bundle_id).where(BundleRecord.name == name))
    if other not in (None, bundle_id):
        raise RolloutError(
            f"name {name!r} is that of bundle {other}; choose another name, or rename that bundle"
        )
