"""Recorded messages, damaged 100,000 times, are read or refused with typed errors."""

from __future__ import annotations

import logging
import random
from collections import Counter, defaultdict
from itertools import cycle, islice

import pytest

from fleet.bundles.manifest import Bundle
from fleet.errors import FleetError
from fleet.protocol import topics
from fleet.protocol.report import WorkerStatus, encode_status
from tests.mutations import Mutator
from tests.recorded import READERS, Recorded, record
from tests.system.judge import judge, request
from tests.system.memory_fleet import DEVICE, WORKER, memory_fleet

NUM_MUTATIONS = 100_000
NUM_TOLD = 3000
NEIGHBOUR = "edge-3"


@pytest.fixture(scope="module")
def recorded(tiny_bundle: Bundle) -> list[Recorded]:
    return record(tiny_bundle)


def read(kind: str, payload: bytes) -> Counter[str]:
    """Count the readers that accepted and refused a payload; fail on any other exception."""
    outcomes: Counter[str] = Counter()
    for reader, error in READERS[kind]:
        try:
            reader(payload)
            outcomes["read"] += 1
        except error:
            outcomes["refused"] += 1
        except Exception as crash:
            raise AssertionError(f"a {kind} of {len(payload)} bytes, {payload[:2000]!r}") from crash
    return outcomes


def test_every_kind_of_message_was_recorded_and_its_reader_takes_it(
    recorded: list[Recorded],
) -> None:
    assert {one.kind for one in recorded} == READERS.keys()
    for kind, _, payload in recorded:
        assert read(kind, payload)["read"] == 1, (kind, payload)


def test_whatever_becomes_of_a_message_it_is_read_or_refused_with_a_typed_error(
    recorded: list[Recorded],
) -> None:
    mutate = Mutator(0, [one.payload for one in recorded])
    chance = random.Random(0)
    said: defaultdict[str, list[bytes]] = defaultdict(list)
    for kind, _, payload in recorded:
        said[kind].append(payload)
    outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for kind in islice(cycle(sorted(said)), NUM_MUTATIONS):
        outcomes[kind] += read(kind, mutate(chance.choice(said[kind])))
    assert sum(counts.total() for counts in outcomes.values()) >= NUM_MUTATIONS
    assert all(counts["read"] and counts["refused"] for counts in outcomes.values()), outcomes


def test_a_fleet_that_is_told_damaged_messages_logs_no_crash_and_answers_on(
    tiny_bundle: Bundle, recorded: list[Recorded], caplog: pytest.LogCaptureFixture
) -> None:
    told = [
        one for one in recorded if one.topic and one.kind != "prompt"
    ]  # any text is a prompt, and is answered
    mutate = Mutator(1, [one.payload for one in told])
    chance = random.Random(1)
    with memory_fleet() as fleet, caplog.at_level(logging.ERROR):
        worker, _ = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        fleet.start_device(tiny_bundle, name=NEIGHBOUR)
        birth = encode_status(
            WorkerStatus(online=True, epoch=1, bundle_ids=(tiny_bundle.manifest.bundle_id,))
        )
        for _, topic, payload in islice(cycle(told), NUM_TOLD):
            fleet.watcher.publish(topic, mutate(payload) if chance.random() < 0.7 else payload)
        for device in (DEVICE, NEIGHBOUR):
            fleet.watcher.publish(
                topics.worker_status(WORKER), birth
            )  # others may have been believed
            asked = request("How warm is it?")
            judge(tiny_bundle, asked, fleet.ask(asked, device))
        worker.engine.check_integrity()
    crashes = [
        r for r in caplog.records if r.exc_info and not isinstance(r.exc_info[1], FleetError)
    ]
    assert not crashes, [(r.getMessage(), r.exc_text) for r in crashes]
