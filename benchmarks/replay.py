"""Devices that replay recordings against a real engine, in virtual time.

The engine really runs every message and every step; the clock advances by the time that this took,
and jumps over the time in which nothing is due. So devices cost nothing, an idle worker costs no
waiting, and the worker has its cores to itself. The devices' sessions are those of the device
itself (:class:`SessionMachine`).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import prod
from typing import Final, TypeAlias

import numpy as np

from benchmarks.recordings import AnswerRecording
from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.engine import EngineResponse, WorkerEngine
from cloud_broker_worker.worker.upper_layers import UpperLayers
from edge_agent.generation.acceptance_rate import AcceptanceRate
from edge_agent.generation.draft_policy import worth_drafting, worth_guessing
from edge_agent.measurements import Mean, Measurements
from edge_agent.session.session_machine import SessionMachine
from fleet.protocol.codec import decode_to_device, decode_to_worker, encode
from fleet.protocol.hidden_states import Float16
from fleet.protocol.messages import (
    PROTOCOL,
    Close,
    Open,
    Opened,
    Refused,
    Sampling,
    Verified,
)
from fleet.protocol.report import WorkerStatus

WORKER: Final = "bench"
DEADLINE_MS: Final = 600_000

Steps: TypeAlias = Generator[float | None, float, None]
"""The course of a device: it yields the seconds that it works, or None to wait for a response, and
is sent the time."""


@dataclass(kw_only=True)
class ReplayDevice:
    """A device on a link that takes `link_s` seconds each way.

    It collaborates as in edge_agent/generation/speculative.py. With `works` false its steps take no
    time, and it asks for each token alone, as if it knew it. `tokens` are (time, seconds since the
    token before) of each token but an answer's first; `answers` are (start, time of the first
    token).
    """

    name: str
    bundle_id: str
    rows: Callable[[AnswerRecording], Float16]
    thresholds: Sequence[float]
    link_s: float = 0.0
    start_s: float = 0.0
    works: bool = True
    tokens: list[tuple[float, float]] = field(default_factory=list)
    answers: list[tuple[float, float]] = field(default_factory=list)
    machine: SessionMachine = field(init=False)
    response: Verified | None = None
    _acceptance: AcceptanceRate = field(default_factory=AcceptanceRate)
    _round_trip: Mean = field(default_factory=lambda: Mean(0.1))
    _rows: Float16 = field(init=False)
    _num_offered: int = 0

    def run(self, recordings: Iterable[AnswerRecording]) -> Steps:
        """Answer one recording after the other."""
        now = yield self.start_s
        for number, recording in enumerate(recordings):
            now = yield from self._answer(f"{self.name}-{number}", recording, now)

    def _answer(
        self, session: str, recording: AnswerRecording, began: float
    ) -> Generator[float | None, float, float]:
        self._open(session, recording)
        now = yield recording.prefill_s if self.works else 0.0
        drafts: list[_Draft] = []
        times: list[float] = []  # of the tokens that are certain
        while len(times) < recording.num_answer:
            may_draft = self._may_draft(drafts, recording, len(times))
            if not drafts or (may_draft and self._is_worth_another(drafts)):
                drafts.append(draft := self._draft(recording, len(times) + len(drafts)))
                now = yield draft.seconds
            else:
                asked_at = now
                self._ask(recording, len(times), drafts, now)
                answered_at = yield None
                self._round_trip.add(answered_at - asked_at)
                while (
                    now < answered_at
                    and self._may_draft(drafts, recording, len(times))
                    and self._is_guess_worth_it(drafts, now - asked_at)
                ):
                    drafts.append(draft := self._draft(recording, len(times) + len(drafts)))
                    now += draft.seconds
                now = (yield now - answered_at) if now > answered_at else answered_at
                num_new, is_rejected = self._settle(drafts)
                times += [now] * num_new
                drafts = [] if is_rejected else drafts[num_new:]
                if is_rejected:
                    self._rewind(recording.num_prompt - 1 + len(times))
            while drafts and drafts[0].is_confident:
                times.append(now)
                drafts.pop(0)
        self.answers.append((began, times[0]))
        self.tokens += [(at, at - before) for before, at in pairwise(times)]
        self.machine.close()
        return (yield 0.0)

    # The session.

    def _open(self, session: str, recording: AnswerRecording) -> None:
        self._rows = self.rows(recording)
        self._num_offered = 0
        opening = Open(
            session=session,
            epoch=0,
            bundle_id=self.bundle_id,
            protocol=PROTOCOL,
            sampling=Sampling(),
            max_positions=len(recording.token_ids) + 1,
            deadline_ms=DEADLINE_MS,
        )
        hidden_size = self._rows.shape[1]
        self.machine = SessionMachine(opening, self.name, hidden_size, Measurements(), lambda: 0.0)
        status = WorkerStatus(online=True, epoch=0, bundle_ids=(self.bundle_id,))
        self.machine.observe({WORKER: status}, is_link_up=True)

    def _offer(self, num_positions: int) -> None:
        """Upload positions [0, num_positions), as far as they have not been offered yet."""
        if num_positions > self._num_offered:
            rows = self._rows[self._num_offered : num_positions]
            self.machine.offer(rows.astype(np.float32))
            self._num_offered = num_positions

    def _ask(
        self, recording: AnswerRecording, num_certain: int, drafts: Sequence[_Draft], now: float
    ) -> None:
        """Ask for the drafts up to the last that no exit is confident of."""
        num_asked = max(k for k, draft in enumerate(drafts, 1) if not draft.is_confident)
        start = recording.num_prompt - 1 + num_certain
        asked = drafts[:num_asked]
        self._offer(start + num_asked)
        token_ids = [draft.token_id for draft in asked]
        trusted = [i for i, draft in enumerate(asked) if draft.is_confident]
        self.machine.ask(start, token_ids, trusted, now=now)

    def _rewind(self, num_positions: int) -> None:
        self.machine.rewind(num_positions)
        self._num_offered = min(self._num_offered, num_positions)

    # Drafts.

    def _draft(self, recording: AnswerRecording, i: int) -> _Draft:
        exit_number = recording.exit_at(i, self.thresholds)
        deepest = len(self.thresholds) - 1
        is_confident = exit_number is not None
        block = deepest if exit_number is None else exit_number
        confidence = recording.confidence[i][block]
        if block == deepest:  # the blocks below the upload layer have run for every position
            self._offer(recording.num_prompt + i)
        is_guess = self.works and not is_confident
        return _Draft(
            token_id=recording.guesses[i] if is_guess else recording.token_id(i),
            confidence=confidence,
            chance=1.0 if is_confident else self._acceptance.probability(confidence),
            seconds=sum(recording.seconds[i][: block + 1]) if self.works else 0.0,
            is_confident=is_confident,
        )

    def _may_draft(
        self, drafts: Sequence[_Draft], recording: AnswerRecording, num_certain: int
    ) -> bool:
        return self.works and num_certain + len(drafts) < recording.num_answer

    def _is_worth_another(self, drafts: Sequence[_Draft]) -> bool:
        return worth_drafting(_survival(drafts), drafts[-1].seconds, self._round_trip.value)

    def _is_guess_worth_it(self, drafts: Sequence[_Draft], elapsed_s: float) -> bool:
        wait_s = max(0.0, self._round_trip.value - elapsed_s)
        return worth_guessing(_survival(drafts), drafts[-1].seconds, wait_s)

    def _settle(self, drafts: Sequence[_Draft]) -> tuple[int, bool]:
        """Return how many tokens the response makes certain, and whether the last is the worker's
        own.
        """
        assert self.response is not None
        is_rejected = self.response.token_id is not None
        judged = [True] * self.response.accepted + [False] * is_rejected
        for draft, is_accepted in zip(drafts, judged, strict=False):
            if not draft.is_confident:
                self._acceptance.update(draft.confidence, accepted=is_accepted)
        return len(judged), is_rejected


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A token that the device chose, and the seconds that it took."""

    token_id: int
    confidence: float
    chance: float
    seconds: float
    is_confident: bool


