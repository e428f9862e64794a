"""Figures: a device's tokens from a worker whose other devices are hostile.

``python -m tests.system.hostile_worker [--weights int4] [--tokens 40]`` runs the real engine on the
default bundle in virtual time, which passes by the CPU time of this process, so that other load on
the machine matters little. The neighbour works 30 ms for a token, asks the worker for it, and is
behind a link with a round trip of 20 ms. The hostile devices

- `opens`: three devices open 19 sessions of 8,192 positions every 4 s, and send nothing;
- `long`: one device fills 8 sessions of 8,192 positions and asks in each, again and again;
- `gone`: as `long`, and the device goes offline.

It fails unless each request of the neighbour is answered with the tokens that it gets alone, and
its token takes at most 1.5 times as long.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from statistics import mean
from typing import Final, get_args

import numpy as np

from cloud_broker_worker.worker.config import Weights, WorkerConfig
from cloud_broker_worker.worker.engine import WorkerEngine
from cloud_broker_worker.worker.session import SessionKey
from cloud_broker_worker.worker.upper_layers import UpperLayers
from fleet.bundles.manifest import Bundle
from fleet.protocol.codec import pack_chunk
from fleet.protocol.hidden_states import Float16
from fleet.protocol.messages import (
    PROTOCOL,
    Context,
    Open,
    Refused,
    Sampling,
    ToWorker,
    Verified,
    Verify,
)
from fleet.protocol.report import DeviceStatus
from onnx_export.default_bundle import default_bundle

DEVICE_S: Final = 0.030
LINK_S: Final = 0.020
NUM_PROMPT: Final = 60
LONG: Final = 8192
ROWS_A_CHUNK: Final = 64
OUTSIDE: Final = (1 << 31) - 1  # a token of no vocabulary: as a draft it is always rejected
NEIGHBOUR: Final = "edge-1"
HOSTILE: Final = ("edge-7", "edge-8", "edge-9")
OPENS_S: Final = 4.0
MAX_FACTOR: Final = 1.5


@dataclass
class Site:
    """An engine in virtual time, and a neighbour that asks for one token after the other."""

    layers: UpperLayers
    rows: Float16
    now: float = 1000.0
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = WorkerConfig(num_threads=1)
        self.engine = WorkerEngine(self.layers, "worker-1", config, lambda: self.now)
        self._branches: dict[SessionKey, int] = {}

    def send(self, device: str, message: ToWorker) -> list[object]:
        began = time.process_time()
        responses = self.engine.handle(device, message, self.now)
        self.now += time.process_time() - began
        return [response.message for response in responses]

    def open(self, device: str, session: str, max_positions: int) -> None:
        self.send(
            device,
            Open(
                session=session,
                epoch=1,
                bundle_id=self.layers.manifest.bundle_id,
                protocol=PROTOCOL,
                sampling=Sampling(),
                max_positions=max_positions,
                deadline_ms=60_000,
            ),
        )

    def upload(self, device: str, session: str, start: int, rows: Float16) -> None:
        branch = self._branches.get(SessionKey(device, session), 0)
        for first in range(0, len(rows), ROWS_A_CHUNK):
            chunk = pack_chunk(branch, start + first, rows[first : first + ROWS_A_CHUNK])
            self.send(device, Context(session, chunk))

    def ask(self, device: str, session: str, request: int, position: int) -> None:
        message = Verify(
            session=session,
            request=request,
            branch=self._branches.get(SessionKey(device, session), 0),
            start=position,
            draft=(OUTSIDE,),
            deadline_ms=60_000,
        )
        self.send(device, message)

    def step(self) -> dict[SessionKey, object]:
        began = time.process_time()
        responses = self.engine.step()
        self.now += time.process_time() - began
        for key, message in responses or []:
            if isinstance(message, Verified):
                self._branches[key] = self._branches.get(key, 0) + 1
        return dict(responses or [])

    def token(self, number: int) -> None:
        """The neighbour works, and gets one token; the worker serves others meanwhile."""
        began = self.now
        self.run_until(self.now + DEVICE_S + LINK_S / 2)
        position = NUM_PROMPT + number
        start = position if number else 0
        if number == 0:
            self.open(NEIGHBOUR, "mine", 512)
        self.upload(NEIGHBOUR, "mine", start, self.rows[start : position + 1])
        self.ask(NEIGHBOUR, "mine", number, position)
        while (message := self.step().get(SessionKey(NEIGHBOUR, "mine"))) is None:
            pass
        self.now += LINK_S / 2
        self.times_s.append(self.now - began)
        if isinstance(message, Refused):
            print(f"refused: {message.code}", file=sys.stderr)
        assert isinstance(message, Verified)
        assert message.token_id is not None
        self.tokens.append(message.token_id)

    def run_until(self, end: float) -> None:
        while self.now < end:
            before = self.now
            self.step()
            if not any(session.num_pending for session in self.engine.sessions.values()):
                self.now = max(end, before)


class OpensAttack:
    """Three devices that open sessions and send nothing."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._next_at = 0.0

    def act(self) -> None:
        if self._site.now < self._next_at:
            return
        self._next_at = self._site.now + OPENS_S
        for i in range(19):
            self._site.open(HOSTILE[i % len(HOSTILE)], f"s{i}", LONG)


