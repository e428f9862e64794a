"""A link that loses, doubles, holds back and repeats messages, as a seed has it."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeAlias, TypeVar

from fleet.protocol.topics import PREFIX
from fleet.transport.base import Will
from fleet.transport.in_memory import InMemoryBroker, InMemoryTransport

T = TypeVar("T")
Said: TypeAlias = tuple[str, bytes]
MAX_HELD_FOR: Final = 8
NUM_REMEMBERED: Final = 200


@dataclass(frozen=True)
class Odds:
    """Probability of each fate of a message; with the rest it passes as it should."""

    lost: float = 0.0
    doubled: float = 0.0
    held: float = 0.0
    replayed: float = 0.0


PERFECT: Final = Odds()


class Mischief(Generic[T]):
    """Replace each message by what arrives instead.

    A message is lost, comes twice, comes after later ones, or brings an old one along, perhaps
    from a session that ended long ago.
    """

    def __init__(self, seed: int, odds: Odds) -> None:
        self.num_done = 0
        self._random = random.Random(seed)
        self._odds = odds
        self._lock = threading.Lock()
        self._held: list[tuple[int, T]] = []
        self._past: deque[T] = deque(maxlen=NUM_REMEMBERED)

    def __call__(self, message: T) -> list[T]:
        """Return the messages that arrive now, in this order."""
        with self._lock:
            self._past.append(message)
            fate = self._random.random()
            odds = self._odds
            arriving = [message]
            for probability, other in (
                (odds.lost, []),
                (odds.doubled, [message, message]),
                (odds.replayed, [self._random.choice(self._past), message]),
            ):
                if 0 <= fate < probability:
                    arriving = other
                    self.num_done += 1
                fate -= probability
            if 0 <= fate < odds.held:
                self._held.append((self._random.randint(1, MAX_HELD_FOR) + 1, message))
                arriving = []
                self.num_done += 1
            self._held = [(left - 1, held) for left, held in self._held]
            arriving += [held for left, held in self._held if left == 0]
            self._held = [(left, held) for left, held in self._held if left > 0]
            return arriving


class HostileLink(InMemoryTransport):
    """A device's link that damages the messages of sessions, in both directions.

    All other messages come twice at most: QoS 1 loses nothing, but it repeats. `said` are the
    messages that the device sent within sessions.
    """

    def __init__(
        self, broker: InMemoryBroker, name: str, will: Will | None, seed: int, odds: Odds
    ) -> None:
        self.said: list[Said] = []
        self.up: Mischief[Said] = Mischief(seed, odds)
        self.down: Mischief[Said] = Mischief(seed + 1, odds)
        self._certain: Mischief[Said] = Mischief(seed + 2, Odds(doubled=odds.doubled))
        self._num_before: int | None = None
        self._forge: Callable[[Sequence[Said]], Iterable[Said]] = lambda said: said
        super().__init__(broker, name, will)

    @property
    def has_forged(self) -> bool:
        """Whether what was to be forged has been sent."""
        return self._num_before is not None and len(self.said) >= self._num_before

    def forge(self, after: int, make: Callable[[Sequence[Said]], Iterable[Said]]) -> None:
        """Send ``make(said)`` in the device's name after its next `after` messages."""
        self.said.clear()
        self._num_before = after
        self._forge = make

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        mischief = self._certain if qos else self.up
        for arriving in mischief((topic, payload)):
            super().publish(*arriving, qos=qos, retain=retain)
        if f"{PREFIX}/w/" in topic or f"{PREFIX}/open/" in topic:
            self.said.append((topic, payload))
            if len(self.said) == self._num_before:
                for forged in self._forge(list(self.said)):
                    super().publish(*forged)

    def _deliver(self, link: int, topic: str, payload: bytes, *, is_retained: bool) -> None:
        arriving = self.down((topic, payload)) if "/s/" in topic else [(topic, payload)]
        for message in arriving:
            super()._deliver(link, *message, is_retained=is_retained)