def _survival(drafts: Iterable[_Draft]) -> float:
    return prod(draft.chance for draft in drafts)


class ReplayWorker:
    """An engine, the links to its devices, and their virtual clock.

    `cpu` gives seconds, of which differences are the time that work has taken.
    """

    def __init__(self, layers: UpperLayers, config: WorkerConfig, cpu: Callable[[], float]) -> None:
        self.now = 0.0
        self.busy_s = 0.0
        self.engine = WorkerEngine(layers, WORKER, config, clock=lambda: self.now)
        self._cpu = cpu
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._waiting: dict[str, Steps] = {}
        self._devices: dict[str, ReplayDevice] = {}

    def serve(
        self, devices: Iterable[tuple[ReplayDevice, Steps]], until_s: float = float("inf")
    ) -> None:
        """Serve until all devices have finished, or until that time."""
        for device, steps in devices:
            self._devices[device.name] = device
            self._schedule(device, steps, next(steps), 0.0)
        while (self._events or self._waiting) and self.now < until_s:
            while self._events and self._events[0][0] <= self.now:
                at, _, act = heapq.heappop(self._events)
                act(at)
            if self._step():
                continue
            if self._events:
                self.now = max(self.now, self._events[0][0])
            elif self._waiting:
                raise RuntimeError(
                    f"the worker does not respond any more, and {sorted(self._waiting)} wait"
                )

    # The worker.

    def _handle(self, device: ReplayDevice, payload: bytes, _: float) -> None:
        began = self._cpu()
        responses = self.engine.handle(device.name, decode_to_worker(payload), self.now)
        self._respond(responses, began)

    def _step(self) -> bool:
        began = self._cpu()
        responses = self.engine.step()
        self._respond(responses or (), began)
        return responses is not None

    def _respond(self, responses: Iterable[EngineResponse], began: float) -> None:
        """Send the responses when the work that began then is done."""
        payloads = [(response, encode(response.message)) for response in responses]
        seconds = self._cpu() - began
        self.now += seconds
        self.busy_s += seconds
        for response, payload in payloads:
            message = response.message
            device = self._devices[response.key.device]
            if isinstance(message, Refused):
                raise RuntimeError(
                    f"the worker refused {device.name}: {message.code}: {message.message}"
                )
            self._push(self.now + device.link_s, partial(self._deliver, device, payload))

    # The devices.

    def _deliver(self, device: ReplayDevice, payload: bytes, at: float) -> None:
        message = decode_to_device(payload)
        if message.session != device.machine.session:
            if isinstance(message, Opened):  # late: the answer needed no worker
                close = encode(Close(message.session))
                self._push(at + device.link_s, partial(self._handle, device, close))
            return
        device.machine.receive(message, at)
        self._send(device, at)
        if device.name in self._waiting and (response := device.machine.take_response(at)):
            device.response = response
            self._resume(device, self._waiting.pop(device.name), at)

    def _resume(self, device: ReplayDevice, steps: Steps, at: float) -> None:
        try:
            seconds = steps.send(at)
        except StopIteration:
            return
        self._send(device, at)
        self._schedule(device, steps, seconds, at)

    def _schedule(
        self, device: ReplayDevice, steps: Steps, seconds: float | None, at: float
    ) -> None:
        """Resume the device when it has worked so long, or when its response comes."""
        if seconds is None:
            self._waiting[device.name] = steps
        else:
            self._push(at + seconds, partial(self._resume, device, steps))

    def _send(self, device: ReplayDevice, at: float) -> None:
        """Send what is due in the device's session."""
        while message := device.machine.next_message(at):
            payload = encode(message.body)
            self._push(at + device.link_s, partial(self._handle, device, payload))

    def _push(self, at: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at, next(self._order), act))
