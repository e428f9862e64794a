"""Operations on bundles and their roll-outs."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from msgspec.structs import asdict

from fleet.bundles.store import bundle_bytes
from fleet.errors import BundleError
from fleet.operator_api.bundle_operations import (
    LIST_BUNDLES,
    LIST_ROLLOUTS,
    PAUSE_ROLLOUT,
    REMOVE_BUNDLE,
    RENAME_BUNDLE,
    RESUME_ROLLOUT,
    ROLL_BACK,
    SHOW_ROLLOUT,
    START_ROLLOUT,
    BundleList,
    BundleNaming,
    BundleRemoval,
    NamedBundleId,
    RemovedBundle,
    RolloutChoice,
    RolloutKey,
    RolloutList,
    RolloutQuery,
    RolloutStart,
    RolloutUndoing,
    StoredBundle,
)
from fleet.operator_api.operation import NoFields
from fleet.registry.results import BundleRow, RolloutRow
from fleet.registry.rollouts.states import RolloutEvent
from fleet.server.home import FleetHome
from fleet.server.operations.context import Handlers, OperationContext
from fleet.server.operations.pages import next_number, number_of


def _list_bundles(context: OperationContext, _: NoFields) -> BundleList:
    """Return the bundles."""
    rows = context.registry.rollouts.bundles()
    return BundleList(bundles=[_stored(context.home, row) for row in rows])


def _stored(home: FleetHome, row: BundleRow) -> StoredBundle:
    disk_bytes = bundle_bytes(home.bundles, row.bundle_id)
    with suppress(BundleError):  # of files that were damaged since
        if manifest := home.bundle_manifest(row.bundle_id):
            return StoredBundle(
                **asdict(row),
                disk_bytes=disk_bytes,
                exits=manifest.exits,
                prompt_format=manifest.prompt_format,
            )
    return StoredBundle(**asdict(row), disk_bytes=disk_bytes)


def _rename_bundle(context: OperationContext, naming: BundleNaming) -> NamedBundleId:
    """Give a bundle a name. Raises RolloutError."""
    bundle_id = context.registry.rollouts.rename_bundle(naming.bundle, naming.name)
    return NamedBundleId(bundle_id=bundle_id, name=naming.name)


def _remove_bundle(context: OperationContext, removal: BundleRemoval) -> RemovedBundle:
    """Remove a bundle. Raises RolloutError or ConfigError."""
    bundle_id, freed_bytes = context.home.remove_bundle(
        removal.bundle, force=removal.force, actor=context.registry.actor
    )
    return RemovedBundle(bundle_id=bundle_id, freed_bytes=freed_bytes)


def _list_rollouts(context: OperationContext, query: RolloutQuery) -> RolloutList:
    """Return a page of roll-outs."""
    before = None if query.after is None else number_of(query.after)
    rows = context.registry.rollouts.latest(limit=query.limit + 1, before=before)
    next_page = next_number([row.id for row in rows], query.limit)
    return RolloutList(rollouts=rows[: query.limit], next_page=next_page)


def _show_rollout(context: OperationContext, key: RolloutKey) -> RolloutRow:
    """Return one roll-out. Raises UnknownRolloutError."""
    return context.registry.rollouts.get(key.rollout)


def _start_rollout(context: OperationContext, start: RolloutStart) -> RolloutRow:
    """Start a roll-out. Raises RolloutError."""
    rollouts = context.registry.rollouts
    return rollouts.get(rollouts.start(start.bundle, start.plan))


def _pause_rollout(context: OperationContext, choice: RolloutChoice) -> RolloutRow:
    """Pause a roll-out. Raises RolloutError."""
    return _change(context, choice, RolloutEvent.PAUSE)


def _resume_rollout(context: OperationContext, choice: RolloutChoice) -> RolloutRow:
    """Resume a roll-out. Raises RolloutError."""
    return _change(context, choice, RolloutEvent.RESUME)


def _change(context: OperationContext, choice: RolloutChoice, event: RolloutEvent) -> RolloutRow:
    rollouts = context.registry.rollouts
    return rollouts.get(rollouts.change(choice.rollout, event))


def _roll_back(context: OperationContext, undoing: RolloutUndoing) -> RolloutRow:
    """Undo a roll-out, or start the one back. Raises RolloutError."""
    rollouts = context.registry.rollouts
    return rollouts.get(rollouts.roll_back(undoing.rollout, at_once=undoing.at_once))


BUNDLE_HANDLERS: Final[Handlers] = {
    LIST_BUNDLES: _list_bundles,
    RENAME_BUNDLE: _rename_bundle,
    REMOVE_BUNDLE: _remove_bundle,
    LIST_ROLLOUTS: _list_rollouts,
    SHOW_ROLLOUT: _show_rollout,
    START_ROLLOUT: _start_rollout,
    PAUSE_ROLLOUT: _pause_rollout,
    RESUME_ROLLOUT: _resume_rollout,
    ROLL_BACK: _roll_back,
}
