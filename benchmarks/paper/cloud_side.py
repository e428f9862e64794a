"""The cloud's process of a system as the benchmark sees it: readiness, work and cost."""

from __future__ import annotations

import re
import urllib.request
from typing import Final, Protocol

from benchmarks.engines import LOAD_TIMEOUT_S, EngineProcess
from fleet.errors import FleetError
from fleet.server.child_process import Child

TIMEOUT_S: Final = 30.0
POSITIONS: Final = re.compile(r"^fleet_worker_positions_total (\S+)$", re.MULTILINE)


class CloudSide(Protocol):
    """The cloud's side of a system; `pid` is the process that computes."""

    def wait_ready(self) -> object:
        """Return when it serves; raise FleetError when it does not start."""
        ...

    def check(self) -> None:
        """Raise FleetError when it has ended."""
        ...

    @property
    def pid(self) -> int: ...

    def work(self, questioned: int) -> tuple[int, int]:
        """Return (position, layer) pairs and runs of the LM head since it started.

        `questioned` is the number of tokens requested since the last call.
        """
        ...


class WorkerSide:
    """The worker as it is deployed."""

    def __init__(self, process: Child, num_layers: int) -> None:
        self._process = process
        self._num_layers = num_layers
        self._head_calls = 0

    def wait_ready(self) -> None:
        """Return when it serves; raise FleetError when it does not start."""
        self._process.wait_ready(LOAD_TIMEOUT_S)  # others load on the same core

    def check(self) -> None:
        """Raise FleetError when it has ended."""
        if (status := self._process.process.poll()) is not None:
            raise FleetError(
                f"{self._process.title} ended with status {status} while it was measured"
            )

    @property
    def pid(self) -> int:
        return self._process.process.pid

    def work(self, questioned: int) -> tuple[int, int]:
        """Return (position, layer) pairs and runs of the LM head since it started.

        `questioned` is the number of tokens requested since the last call.
        """
        url = self._process.ready_line.rpartition("metrics on ")[2]
        with urllib.request.urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as response:
            match = POSITIONS.search(response.read().decode())
        if match is None:
            raise FleetError(
                f"{self._process.title} counts no positions on {url}/metrics; "
                "it is of another version"
            )
        self._head_calls += questioned
        return round(float(match[1])) * self._num_layers, self._head_calls


class BaselineSide:
    """A process of `benchmarks.drivers.cloud`."""

    def __init__(self, engine: EngineProcess) -> None:
        self._engine = engine
        self._pid = engine.pid

    def wait_ready(self) -> None:
        """Return when it serves; raise FleetError when it does not start."""
        self._engine.wait_ready()
        self._pid = self._engine.ask("counts")["pid"] or self._engine.pid

    def check(self) -> None:
        """Raise FleetError when it has ended."""
        if (status := self._engine.status) is not None:
            raise FleetError(
                f"{self._engine.name} ended with status {status} while it was measured"
            )

    @property
    def pid(self) -> int:
        return self._pid

    def work(self, questioned: int) -> tuple[int, int]:
        """Return (position, layer) pairs and runs of the LM head since it started.

        `questioned` is the number of tokens requested since the last call.
        """
        del questioned  # this side counts them itself
        counted = self._engine.ask("counts")
        return counted["layer_positions"], counted["head_calls"]
