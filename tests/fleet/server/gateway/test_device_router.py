"""The choice of a device: names, rights, load, and devices that were tried before."""

from __future__ import annotations

import pytest

from fleet.errors import (
    BusyError,
    FleetError,
    LinkError,
    OfflineError,
    RefusedPromptError,
    UnknownModelError,
)
from fleet.registry.results import DeviceLabels
from fleet.server.gateway.device_router import (
    DeviceState,
    choose_device,
    devices_named,
    names_of,
)

DEVICES = {
    "attic": DeviceLabels(None, ("floor=2",)),
    "kitchen": DeviceLabels("home", ("floor=1", "wing=east")),
    "hall": DeviceLabels("home", ("floor=1",)),
    "secret": DeviceLabels("home", ("floor=1",)),
}
ALLOWED = ("attic", "hall", "kitchen")
IDLE = DeviceState(online=True)
BUSY = RefusedPromptError("device hall refused (busy): full", "busy")
LOST = LinkError("device hall went offline")

NAMED = [
    ("kitchen", ["kitchen"]),
    ("kitchen:latest", ["kitchen"]),
    ("group:home", ["hall", "kitchen"]),
    ("group:home:latest", ["hall", "kitchen"]),
    ("tag:floor=1", ["hall", "kitchen"]),
    ("tag:floor=2", ["attic"]),
    ("fleet", ["attic", "hall", "kitchen"]),
    ("fleet:latest", ["attic", "hall", "kitchen"]),
]


@pytest.mark.parametrize(("model", "devices"), NAMED)
def test_a_name_stands_for_allowed_devices_only(model: str, devices: list[str]) -> None:
    assert devices_named(model, ALLOWED, DEVICES) == devices


@pytest.mark.parametrize(
    "model", ["secret", "group:", "group:floor", "tag:floor", "tag:floor=3", "home", "", "x" * 300]
)
def test_a_name_without_allowed_devices_is_unknown(model: str) -> None:
    with pytest.raises(UnknownModelError, match="GET /v1/models") as caught:
        devices_named(model, ALLOWED, DEVICES)
    assert len(str(caught.value)) < 500


def test_names_are_listed_with_the_fleet_first_and_only_those_of_allowed_devices() -> None:
    assert names_of(("attic", "hall"), DEVICES) == [
        "fleet", "attic", "hall", "group:home", "tag:floor=1", "tag:floor=2",
    ]  # fmt: skip
    assert names_of((), DEVICES) == []


CHOICES: list[tuple[dict[str, DeviceState], dict[str, FleetError], str]] = [
    ({"hall": IDLE, "kitchen": DeviceState(online=True, num_running=1)}, {}, "hall"),
    # A waiting request weighs more than several running ones.
    (
        {
            "hall": DeviceState(online=True, num_running=1, num_waiting=1),
            "kitchen": DeviceState(online=True, num_running=3),
        },
        {},
        "kitchen",
    ),
    # The gateway's own requests count before the device reports them.
    ({"hall": DeviceState(online=True, num_asked=2), "kitchen": IDLE}, {}, "kitchen"),
    (
        {
            "hall": DeviceState(online=True, num_asked=2),
            "kitchen": DeviceState(online=True, num_running=3, num_asked=1),
        },
        {},
        "hall",
    ),
    # Among equal devices the one that was used longest ago is next.
    (
        {
            "hall": DeviceState(online=True, last_used=7),
            "kitchen": DeviceState(online=True, last_used=6),
        },
        {},
        "kitchen",
    ),
    ({"hall": IDLE, "kitchen": IDLE}, {}, "hall"),
    ({"hall": DeviceState(), "kitchen": DeviceState(online=True, num_waiting=9)}, {}, "kitchen"),
    ({"kitchen": IDLE}, {}, "kitchen"),
    ({"hall": IDLE, "kitchen": DeviceState(online=True, num_waiting=9)}, {"hall": LOST}, "kitchen"),
]


@pytest.mark.parametrize(("states", "tried", "chosen"), CHOICES)
def test_the_least_busy_device_that_is_online_and_untried_is_chosen(
    states: dict[str, DeviceState], tried: dict[str, FleetError], chosen: str
) -> None:
    assert choose_device(["hall", "kitchen"], states, tried) == chosen


@pytest.mark.parametrize(
    ("states", "tried", "kind", "words"),
    [
        ({}, {}, OfflineError, "offline now: hall, kitchen"),
        ({"hall": IDLE}, {"hall": BUSY}, BusyError, "hall refused"),
        ({"hall": IDLE, "kitchen": IDLE}, {"hall": BUSY, "kitchen": LOST}, BusyError, "refused"),
        ({"hall": IDLE}, {"hall": LOST}, OfflineError, "went offline"),
    ],
)
def test_without_a_device_the_error_says_whether_it_is_busy_or_offline(
    states: dict[str, DeviceState], tried: dict[str, FleetError], kind: type[FleetError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        choose_device(["hall", "kitchen"], states, tried)


def test_a_message_names_few_of_many_offline_devices() -> None:
    with pytest.raises(OfflineError, match=r"d0, d1, d2, \.\.\.;"):
        choose_device([f"d{i}" for i in range(100)], {}, {})
