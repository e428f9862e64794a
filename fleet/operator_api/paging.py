"""Lists in pages, each of which names the next one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final, TypeVar

from msgspec import Meta, Struct
from msgspec.structs import replace

from fleet.errors import ServiceError
from fleet.operator_api.fleet_access import FleetAccess
from fleet.operator_api.operation import Operation

DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 10_000

PageSize = Annotated[int, Meta(ge=1, le=MAX_PAGE)]


class PageQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request for a page; `after` is the `next_page` of the page before."""

    after: str | None = None
    limit: PageSize = DEFAULT_PAGE


class ListPage(Struct, frozen=True, kw_only=True):
    """A part of a list; `next_page` is the `after` of the next part, None after the last one."""

    next_page: str | None


Query = TypeVar("Query", bound=PageQuery)
Page = TypeVar("Page", bound=ListPage)


def walk_pages(
    access: FleetAccess, operation: Operation[Query, Page], query: Query
) -> Iterator[Page]:
    """Yield the pages of a list, from the one of `query` on, each as large as `access` allows.

    Raises:
        FleetError: as the operation.
    """
    query = replace(query, limit=min(query.limit, access.max_page))
    while True:
        page = access.call(operation, query)
        yield page
        if page.next_page is None:
            return
        if page.next_page == query.after:
            raise ServiceError("the server repeats a page without an end; it is faulty")
        query = replace(query, after=page.next_page)
