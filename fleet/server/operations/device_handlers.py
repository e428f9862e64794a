"""Operations on devices."""

from __future__ import annotations

from fleet.identity.enrolment import format_tags
from fleet.operator_api.device_operations import DeviceList, DeviceQuery
from fleet.registry.results import DeviceRow
from fleet.server.operations.context import OperationContext


def list_devices(context: OperationContext, query: DeviceQuery) -> DeviceList:
    """Return a page of devices."""
    rows = [row for row in context.registry.stats.devices() if _matches(row, query)]
    page = rows[: query.limit]
    return DeviceList(devices=page, total=len(rows), next_page=None)


def _matches(row: DeviceRow, query: DeviceQuery) -> bool:
    return (
        (query.search is None or query.search in row.device)
        and (query.group is None or row.group == query.group)
        and (query.tag is None or query.tag in format_tags(row.tags))
        and (query.state is None or row.state == query.state)
        and (query.online is None or row.online == query.online)
    )
