"""The outbox and the reporter, with failures of the device, link, collector and disk."""

from __future__ import annotations

import logging
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from edge_agent.reporting.report_merge import SEVERAL, merge_reports
from edge_agent.reporting.report_outbox import ReportOutbox
from edge_agent.reporting.reporter import FIRST_WINDOW, MAX_WINDOW, Reporter
from fleet.protocol import topics
from fleet.protocol.report import (
    GenerationReport,
    ReportReceipt,
    decode_report,
    encode_receipt,
    encode_report,
)
from fleet.transport.in_memory import InMemoryBroker, InMemoryTransport
from tests.brokers import Inbox, wait_until
from tests.fleet.conftest import report

QUICK = 0.1, 0.4
CHILD = """
import sys
from pathlib import Path
from edge_agent.reporting.reporter import Reporter
from edge_agent.reporting.report_outbox import ReportOutbox
from fleet.transport.in_memory import InMemoryBroker
from tests.fleet.conftest import report

outbox = ReportOutbox(Path(sys.argv[1]), 1000)
with Reporter(InMemoryBroker().connect("edge-1"), outbox) as reporter:
    for i in range(40):
        reporter.add(report(f"g{i}"))
    sys.stdin.read()
"""

FULL_DISK = """
import resource, sys
from pathlib import Path
from tests.edge_agent.reporting.test_reporter import QUICK, Collector, device
from fleet.transport.in_memory import InMemoryBroker
from tests.fleet.conftest import report

# As if the disk were full: no file grows beyond the limit.
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
broker = InMemoryBroker()
collector = Collector(broker)
with device(broker, Path(sys.argv[1]), QUICK) as (reporter, _):
    for i in range(100):
        reporter.add(report(f"g{i}"))
    print(len(collector.collect(100)))
"""


class Collector:
    """A collector that acknowledges the reports that a test chooses."""

    def __init__(self, broker: InMemoryBroker) -> None:
        self._link = broker.connect("collector")
        self.heard = Inbox()
        self._link.subscribe(topics.DEVICE_STATS_FILTER, self.heard)

    def next(self) -> str:
        """Return the generation of the next report."""
        return decode_report(self.heard.get()[1]).generation

    def acknowledge(self, *generations: str, **refused: str) -> None:
        receipt = ReportReceipt(generations, refused)
        self._link.publish(topics.device_reported("edge-1"), encode_receipt(receipt))

    def collect(self, count: int) -> Counter[str]:
        """Acknowledge reports until `count` different ones arrived; return the number of each."""
        heard: Counter[str] = Counter()
        while len(heard) < count:
            heard[generation := self.next()] += 1
            self.acknowledge(generation)
        return heard


@contextmanager
def device(
    broker: InMemoryBroker, path: Path | None, retry_s: tuple[float, float] = (60.0, 60.0)
) -> Iterator[tuple[Reporter, InMemoryTransport]]:
    with (
        broker.connect("edge-1") as link,
        Reporter(link, ReportOutbox(path, 1000), retry_s) as reporter,
    ):
        yield reporter, link


def kept(path: Path) -> list[str]:
    """Return the generations in an outbox's file, if there is one."""
    if not path.is_file():
        return []
    with closing(sqlite3.connect(path)) as database:
        if not database.execute("SELECT name FROM sqlite_master WHERE name = 'reports'").fetchall():
            return []
        return [
            generation
            for (generation,) in database.execute("SELECT generation FROM reports ORDER BY id")
        ]


def fill(
    path: Path | None, limit: int, reports: list[GenerationReport], sent: int = 0
) -> list[GenerationReport]:
    """Add reports one by one, send the first `sent`; return those that are left."""
    outbox = ReportOutbox(path, limit)
    for i, each in enumerate(reports):
        with outbox.transaction():
            outbox.add({each.generation: encode_report(each)})
            if i < sent:
                outbox.take(0, i + 1)
    with outbox.transaction():
        left = [decode_report(it.payload) for it in outbox.take(0, 10_000)]
    outbox.close()
    return left


def totals(reports: list[GenerationReport]) -> tuple[int, int, Counter[str]]:
    sources: Counter[str] = Counter()
    for each in reports:
        sources.update(each.sources)
    return sum(it.answers for it in reports), sum(it.bytes_up for it in reports), sources


# The outbox.


def test_reports_survive_their_outbox_in_a_file_that_only_their_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "reports.sqlite"
    fill(path, 1000, [report("g1"), report("g2")])
    assert kept(path) == ["g1", "g2"]
    assert {each.stat().st_mode & 0o777 for each in tmp_path.iterdir()} == {0o600}


