"""The mode of the next token, and the mode changes within an answer."""

from __future__ import annotations

from typing import Final

from edge_agent.generation.mode_policy import Targets, decide_mode, wait_ms
from edge_agent.measurements import Measurements
from fleet.protocol.modes import Mode
from fleet.protocol.report import Switch

PROBE_TOKENS: Final = 64  # tokens without the cloud, after which a working link is measured again
MAX_SWITCHES: Final = 50
SAMPLED: Final = "this answer is a sample that measures the agreement of the exits"


class ModeController:
    """The mode of one answer: the configured mode, or in `auto` the one that measurements suggest.

    An answer that is a sample is verified as long as the cloud is available, and collaborative
    after the cloud is lost.
    """

    def __init__(
        self,
        configured: Mode,
        targets: Targets,
        measurements: Measurements,
        deadline_ms: int,
        *,
        is_sample: bool = False,
    ) -> None:
        self.switches: tuple[Switch, ...] = ()
        self.is_auto = configured is Mode.AUTO
        self.is_alone = configured is Mode.STANDALONE
        self.needs_cloud = configured is Mode.VERIFIED
        self._is_sample = is_sample
        self._current = Mode.COLLABORATIVE if self.is_auto else configured
        self._since = 0
        self._probed_at = 0
        self._was_up = True
        self._targets = targets
        self._measurements = measurements
        self._deadline_ms = deadline_ms

    def at(self, num_tokens: int, *, is_link_up: bool) -> Mode:
        """Return the mode of the token after `num_tokens` others."""
        if self._is_sample:
            self._is_sample = is_link_up
            if is_link_up:
                self._switch(num_tokens, Mode.VERIFIED, SAMPLED)
            else:
                self._switch(num_tokens, Mode.COLLABORATIVE, "the cloud is lost")
        if not self.is_auto:
            return self._current
        came_back = is_link_up and not self._was_up
        self._was_up = is_link_up
        snapshot = self._measurements.snapshot()
        current = self._current
        if came_back:  # the measurements are older than the loss of the link
            self._switch(num_tokens, Mode.COLLABORATIVE, "the link is back")
            return self._current
        num_since = num_tokens - self._since
        decision = decide_mode(snapshot, self._targets, current, num_since, is_link_up=is_link_up)
        self._switch(num_tokens, decision.mode, decision.reason)
        is_probe_due = num_tokens - self._probed_at >= PROBE_TOKENS - 1
        if self._current is Mode.STANDALONE and is_probe_due and is_link_up:
            self._probed_at = num_tokens + 1
            return Mode.COLLABORATIVE
        return self._current

    def _switch(self, num_tokens: int, mode: Mode, reason: str) -> None:
        if mode is self._current:
            return
        self._current = mode
        self._since = num_tokens
        self._probed_at = num_tokens
        if len(self.switches) < MAX_SWITCHES:
            self.switches += (Switch(num_tokens, mode, reason),)

    def wait_ms(self) -> int | None:
        """Return the milliseconds to wait for an optional verify request, or None for the device's
        setting.
        """
        return wait_ms(self._measurements.snapshot(), self._deadline_ms) if self.is_auto else None
