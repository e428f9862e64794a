"""Pages of lists that are whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from fleet.errors import ConfigError
from fleet.operator_api.paging import PageQuery

Row = TypeVar("Row")


def page_of(
    rows: Sequence[Row], query: PageQuery, key: Callable[[Row], str]
) -> tuple[list[Row], str | None]:
    """Return the rows of a page, and the key of the next one, None after the last.

    The page begins after the row whose key is `query.after`; if that row is gone, with the first
    one whose key is greater.
    """
    start = 0 if query.after is None else _index_after(rows, query.after, key)
    page = list(rows[start : start + query.limit])
    has_more = start + len(page) < len(rows)
    return page, key(page[-1]) if has_more else None


def _index_after(rows: Sequence[Row], after: str, key: Callable[[Row], str]) -> int:
    keys = list(map(key, rows))
    if after in keys:
        return keys.index(after) + 1
    return next((i for i, each in enumerate(keys) if each > after), len(keys))


def number_of(after: str) -> int:
    """Return the number that a page of numbered rows begins below.

    Raises:
        ConfigError: `after` is no `next_page` of such a list.
    """
    if not (after.isascii() and after.isdecimal() and len(after) < 19):
        raise unknown_page(after)
    return int(after)


def next_number(rows: Sequence[int], limit: int) -> str | None:
    """Return the key of the next page by the numbers of one more row than its limit."""
    return str(rows[limit - 1]) if len(rows) > limit else None


def unknown_page(after: str) -> ConfigError:
    """Return the error for a page that does not exist."""
    return ConfigError(
        f"after {after[:80]!r}: expected the next_page of an earlier response; leave it out to "
        "begin with the first page"
    )