def test_a_transaction_that_fails_changes_nothing(tmp_path: Path) -> None:
    outbox = ReportOutbox(tmp_path / "reports.sqlite", 1000)

    def fail() -> None:
        with outbox.transaction():
            outbox.add({"g1": encode_report(report("g1"))})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert kept(tmp_path / "reports.sqlite") == []


def test_beyond_its_limit_an_outbox_merges_the_oldest_and_loses_no_count() -> None:
    reports = [report(f"g{i}", started_at=1000.0 + i) for i in range(1000)]
    left = fill(None, 100, reports)
    assert len(left) <= 100
    assert totals(left) == totals(reports)
    assert [it.generation for it in left if it.answers == 1][-1] == "g999"


def test_a_report_that_was_sent_is_never_merged_since_it_may_have_been_counted() -> None:
    left = fill(None, 100, [report(f"g{i}") for i in range(300)], sent=40)
    assert {f"g{i}" for i in range(40)} <= {it.generation for it in left if it.answers == 1}
    assert sum(it.answers for it in left) == 300


def test_answers_of_two_bundles_are_not_mixed() -> None:
    reports = [report(f"g{i}", bundle_id=f"b{i % 2}") for i in range(200)]
    left = fill(None, 50, reports)
    assert {it.bundle_id for it in left} == {"b0", "b1"}
    for bundle in ("b0", "b1"):
        assert totals([it for it in left if it.bundle_id == bundle])[0] == 100


def test_a_lower_limit_applies_to_reports_from_before(tmp_path: Path) -> None:
    path = tmp_path / "reports.sqlite"
    fill(path, 5000, [])
    outbox = ReportOutbox(path, 5000)
    with outbox.transaction():
        outbox.add({f"g{i}": encode_report(report(f"g{i}")) for i in range(2000)})
    outbox.close()
    left = fill(path, 300, [report("last")])
    assert len(left) <= 300
    assert sum(it.answers for it in left) == 2001


def test_a_merged_report_has_the_common_labels_and_the_mean_times() -> None:
    several = merge_reports(
        [report("g1", app="a", ttft_ms=10.0, answers=3), report("g2", app="b", ttft_ms=50.0)], "sum"
    )
    assert (several.generation, several.answers, several.tokens, several.ttft_ms) == (
        "sum",
        4,
        20,
        20.0,
    )
    assert (several.app, several.mode, several.session) == (SEVERAL, "collaborative", None)


# The reporter.


def test_a_report_is_sent_again_until_it_is_acknowledged_and_then_removed(tmp_path: Path) -> None:
    broker = InMemoryBroker()
    path = tmp_path / "reports.sqlite"
    collector = Collector(broker)
    with device(broker, path, QUICK) as (reporter, _):
        reporter.add(report("g1"))
        assert [collector.next() for _ in range(3)] == ["g1"] * 3
        assert kept(path) == ["g1"]
        collector.acknowledge("g1")
        wait_until(lambda: not kept(path), "it is forgotten")


def test_a_report_from_before_the_collectors_start_is_sent_when_it_starts() -> None:
    broker = InMemoryBroker()
    with device(broker, None) as (reporter, _):
        reporter.add(report("g1"))
        collector = Collector(broker)
        collector.acknowledge()
        assert collector.next() == "g1"


def test_a_report_made_while_the_link_was_down_is_sent_when_it_is_up() -> None:
    broker = InMemoryBroker()
    collector = Collector(broker)
    with device(broker, None) as (reporter, link):
        link.drop()
        reporter.add(report("g1"))
        link.restore()
        assert collector.next() == "g1"


def test_a_refused_report_is_removed_and_its_reason_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = InMemoryBroker()
    path = tmp_path / "reports.sqlite"
    collector = Collector(broker)
    with device(broker, path) as (reporter, _):
        reporter.add(report("g1"))
        assert collector.next() == "g1"
        collector.acknowledge(g1="its sources do not add up")
        wait_until(lambda: not kept(path), "it is forgotten")
    assert caplog.messages == [
        "the collector refused the report of generation g1: its sources do not add up"
    ]


def test_a_malformed_receipt_is_ignored() -> None:
    broker = InMemoryBroker()
    collector = Collector(broker)
    with device(broker, None) as (reporter, _), broker.connect("stranger") as stranger:
        for garbage in (
            b"",
            b"\xc1",
            b"{}",
            b"x" * 300_000,
            encode_receipt(ReportReceipt(("unheard-of",))),
        ):
            stranger.publish(topics.device_reported("edge-1"), garbage)
        reporter.add(report("g1"))
        assert collector.next() == "g1"


