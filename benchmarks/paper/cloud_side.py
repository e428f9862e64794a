"""The cloud's process of a system as the bench sees it: is it there, what has it run, what did it cost."""

from __future__ import annotations

import re
import urllib.request
from typing import Final, Protocol

from benchmarks.engines import LOAD_TIMEOUT_S, Engine
from fleet.errors import FleetError
from fleet.server.child_process import Child

TIMEOUT_S: Final = 30.0
POSITIONS: Final = re.compile(r"^fleet_worker_positions_total (\S+)$", re.MULTILINE)


class CloudSide(Protocol):
    """`pid` is of the process that computes."""

    def wait_ready(self) -> object:
        """Returns when it serves. Raises FleetError when it does not start."""
        ...

    def check(self) -> None:
        """Raises FleetError when it has ended."""
        ...

    @property
    def pid(self) -> int: ...

    def work(self, questioned: int) -> tuple[int, int]:
        """(position, layer) pairs and runs of the LM head since it started; `questioned` more tokens were asked of it
        than at the last call."""
        ...


class WorkerSide:
    """The worker as it is deployed."""

    def __init__(self, process: Child, num_layers: int) -> None:
        self._process = process
        self._num_layers = num_layers
        self._head_calls = 0

    def wait_ready(self) -> None:
        self._process.wait_ready(LOAD_TIMEOUT_S)  # others load on the same core

    def check(self) -> None:
        if (status := self._process.process.poll()) is not None:
            raise FleetError(
                f"{self._process.title} ended with status {status} while it was measured"
            )

    @property
    def pid(self) -> int:
        return self._process.process.pid

    def work(self, questioned: int) -> tuple[int, int]:
        url = self._process.ready_line.rpartition("metrics on ")[2]
        with urllib.request.urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as response:
            found = POSITIONS.search(response.read().decode())
        if found is None:
            raise FleetError(
                f"{self._process.title} counts no positions on {url}/metrics; it is of another version"
            )
        self._head_calls += questioned
        return round(float(found[1])) * self._num_layers, self._head_calls


class BaselineSide:
    """A process of `benchmarks.drivers.cloud`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pid = engine.pid

    def wait_ready(self) -> None:
        self._engine.wait_ready()
        self._pid = self._engine.ask("counts")["pid"] or self._engine.pid

    def check(self) -> None:
        if (status := self._engine.status) is not None:
            raise FleetError(
                f"{self._engine.name} ended with status {status} while it was measured"
            )

    @property
    def pid(self) -> int:
        return self._pid

    def work(self, questioned: int) -> tuple[int, int]:
        del questioned  # it counts by itself
        counted = self._engine.ask("counts")
        return counted["layer_positions"], counted["head_calls"]
