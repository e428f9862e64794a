"""Pages of devices agree with a filter in Python, on each database."""

from __future__ import annotations

import itertools
import random
import time

from fleet.identity.enrolment import format_tags
from fleet.protocol.access import Role
from fleet.protocol.report import DeviceStatus
from fleet.registry.results import DeviceRow
from fleet.registry.stats.device_pages import DeviceFilter
from fleet.registry.store import Registry
from tests.fleet.conftest import add, report

FILTERS = (
    DeviceFilter(),
    DeviceFilter(search="1"),
    DeviceFilter(search="D1"),
    DeviceFilter(search="%"),
    DeviceFilter(search="_"),
    DeviceFilter(search="'\"\\"),
    DeviceFilter(group="house"),
    DeviceFilter(group="none"),
    DeviceFilter(tag="floor=1"),
    DeviceFilter(tag="floor"),
    DeviceFilter(state="active"),
    DeviceFilter(state="suspended"),
    DeviceFilter(state="expired"),
    DeviceFilter(state="nonsense"),
    DeviceFilter(online=True),
    DeviceFilter(online=False),
    DeviceFilter(online=True, group="house", search="d", tag="floor=1"),
)


def fill(registry: Registry, seed: int) -> None:
    """Add devices of all kinds; several were last seen at the same time."""
    draw = random.Random(seed)
    now = time.time()
    for number in range(14):
        name = f"d{number}_{draw.choice('ab')}"
        registry.identities.add_identity(
            name,
            Role.DEVICE,
            draw.choice((None, "house", "lab")),
            fingerprint="0" * 64,
            not_after=now + draw.choice((-100.0, 1e6)),
        )
        if draw.random() < 0.5:
            registry.identities.tag(name, {"floor": draw.choice("12")})
        if draw.random() < 0.7:
            status = DeviceStatus(
                online=draw.random() < 0.6, epoch=1, bundle_id="b" * 32, version="1", mode="auto"
            )
            registry.stats.record_status(name, status, draw.choice((1000.0, 2000.0, 3000.0)))
        if registry.stats.device(name).state == "active" and draw.random() < 0.2:
            registry.identities.suspend(name)


def expected(rows: list[DeviceRow], wanted: DeviceFilter) -> list[str]:
    found = [
        row
        for row in rows
        if (wanted.search is None or wanted.search.lower() in row.device)
        and (wanted.group is None or row.group == wanted.group)
        and (wanted.tag is None or wanted.tag in format_tags(row.tags))
        and (wanted.state is None or row.state == wanted.state)
        and (wanted.online is None or row.online == wanted.online)
    ]
    if wanted.newest_first is not None:
        found.sort(key=lambda row: row.last_seen or 0.0, reverse=wanted.newest_first)
    return [row.device for row in found]


def walk(registry: Registry, wanted: DeviceFilter, limit: int) -> list[str]:
    names: list[str] = []
    after = None
    while True:
        rows, page = registry.stats.device_page(wanted, after, limit)
        assert [row.device for row in rows] == page.names
        names += page.names
        if not page.has_more:
            return names
        after = page.names[-1]


def test_pages_agree_with_a_filter_of_all_devices(registry: Registry) -> None:
    fill(registry, seed=1)
    everything = registry.stats.devices()
    for base, newest_first in itertools.product(FILTERS, (None, False, True)):
        wanted = DeviceFilter(
            **{name: getattr(base, name) for name in base.__struct_fields__[:-1]},
            newest_first=newest_first,
        )
        names = expected(everything, wanted)
        for limit in (1, 3, 100):
            assert walk(registry, wanted, limit) == names, (wanted, limit)
        rows, page = registry.stats.device_page(wanted, None, 2)
        assert page.total == len(names)
        assert rows == [row for name in names[:2] for row in everything if row.device == name]


def test_a_page_goes_on_after_a_device_that_was_deleted(registry: Registry) -> None:
    for name in ("a", "b", "c"):
        add(registry, name)
    registry.identities.revoke("b")
    registry.identities.delete("b")
    _, page = registry.stats.device_page(DeviceFilter(), "b", 5)
    assert page.names == ["c"]


def test_counts_of_some_devices_are_those_of_all(registry: Registry) -> None:
    for name in ("a", "b", "c"):
        add(registry, name)
        registry.stats.record_report(name, report(f"of-{name}"))
    rows = {row.device: row for row in registry.stats.per_device()}
    assert registry.stats.per_device(devices=["a", "c"]) == [rows["a"], rows["c"]]
    assert registry.stats.per_device(devices=[]) == []