def test_a_silent_collector_is_sent_one_window_and_one_that_acknowledges_all(
    tmp_path: Path,
) -> None:
    broker = InMemoryBroker()
    path = tmp_path / "reports.sqlite"
    collector = Collector(broker)
    with device(broker, path) as (reporter, _):
        for i in range(3 * MAX_WINDOW):
            reporter.add(report(f"g{i}"))
        wait_until(lambda: len(kept(path)) == 3 * MAX_WINDOW, "all are on disk")
        first = [collector.next() for _ in range(FIRST_WINDOW)]
        assert collector.heard.is_empty
        collector.acknowledge(*first)
        heard = collector.collect(3 * MAX_WINDOW - FIRST_WINDOW)
        assert set(heard.values()) == {1}
        wait_until(lambda: not kept(path), "all are forgotten")


def test_the_reports_of_a_killed_process_are_delivered_by_its_successor(tmp_path: Path) -> None:
    path = tmp_path / "reports.sqlite"
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdin=subprocess.PIPE
    ) as process:
        wait_until(lambda: len(kept(path)) == 40, "all are on disk", 30.0)
        process.send_signal(signal.SIGKILL)
    broker = InMemoryBroker()
    collector = Collector(broker)
    with device(broker, path):
        assert collector.collect(40).keys() == {f"g{i}" for i in range(40)}
        wait_until(lambda: not kept(path), "all are forgotten")


def test_two_agents_may_share_a_folder(tmp_path: Path) -> None:
    broker = InMemoryBroker()
    path = tmp_path / "reports.sqlite"
    collector = Collector(broker)
    with device(broker, path, QUICK) as (one, _), device(broker, path, QUICK) as (other, _):
        for i in range(20):
            one.add(report(f"one-{i}"))
            other.add(report(f"other-{i}"))
        assert len(collector.collect(40)) == 40
        wait_until(lambda: not kept(path), "all are forgotten")


def test_a_damaged_file_is_moved_aside_and_reports_are_kept_in_a_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = InMemoryBroker()
    path = tmp_path / "reports.sqlite"
    path.write_bytes(b"something else " * 100)
    collector = Collector(broker)
    with device(broker, path, QUICK) as (reporter, _), caplog.at_level(logging.WARNING):
        reporter.add(report("g1"))
        reporter.add(report("g2"))
        assert collector.collect(2).keys() == {"g1", "g2"}
    assert caplog.messages == [
        f"{path} is damaged (file is not a database); it is made again, "
        "and kept as reports.sqlite.damaged"
    ]
    assert path.read_bytes().startswith(b"SQLite format 3")
    assert (tmp_path / "reports.sqlite.damaged").read_bytes().startswith(b"something else")


def test_a_file_with_a_damaged_page_is_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / "reports.sqlite"
    outbox = ReportOutbox(path, 1000)
    with outbox.transaction():
        outbox.add({f"g{number}": bytes(2000) for number in range(50)})
    outbox.close()
    content = bytearray(path.read_bytes())
    content[4096 : 4096 + 2048] = bytes(range(256)) * 8
    path.write_bytes(content)
    with outbox.transaction():
        outbox.add({"new": b"report"})
        assert len(outbox) == 1
    assert (tmp_path / "reports.sqlite.damaged").exists()


def test_a_full_disk_is_logged_once_and_reports_are_sent_from_memory(tmp_path: Path) -> None:
    assert on_full_disk(tmp_path, 4096) == [
        "reports cannot be kept in"
    ]  # not even an empty outbox fits


def test_each_change_of_a_disk_with_little_room_is_logged_once(tmp_path: Path) -> None:
    said = on_full_disk(
        tmp_path, 32768
    )  # the number of changes depends on the number of reports in a transaction
    assert said
    assert said == [
        ("reports cannot be kept in", "reports are kept on disk")[i % 2] for i in range(len(said))
    ]


def on_full_disk(folder: Path, limit: int) -> list[str]:
    """Send 100 reports while no file can exceed `limit` bytes.

    Return the log of the device, five words a line.
    """
    command = [sys.executable, "-c", FULL_DISK, str(folder / "reports.sqlite"), str(limit)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "100\n"
    return [" ".join(line.split()[:5]) for line in result.stderr.splitlines()]


def test_reports_in_memory_are_saved_when_the_disk_works_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = InMemoryBroker()
    path = tmp_path / "reports.sqlite"
    path.mkdir()
    with device(broker, path, QUICK) as (reporter, _):
        reporter.add(report("g1"))
        wait_until(lambda: bool(caplog.messages), "the trouble is logged")
        path.rmdir()
        wait_until(lambda: kept(path) == ["g1"], "it is on disk")
        wait_until(lambda: len(caplog.messages) == 2, "that is logged")
    assert caplog.messages[1] == "reports are kept on disk again"
