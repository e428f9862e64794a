"""Detection of two processes that use one identity, such as a copied folder.

At the broker, each connection of one process ends the connection of the other, so their statuses
alternate. Each process has an epoch of its own. So an earlier epoch returns only if both processes
run.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

WINDOW_S: Final = 3600.0
MIN_RETURNS: Final = 2  # a single return may be a message that the broker delivered late
MAX_EPOCHS: Final = 8

SHARED_IDENTITY: Final = "shared_identity"
"""The action in the audit log."""


@dataclass
class _Epochs:
    current: int
    earlier: deque[int] = field(default_factory=lambda: deque(maxlen=MAX_EPOCHS))
    returns: deque[float] = field(default_factory=lambda: deque(maxlen=MIN_RETURNS))
    reported_at: float = float("-inf")


class SharedIdentityDetector:
    """The epochs of each name; for one thread."""

    def __init__(self) -> None:
        self._names: dict[str, _Epochs] = {}

    def observe(self, name: str, epoch: int, now: float) -> bool:
        """Note the epoch of a birth; return whether to report that two processes use the name.

        A name is reported once in `WINDOW_S` seconds.
        """
        epochs = self._names.setdefault(name, _Epochs(epoch))
        if epoch == epochs.current:
            return False
        is_return = epoch in epochs.earlier
        if epochs.current not in epochs.earlier:
            epochs.earlier.append(epochs.current)
        epochs.current = epoch
        if not is_return:
            return False
        epochs.returns.append(now)
        is_certain = len(epochs.returns) == MIN_RETURNS and now - epochs.returns[0] < WINDOW_S
        if not is_certain or now - epochs.reported_at < WINDOW_S:
            return False
        epochs.reported_at = now
        return True