class LongAttack:
    """One device that fills 8 sessions and asks for a token of each, as soon as it has the last."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._request = 0
        rows = np.random.default_rng(7).standard_normal((LONG, site.rows.shape[1]))
        self._rows = rows.astype(np.float16)
        for i in range(8):
            site.open(HOSTILE[0], f"s{i}", LONG)
            site.upload(HOSTILE[0], f"s{i}", 0, self._rows)

    def act(self) -> None:
        sessions = self._site.engine.sessions
        for i in range(8):
            session = sessions.get(SessionKey(HOSTILE[0], f"s{i}"))
            if session is None or session.job:
                continue
            self._request += 1
            if session.received < LONG:  # the rejected draft's end
                rows = self._rows[session.received :]
                self._site.upload(HOSTILE[0], f"s{i}", session.received, rows)
            self._site.ask(HOSTILE[0], f"s{i}", self._request, LONG - 1)


class GoneAttack(LongAttack):
    """The same device, which then goes offline."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        super().act()
        site.engine.observe(HOSTILE[0], DeviceStatus(online=False, epoch=0))

    def act(self) -> None:
        return


ATTACKS: Final[dict[str, type[OpensAttack | LongAttack]]] = {
    "opens": OpensAttack,
    "long": LongAttack,
    "gone": GoneAttack,
}


def measure(layers: UpperLayers, rows: Float16, num_tokens: int, attack: str | None) -> Site:
    site = Site(layers, rows)
    hostile = ATTACKS[attack](site) if attack else None
    for number in range(num_tokens):
        if hostile:
            hostile.act()
        site.token(number)
    site.engine.check_integrity()
    return site


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", choices=get_args(Weights), default="int4")
    parser.add_argument("--tokens", type=int, default=40)
    options = parser.parse_args()
    bundle = Bundle.load(default_bundle(print), ("cloud",))
    layers = UpperLayers(bundle, 1, options.weights)
    hidden_size = bundle.manifest.model.hidden_size
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((NUM_PROMPT + options.tokens, hidden_size)).astype(np.float16)
    measure(layers, rows, 4, None)  # the first steps allocate
    alone = measure(layers, rows, options.tokens, None)
    figures = {"alone": 1000 * mean(alone.times_s[1:])}
    is_kept = True
    for name in ATTACKS:
        site = measure(layers, rows, options.tokens, name)
        figures[name] = 1000 * mean(site.times_s[1:])
        is_kept &= site.tokens == alone.tokens and figures[name] <= MAX_FACTOR * figures["alone"]
    print(json.dumps({f"{name}_ms": round(ms, 1) for name, ms in figures.items()}, indent=2))
    if not is_kept:
        sys.exit("a neighbour's tokens changed, or took more than 1.5 times as long")


if __name__ == "__main__":
    main()
