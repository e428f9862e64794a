"""The ten commands of the README, run as they are written there.

They run on SQLite with the embedded broker, and on PostgreSQL with mosquitto. Two things differ
from the page: the ports are free ones, and the tiny model takes the place of the default model.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fleet.bundles.manifest import Bundle
from tests.brokers import wait_until
from tests.postgresql import Databases
from tests.system.operator import TIMEOUT_S, Operator, operator

README = (Path(__file__).parents[2] / "README.md").read_text()
GUIDE = [
    line.split("  #")[0].strip()
    for line in README.split("## Operator's guide\n")[1].split("```")[1].splitlines()[1:]
]


def follow_the_guide(operator: Operator) -> None:
    """Run the commands in order, and check the effect of each."""
    _, up, enroll, join, run, prompt, stats, config, doctor, revoke = GUIDE
    operator.start(up, "the fleet is up")
    printed = operator.type(enroll)
    command = re.search(r"edge-agent join (\S+) --server (\S+)", printed)
    assert command, printed
    operator.type(join.replace("TOKEN", command[1]))
    device = operator.start(run, "serves")
    answer = operator.ask(prompt)
    (counted,) = operator.ask(stats)
    assert counted["tokens"] == sum(answer["results"][0]["sources"].values()) > 0
    operator.type(config)
    wait_until(lambda: operator.ask("fleet config diff") == [], "the device follows", TIMEOUT_S)
    (row,) = operator.ask("fleet devices")
    assert (row["device"], row["group"], row["online"], row["state"], row["mode"]) == (
        "kitchen",
        "home",
        True,
        "active",
        "auto",
    )
    assert "no problem found" in operator.type(doctor)
    operator.type(revoke)
    wait_until(lambda: not operator.ask("fleet devices")[0]["online"], "it is out", TIMEOUT_S)
    assert device.poll() is None
    refused = operator.try_to('fleet prompt kitchen "Still there?"')
    assert refused.returncode == 1
    assert "offline" in refused.stderr


def test_the_guide_has_ten_lines() -> None:
    assert len(GUIDE) == 10


@pytest.mark.timeout(900)
def test_the_guide_works_on_sqlite_with_the_embedded_broker(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    with operator(tmp_path, tiny_bundle) as typing:
        follow_the_guide(typing)


@pytest.mark.mosquitto
@pytest.mark.timeout(900)
def test_the_guide_works_on_postgresql_with_mosquitto(
    tmp_path: Path, tiny_bundle: Bundle, postgresql: Databases
) -> None:
    with (
        postgresql.database(empty=True) as url,
        operator(tmp_path, tiny_bundle, f"--broker mosquitto --registry {url}") as typing,
    ):
        follow_the_guide(typing)
