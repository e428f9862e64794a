"""A real device installs a bundle that is rolled out, and returns from one that does not start.

The test runs the commands that an operator types.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fleet.bundles.manifest import Bundle, read_manifest, write_manifest
from fleet.errors import FleetError
from fleet.protocol.prompt import PromptRequest
from fleet.server.home import FleetHome
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from tests.brokers import wait_until
from tests.system.operator import TIMEOUT_S, Operator, operator

LIMITS = "--observe 1s --min-answers 2 --offline-after 60s"
ROLLOUT = "fleet bundle rollout {} --canary 1 --stages 100 " + LIMITS
PAUSE_S = 0.5  # answers are counted meanwhile
REQUEST = PromptRequest(prompt="How warm is it?", max_new_tokens=8)
ASK = 'fleet prompt kitchen "How warm is it?" --max-new-tokens 8'


def with_a_device(operator: Operator) -> None:
    operator.start("fleet up", "the fleet is up")
    command = re.search(
        r"edge-agent join (\S+) --server (\S+)", operator.type("fleet enroll kitchen")
    )
    assert command
    operator.type(f"edge-agent join {command[1]} --server {command[2]} --out kitchen")
    operator.start("edge-agent run kitchen --threads 1", "serves")


def ended(operator: Operator) -> Any:
    """Asks the device until the roll-out has ended; its row."""
    home = FleetHome.load(operator.folder / "home")
    with (
        home.registry() as registry,
        home.operator() as identity,
        MqttTransport.connect(identity) as link,
    ):
        client = PromptClient(link)

        def has_ended() -> bool:
            with suppress(FleetError):  # refused as busy while the device changes its bundle
                list(client.ask("kitchen", REQUEST, timeout_s=TIMEOUT_S))
            time.sleep(PAUSE_S)
            return registry.rollouts.latest()[0].state not in ("waiting", "running")

        wait_until(has_ended, "the roll-out ends", TIMEOUT_S)
    return operator.ask("fleet bundle status")[0]


def serving(operator: Operator) -> str:
    (row,) = operator.ask("fleet devices")
    return str(row["bundle_id"])


def unstartable(bundle: Bundle, folder: Path) -> Bundle:
    """A bundle whose files are all right, for a processor that does not exist."""
    shutil.copytree(bundle.folder, folder)
    write_manifest(
        folder, msgspec.structs.replace(read_manifest(folder), instruction_set="from-the-future")
    )
    return Bundle.load(folder)


@pytest.mark.timeout(900)
def test_a_device_takes_a_good_bundle_and_goes_back_from_one_that_does_not_start(
    tmp_path: Path, tiny_bundle: Bundle, make_tiny_bundle: Callable[..., Bundle]
) -> None:
    good = make_tiny_bundle((1, 3))
    bad = unstartable(good, tmp_path / "bad")
    with operator(tmp_path, tiny_bundle) as typing:
        with_a_device(typing)
        assert serving(typing) == tiny_bundle.manifest.bundle_id
        for bundle in (good, bad):
            typing.type(f"fleet bundle add {bundle.folder}")

        typing.type(ROLLOUT.format(good.manifest.bundle_id))
        assert ended(typing)["state"] == "completed"
        assert serving(typing) == good.manifest.bundle_id
        answer = typing.ask(f"{ASK} --mode verified")["results"][0]
        assert answer["round_trips"] > 0

        typing.type(ROLLOUT.format(bad.manifest.bundle_id))
        undone = ended(typing)
        assert undone["state"] == "undone"
        assert "kitchen" in undone["reason"]
        wait_until(
            lambda: typing.ask("fleet config diff") == [], "the device follows again", TIMEOUT_S
        )
        assert serving(typing) == good.manifest.bundle_id
        assert typing.ask(ASK)["results"][0]["finish_reason"] in ("length", "stop")
