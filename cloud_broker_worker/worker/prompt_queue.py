"""The prompts that came as token ids and wait for their hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cloud_broker_worker.worker.session import Session, SessionKey

if TYPE_CHECKING:
    from cloud_broker_worker.worker.lower_layers import LowerLayers


class PromptQueue:
    """The choice of the prompt of which a piece runs next, of each device in turn.

    A device has one prompt at a time in the lower layers, and all of these prompts together need at
    most `max_bytes` for their caches, unless there is only one. The caches live while their prompt
    runs. The others begin in the order of their sessions.
    """

    def __init__(
        self, sessions: Mapping[SessionKey, Session], layers: LowerLayers, max_bytes: int
    ) -> None:
        self._sessions = sessions
        self._layers = layers
        self._max_bytes = max_bytes
        self._last_device = ""

    def next_session(self) -> Session | None:
        """Return the session of which a piece runs next, or None if no prompt waits."""
        waiting = self._waiting()
        candidates = [session for session in waiting if session.prompt_run]
        num_bytes = sum(self._num_bytes(session) for session in candidates)
        first = next((session for session in waiting if not session.prompt_run), None)
        if first and (not num_bytes or num_bytes + self._num_bytes(first) <= self._max_bytes):
            candidates.append(first)
        return min(candidates, key=lambda each: self._turn(each.key.device), default=None)

    def _turn(self, device: str) -> tuple[bool, str]:
        """Return the place of a device in the order that follows the last one."""
        return device <= self._last_device, device

    def _waiting(self) -> list[Session]:
        """Return one session of each device, the one that runs or else the oldest that waits."""
        by_device: dict[str, Session] = {}
        for session in sorted(self._sessions.values(), key=lambda each: each.prompt_run is None):
            is_present = session.gone_since is None and not session.is_kept
            if session.awaits_rows and is_present:
                by_device.setdefault(session.key.device, session)
        return list(by_device.values())

    def _num_bytes(self, session: Session) -> int:
        return self._layers.num_bytes(session.num_ids, session.first_layer)

    def run(self, session: Session, max_positions: int) -> None:
        """Compute the hidden states of the next positions of a prompt."""
        if session.prompt_run is None:
            session.prompt_run = self._layers.begin(session.capacity, session.first_layer)
        self._last_device = session.key.device
        start = session.prompt_run.num_positions
        stop = min(start + max_positions, session.num_ids)
        session.store.rows[start:stop] = session.prompt_run(session.tokens[start:stop])
        session.num_computed = max(session.num_computed, stop)
        if stop == session.num_ids:
            session.prompt_run = None
