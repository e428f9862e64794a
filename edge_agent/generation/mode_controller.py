"""Which mode the next token is generated in, and what was decided on the way."""

from __future__ import annotations

from typing import Final

from edge_agent.generation.mode_policy import Targets, decide, wait_ms
from edge_agent.measurements import Measurements
from fleet.protocol.modes import Mode
from fleet.protocol.report import Switch

PROBE_TOKENS: Final = (
    64  # after so many tokens alone on a link that is up, the cloud is asked once, to measure it
)
MAX_SWITCHES: Final = 50
SAMPLED: Final = "this answer is a sample, by which the exits are judged"


class ModeController:
    """The mode of one answer: a fixed one, or in `auto` whatever the measurements suggest.

    A sample of collaborative answers is verified as long as the cloud is there, and collaborative from then on.
    """

    def __init__(
        self,
        wanted: Mode,
        targets: Targets,
        measurements: Measurements,
        deadline_ms: int,
        *,
        is_sample: bool = False,
    ) -> None:
        self.switches: tuple[Switch, ...] = ()
        self.is_auto = wanted is Mode.AUTO
        self.is_alone = wanted is Mode.STANDALONE
        self.needs_cloud = wanted is Mode.VERIFIED
        self._is_sample = is_sample
        self._current = Mode.COLLABORATIVE if self.is_auto else wanted
        self._since = 0
        self._was_up = True
        self._targets = targets
        self._measurements = measurements
        self._deadline_ms = deadline_ms

    def at(self, num_tokens: int, *, is_link_up: bool) -> Mode:
        """The mode of the token after `num_tokens` others."""
        if self._is_sample:
            self._is_sample = is_link_up
            mode, reason = (
                (Mode.VERIFIED, SAMPLED)
                if is_link_up
                else (Mode.COLLABORATIVE, "the cloud is lost")
            )
            self._switch(num_tokens, mode, reason)
        if not self.is_auto:
            return self._current
        came_back = is_link_up and not self._was_up
        self._was_up = is_link_up
        snapshot = self._measurements.snapshot()
        current = self._current
        if came_back:  # what is known of the link is from before
            self._switch(num_tokens, Mode.COLLABORATIVE, "the link is back")
            return self._current
        decision = decide(
            snapshot, self._targets, current, num_tokens - self._since, is_link_up=is_link_up
        )
        self._switch(num_tokens, decision.mode, decision.reason)
        is_probe = (
            self._current is Mode.STANDALONE
            and (num_tokens - self._since) % PROBE_TOKENS == PROBE_TOKENS - 1
        )
        return Mode.COLLABORATIVE if is_probe and is_link_up else self._current

    def _switch(self, num_tokens: int, mode: Mode, reason: str) -> None:
        if mode is self._current:
            return
        self._current = mode
        self._since = num_tokens
        if len(self.switches) < MAX_SWITCHES:
            self.switches += (Switch(num_tokens, mode, reason),)

    def wait_ms(self) -> int | None:
        """How long an assist may take; None is as long as the device's settings say."""
        return wait_ms(self._measurements.snapshot(), self._deadline_ms) if self.is_auto else None
