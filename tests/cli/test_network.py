"""Connections: a command that needs no broker looks up no name and connects nowhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fleet.server.home import FleetConfig, FleetHome

PROGRAM = """
import sys

def check(event, arguments):
    if event in {"socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"}:
        print(event, arguments, file=sys.stderr)

sys.addaudithook(check)
import cloud_broker_worker.worker.cli
import edge_agent.cli
from fleet.cli import main

main()
"""


def test_a_command_without_a_broker_makes_no_connection(tmp_path: Path) -> None:
    FleetHome.create(tmp_path / "home", FleetConfig(host="broker.test", port=1, bundle="/none"))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "devices"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"FLEET_HOME": str(tmp_path / "home")},
    )
    assert "none yet" in result.stdout
    assert not result.stderr
