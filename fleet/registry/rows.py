"""What the registry answers: frozen rows, ready for a table or for JSON."""

from __future__ import annotations

from msgspec import Struct


class DeviceRow(Struct, frozen=True):
    """An enrolled device and what it said last; times in seconds since 1970, None when it never came."""

    device: str
    group: str | None
    online: bool
    mode: str
    bundle_id: str
    version: str
    last_seen: float | None
    not_after: float


class IdentityRow(Struct, frozen=True):
    """An enrolled identity; `targets` are the devices and groups that an app was allowed."""

    name: str
    role: str
    group: str | None
    targets: tuple[str, ...]
    fingerprint: str
    created_at: float
    not_after: float


class StatsRow(Struct, frozen=True):
    """The sums of a device's generations. `sources` are in the order of depth: exits, cloud, fallback."""

    device: str
    generations: int
    tokens: int
    sources: dict[str, int]
    offload_rate: float
    bytes_up: int
    bytes_down: int


class SessionRow(Struct, frozen=True):
    """A session of a device with a worker, and the sums of its generations."""

    session: str
    device: str
    worker: str | None
    opened_at: float
    generations: int
    tokens: int
    bytes_up: int
    bytes_down: int
