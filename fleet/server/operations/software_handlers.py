"""Operations on the software of devices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from fleet.bundles.software import kept_versions
from fleet.errors import SoftwareError
from fleet.operator_api.operation import NoFields
from fleet.operator_api.software_operations import (
    LIST_UPDATES,
    LIST_VERSIONS,
    ROLL_OUT_VERSION,
    DesiredVersion,
    UpdateList,
    UpdateQuery,
    UpdateRow,
    UpdateState,
    VersionList,
    VersionRollout,
    VersionRow,
)
from fleet.protocol.desired_config import DesiredConfig
from fleet.registry.results import DeviceRow
from fleet.registry.targets import Scope, Target
from fleet.server.operations.context import Handlers, OperationContext
from fleet.server.operations.pages import page_of


def _list_versions(context: OperationContext, _: NoFields) -> VersionList:
    """Return the versions."""
    kept = kept_versions(context.home.software)
    return VersionList(versions=_version_rows(kept, _update_rows(context)))


def _list_updates(context: OperationContext, query: UpdateQuery) -> UpdateList:
    """Return a page of the devices' software."""
    rows = [row for row in _update_rows(context) if query.group in (None, row.group)]
    updates, next_page = page_of(rows, query, lambda row: row.device)
    return UpdateList(updates=updates, next_page=next_page)


def _roll_out_version(context: OperationContext, rollout: VersionRollout) -> DesiredVersion:
    """Make a version the software of a target.

    Raises:
        SoftwareError: the version is unknown, has failed, or lacks an earlier stage.
        ConfigError, TopicError, UnknownDeviceError: there is no such target.
    """
    target = Target.parse(rollout.target)
    version = rollout.version
    versions = kept_versions(context.home.software)
    if version not in versions:
        raise SoftwareError(
            f"no version {version[:80]!r} here, but {', '.join(versions) or 'none'}; "
            "add it with 'fleet update add WHEEL'"
        )
    if target.scope is not Scope.DEVICE and not rollout.force:
        _check_stage(version, _update_rows(context), is_last=target.scope is Scope.ALL)
    number = context.registry.desired_state.roll_out_software(target, version)
    return DesiredVersion(target=str(target), version=number, software=version)


def _check_stage(version: str, rows: Iterable[UpdateRow], *, is_last: bool) -> None:
    """Refuse the next stage of a roll-out that has failed, or the last one without an earlier one.

    Raises:
        SoftwareError: a device has failed to run `version`, or none runs it yet and `is_last`.
    """
    concerned = [row for row in rows if row.desired == version]
    failed = [row for row in concerned if row.state is UpdateState.FAILED]
    if failed:
        raise SoftwareError(
            f"{failed[0].device} does not run version {version}: {failed[0].problem}; "
            "correct that, or give --force"
        )
    if is_last and not any(row.state is UpdateState.CURRENT for row in concerned):
        raise SoftwareError(
            f"no device runs version {version} yet: expected an earlier stage, such as "
            f"'fleet update rollout {version} --group GROUP'; wait for it, or give --force"
        )


def _update_rows(context: OperationContext) -> list[UpdateRow]:
    """Return the software of every device, by name."""
    devices = context.registry.stats.devices()
    configs = context.registry.desired_state.configs()
    return [_update_row(row, configs[row.device]) for row in devices if row.device in configs]


def _update_row(row: DeviceRow, config: DesiredConfig) -> UpdateRow:
    desired = config.software
    error = row.software_error
    is_newest = row.config_version == config.version  # else the error is that of an earlier one
    if desired is None:
        state = UpdateState.OWN
    elif desired == row.version:
        state = UpdateState.CURRENT
    elif error and error.is_final and is_newest:
        state = UpdateState.FAILED
    else:
        state = UpdateState.PENDING
    return UpdateRow(
        device=row.device,
        group=row.group,
        online=row.online,
        version=row.version,
        desired=desired,
        state=state,
        problem=error.message if error else "",
    )


def _version_rows(kept: Sequence[str], updates: Sequence[UpdateRow]) -> list[VersionRow]:
    """Return the versions that are kept, then others that devices run."""
    others = sorted({row.version for row in updates if row.version} - {*kept})
    return [
        VersionRow(
            version=version,
            is_kept=version in kept,
            running=sum(row.version == version for row in updates),
            desired=sum(row.desired == version for row in updates),
            failed=sum(
                row.desired == version and row.state is UpdateState.FAILED for row in updates
            ),
        )
        for version in [*kept, *others]
    ]


SOFTWARE_HANDLERS: Final[Handlers] = {
    LIST_VERSIONS: _list_versions,
    LIST_UPDATES: _list_updates,
    ROLL_OUT_VERSION: _roll_out_version,
}
