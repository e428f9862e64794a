"""Devices that replay recordings against a real engine, in virtual time.

The engine really runs every message and every step; the clock moves on by the time that this took. Between two things
to do it jumps. So devices cost nothing, an idle worker costs no waiting, and the worker has its cores to itself.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Final, NamedTuple, TypeAlias

from benchmarks.recordings import Recording
from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.engine import Engine
from cloud_broker_worker.worker.upper_layers import UpperLayers
from edge_agent.generation.acceptance_rate import AcceptanceRate
from edge_agent.generation.draft_policy import worth_drafting, worth_guessing
from edge_agent.measurements import Mean
from edge_agent.session.cloud_session import HELD_POSITIONS
from fleet.protocol.codec import decode_to_worker, encode, pack_chunk
from fleet.protocol.hidden_states import Float16
from fleet.protocol.messages import (
    PROTOCOL,
    Close,
    Context,
    ContextChunk,
    Open,
    Refused,
    Sampling,
    ToWorker,
    Verified,
    Verify,
)

DEADLINE_MS: Final = 600_000
CHUNK_POSITIONS: Final = 64

Steps: TypeAlias = Generator[float | list[ToWorker] | None, float, None]
"""What a device does: seconds that it works, messages that it sends, or None: it waits for an answer. It is told the
time."""


@dataclass(kw_only=True)
class Device:
    """One device: its messages are due at the worker after `link_s` seconds, and so are the answers here.

    It collaborates as in edge_agent/generation/speculative.py. With `works` false its steps take no time, and it asks for each token
    alone, as if it knew it. `tokens` are (time, seconds since the token before) of each token but an answer's first.
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
    verdict: Verified | None = None  # the worker's last one
    _acceptance: AcceptanceRate = field(default_factory=AcceptanceRate)
    _round_trip: Mean = field(default_factory=lambda: Mean(0.1))

    def run(self, recordings: Iterable[Recording]) -> Steps:
        """Answers one recording after the other."""
        yield self.start_s
        for number, recording in enumerate(recordings):
            yield from self._answer(f"{self.name}-{number}", recording)

    def _answer(self, session: str, recording: Recording) -> Steps:
        size = len(recording.token_ids) + 1
        began = yield [
            Open(
                session=session,
                epoch=0,
                bundle_id=self.bundle_id,
                protocol=PROTOCOL,
                sampling=Sampling(),
                max_positions=size,
                deadline_ms=DEADLINE_MS,
            )
        ]
        now = yield recording.prefill_s if self.works else 0.0
        upload = _Upload(session, self.rows(recording))
        drafts: list[_Draft] = []
        times: list[float] = []  # of the tokens that are certain
        while len(times) < recording.num_answer:
            may_draft = self._may_draft(drafts, recording, len(times))
            if not drafts or (may_draft and self._is_worth_another(drafts)):
                drafts.append(draft := self._draft(recording, len(times) + len(drafts)))
                now = yield draft.seconds
            else:
                num_asked = max(k for k, draft in enumerate(drafts, 1) if not draft.is_sure)
                start = recording.num_prompt - 1 + len(times)
                asked_at = now
                yield upload.question(start, drafts[:num_asked])
                answered_at = yield None
                self._round_trip.add(answered_at - asked_at)
                while (
                    now < answered_at
                    and self._may_draft(drafts, recording, len(times))
                    and self._goes_on(drafts, now - asked_at)
                ):
                    drafts.append(draft := self._draft(recording, len(times) + len(drafts)))
                    now += draft.seconds
                now = (yield now - answered_at) if now > answered_at else answered_at
                num_new, is_rejected = self._settle(drafts)
                times += [now] * num_new
                drafts = [] if is_rejected else drafts[num_new:]
                if is_rejected:
                    upload.rewind(recording.num_prompt - 1 + len(times))
            while drafts and drafts[0].is_sure:
                times.append(now)
                if drafts.pop(0).is_deepest:
                    yield upload.held(recording.num_prompt - 1 + len(times))
        self.answers.append((began, times[0]))
        self.tokens += [(at, at - before) for before, at in pairwise(times)]
        yield [Close(session)]

    def _draft(self, recording: Recording, i: int) -> _Draft:
        exit_number = recording.exit_at(i, self.thresholds)
        deepest = len(self.thresholds) - 1
        block, is_sure = (deepest, False) if exit_number is None else (exit_number, True)
        confidence = recording.confidence[i][block]
        return _Draft(
            recording.guesses[i] if self.works and not is_sure else recording.token_id(i),
            confidence,
            chance=1.0 if is_sure else self._acceptance.probability(confidence),
            seconds=sum(recording.seconds[i][: block + 1]) if self.works else 0.0,
            is_sure=is_sure,
            is_deepest=block == deepest,
        )

    def _may_draft(self, drafts: Sequence[_Draft], recording: Recording, num_certain: int) -> bool:
        return self.works and num_certain + len(drafts) < recording.num_answer

    def _is_worth_another(self, drafts: Sequence[_Draft]) -> bool:
        return worth_drafting(_survival(drafts), drafts[-1].seconds, self._round_trip.value)

    def _goes_on(self, drafts: Sequence[_Draft], elapsed_s: float) -> bool:
        return worth_guessing(
            _survival(drafts), drafts[-1].seconds, max(0.0, self._round_trip.value - elapsed_s)
        )

    def _settle(self, drafts: Sequence[_Draft]) -> tuple[int, bool]:
        """How many tokens the verdict makes certain, and whether the last of them is the worker's own."""
        assert self.verdict is not None
        num_accepted = self.verdict.accepted
        is_rejected = self.verdict.token_id is not None
        judged = [True] * num_accepted + [False] * is_rejected
        for draft, is_accepted in zip(drafts, judged, strict=False):
            if not draft.is_sure:
                self._acceptance.update(draft.confidence, accepted=is_accepted)
        return len(judged), is_rejected


