"""Devices that replay recordings against a real engine, in virtual time.

The engine really runs every message and every step; the clock moves on by the time that this took. Between two things
to do it jumps. So devices cost nothing, an idle worker costs no waiting, and the worker has its cores to itself.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from benchmarks.recordings import Recording
from cloud_broker_worker.config import WorkerConfig
from cloud_broker_worker.engine import Engine
from cloud_broker_worker.upper_layers import UpperLayers
from edge_agent.uplink import HELD_POSITIONS
from fleet.codec import decode_to_worker, encode, pack_chunk
from fleet.hidden_codec import Float16
from fleet.messages import PROTOCOL, Assist, Close, Context, ContextChunk, Open, Refused, Sampling, Token, ToWorker

DEADLINE_MS: Final = 600_000
CHUNK_POSITIONS: Final = 64

Steps: TypeAlias = Generator[float | list[ToWorker] | None, float, None]
"""What a device does: seconds that it works, messages that it sends, or None: it waits for an answer. It is told the
time."""


@dataclass
class Device:
    """One device: its messages are due at the worker after `link_s` seconds, and so are the answers here.

    `tokens` are (time, seconds since the token before) of each token but an answer's first.
    """

    name: str
    bundle_id: str
    rows: Callable[[Recording], Float16]
    thresholds: Sequence[float]
    link_s: float = 0.0
    start_s: float = 0.0
    works: bool = True
    tokens: list[tuple[float, float]] = field(default_factory=list)
    answers: list[tuple[float, float]] = field(default_factory=list)

    def run(self, recordings: Iterable[Recording]) -> Steps:
        """Answers one recording after the other.

        While it waits it goes on from its own guess (edge_agent/lookahead.py), up to the next token that it has to ask
        about; behind a wrong guess it has at least one step to finish.
        """
        yield self.start_s
        for number, recording in enumerate(recordings):
            yield from self._answer(f"{self.name}-{number}", recording)

    def _answer(self, session: str, recording: Recording) -> Steps:
        rows, sent, last = self.rows(recording), 0, 0.0
        request = itertools.count()
        size = len(rows) + 1
        began = yield [Open(session, 0, self.bundle_id, PROTOCOL, Sampling(), size, DEADLINE_MS)]
        now = yield recording.prefill_s if self.works else 0.0
        free = now  # when it could begin the step of the next token
        for i in range(recording.num_answer):
            exit_number = recording.exit_at(i, self.thresholds)
            blocks = recording.seconds[i][: None if exit_number is None else exit_number + 1]
            free += sum(blocks) if self.works else 0.0
            if free > now:
                now = yield free - now
            stop = recording.num_prompt + i
            if exit_number is None or (len(blocks) == len(recording.seconds[i]) and stop - sent > HELD_POSITIONS):
                pieces = list(chunks(rows, sent, stop))
                sent = stop
                last_piece = pieces.pop() if exit_number is None else None
                yield [Context(session, piece) for piece in pieces]
            if exit_number is None:
                free = now
                yield [Assist(session, next(request), stop - 1, DEADLINE_MS, last_piece)]
                now = yield None
                if not recording.is_guessed(i):
                    free = max(now, free + (sum(blocks) if self.works else 0.0))
            if i:
                self.tokens.append((now, now - last))
            else:
                self.answers.append((began, now))
            last = now
        yield [Close(session)]


def chunks(rows: Float16, start: int, stop: int) -> Iterable[ContextChunk]:
    """Positions [start, stop) for messages."""
    for first in range(start, stop, CHUNK_POSITIONS):
        yield pack_chunk(0, first, rows[first : min(first + CHUNK_POSITIONS, stop)])


class Worker:
    """An engine and its virtual clock; `cpu` gives seconds, of which differences are what work has taken."""

    def __init__(self, layers: UpperLayers, config: WorkerConfig, cpu: Callable[[], float]) -> None:
        self.now = 0.0
        self.busy_s = 0.0
        self.engine = Engine(layers, "bench", config, clock=lambda: self.now)
        self._cpu = cpu
        self._events: list[tuple[float, int, Device, Steps, bytes | None]] = []
        self._order = itertools.count()
        self._waiting: dict[str, tuple[Device, Steps]] = {}

    def serve(self, devices: Iterable[tuple[Device, Steps]], until_s: float = float("inf")) -> None:
        """Until all devices have finished, or that time."""
        for device, steps in devices:
            self._resume(device, steps, 0.0, first=True)
        while (self._events or self._waiting) and self.now < until_s:
            while self._events and self._events[0][0] <= self.now:
                at, _, device, steps, payload = heapq.heappop(self._events)
                if payload is None:
                    self._resume(device, steps, at)
                else:
                    self._handle(device.name, payload)
            if self._step():
                continue
            if self._events:
                self.now = max(self.now, self._events[0][0])
            elif self._waiting:
                raise RuntimeError(f"the worker answers no more, and {sorted(self._waiting)} wait")

    def _handle(self, name: str, payload: bytes) -> None:
        began = self._cpu()
        answers = self.engine.handle(name, decode_to_worker(payload), self.now)
        self._spend(self._cpu() - began)
        for answer in answers:
            if isinstance(answer.message, Refused):
                raise RuntimeError(f"the worker refused {name}: {answer.message.code}: {answer.message.message}")

    def _step(self) -> bool:
        began = self._cpu()
        answers = self.engine.step()
        for answer in answers or ():
            encode(answer.message)
        self._spend(self._cpu() - began)
        for answer in answers or ():
            if not isinstance(answer.message, Token):
                raise RuntimeError(f"expected a token for {answer.key.device}, got {answer.message}")
            device, steps = self._waiting.pop(answer.key.device)
            self._push(self.now + device.link_s, device, steps)
        return answers is not None

    def _spend(self, seconds: float) -> None:
        self.now += seconds
        self.busy_s += seconds

    def _push(self, at: float, device: Device, steps: Steps, payload: bytes | None = None) -> None:
        heapq.heappush(self._events, (at, next(self._order), device, steps, payload))

    def _resume(self, device: Device, steps: Steps, at: float, *, first: bool = False) -> None:
        try:
            wanted = next(steps) if first else steps.send(at)
            while isinstance(wanted, list):
                for message in wanted:
                    self._push(at + device.link_s, device, steps, encode(message))
                wanted = steps.send(at)
        except StopIteration:
            return
        if wanted is None:
            self._waiting[device.name] = device, steps
        else:
            self._push(at + wanted, device, steps)
