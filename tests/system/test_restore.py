"""A fleet that is restored from a backup answers, and knows what it answered before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fleet.bundles.manifest import Bundle
from fleet.server.child_process import child
from fleet.server.home import WORKER, FleetConfig, FleetHome
from tests.brokers import HOST, free_port, wait_until
from tests.system.test_certificate_life import device, fleet, join, server

WAIT_S: Final = 60.0
NUM_TOKENS: Final = 4
ASK: Final = ("prompt", "kitchen", "How warm is it?", "--threshold", "1", "--json")


@contextmanager
def serving(home: FleetHome, kitchen: Path) -> Iterator[None]:
    """The server, the fleet's own worker and a device, as processes."""
    worker = home.folder / "identities" / WORKER
    command = ("run", str(worker), "--threads", "1")
    with (
        server(home),
        child("worker", "cloud_broker_worker", *command) as cloud,
        child("device", *device(kitchen)) as edge,
    ):
        cloud.wait_ready()
        edge.wait_ready()
        yield


def answered_by(home: FleetHome) -> dict[str, int]:
    """Ask the device for tokens that only a worker can choose; return their sources."""
    printed = fleet(home, *ASK, "--max-new-tokens", str(NUM_TOKENS))
    sources: dict[str, int] = json.loads(printed)["results"][0]["sources"]
    return sources


def has_counted(home: FleetHome, num_answers: int) -> bool:
    """Whether the registry counts these answers of the device."""
    with home.registry() as registry:
        (row,) = registry.stats.per_device("kitchen")
    return (row.generations, row.tokens) == (num_answers, num_answers * NUM_TOKENS)


def test_a_restored_fleet_answers_and_counts_the_answers_before_its_loss(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    folder = tmp_path / "state"
    kitchen = tmp_path / "kitchen"
    backup = tmp_path / "backup.tar.gz"
    bundle = str(tiny_bundle.folder)
    config = FleetConfig(host=HOST, port=free_port(), bundle=bundle, service_port=free_port())
    home = FleetHome.create(folder, config)
    with serving_after_joining(home, kitchen):
        assert answered_by(home) == {"cloud": NUM_TOKENS}
        wait_until(lambda: has_counted(home, 1), "the answer is counted", WAIT_S)
        fleet(home, "backup", str(backup))
    shutil.rmtree(folder)
    fleet(home, "restore", str(backup))
    restored = FleetHome.load(folder)
    with serving(restored, kitchen):
        assert answered_by(restored) == {"cloud": NUM_TOKENS}
        wait_until(lambda: has_counted(restored, 2), "both answers are counted", WAIT_S)


@contextmanager
def serving_after_joining(home: FleetHome, kitchen: Path) -> Iterator[None]:
    with server(home):
        join(home, "kitchen", kitchen)
    with serving(home, kitchen):
        yield