class _Draft(NamedTuple):
    """A token that the device chose, and the seconds that it took."""

    token_id: int
    confidence: float
    chance: float
    seconds: float
    is_sure: bool
    is_deepest: bool


def _survival(drafts: Iterable[_Draft]) -> float:
    return prod(draft.chance for draft in drafts)


class _Upload:
    """What a session sends, in order."""

    def __init__(self, session: str, rows: Float16) -> None:
        self._session = session
        self._rows = rows
        self._sent = self._branch = self._request = 0

    def question(self, start: int, drafts: Sequence[_Draft]) -> list[ToWorker]:
        """Whether these follow position `start`, with the context that this needs."""
        pieces = self._chunks(start + len(drafts))
        last = pieces.pop() if pieces else None
        self._request += 1
        token_ids = tuple(draft.token_id for draft in drafts)
        trusted = tuple(i for i, draft in enumerate(drafts) if draft.is_sure)
        verify = Verify(
            session=self._session,
            request=self._request,
            branch=self._branch,
            start=start,
            draft=token_ids,
            deadline_ms=DEADLINE_MS,
            chunk=last,
            trusted=trusted,
        )
        return [*(Context(self._session, piece) for piece in pieces), verify]

    def held(self, stop: int) -> list[ToWorker]:
        """Positions up to `stop`, once they are too many to wait for a question."""
        if stop - self._sent <= HELD_POSITIONS:
            return []
        return [Context(self._session, piece) for piece in self._chunks(stop)]

    def rewind(self, num_positions: int) -> None:
        """Forgets every position from `num_positions` on, as the worker does."""
        self._sent = min(self._sent, num_positions)
        self._branch += 1

    def _chunks(self, stop: int) -> list[ContextChunk]:
        starts = range(self._sent, stop, CHUNK_POSITIONS)
        self._sent = max(self._sent, stop)
        return [
            pack_chunk(self._branch, i, self._rows[i : min(i + CHUNK_POSITIONS, stop)])
            for i in starts
        ]


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
                raise RuntimeError(
                    f"the worker refused {name}: {answer.message.code}: {answer.message.message}"
                )

    def _step(self) -> bool:
        began = self._cpu()
        answers = self.engine.step()
        for answer in answers or ():
            encode(answer.message)
        self._spend(self._cpu() - began)
        for answer in answers or ():
            if not isinstance(answer.message, Verified):
                raise RuntimeError(
                    f"expected a verdict for {answer.key.device}, got {answer.message}"
                )
            device, steps = self._waiting.pop(answer.key.device)
            device.verdict = answer.message
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
