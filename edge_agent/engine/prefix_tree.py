"""Caches of finished answers, kept for prompts that begin with the same tokens.

The tokens of an app's answers form a radix tree, as in SGLang (arXiv 2312.07104). Each node has the
states of the blocks for its tokens. A prompt copies those of its longest known beginning, and only
the rest of it runs. Each app has a tree of its own, so that no app learns from the time of an
answer what another app has asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from fleet.graphs.cascade import BlockState, Cascade
from fleet.graphs.partition import Int64

MIN_NEW: Final = 2
"""The last positions of a prompt, which always run. One alone would give other bits than in the
chunk of a whole prompt, so that a prompt and its repetition could have different answers.
"""
NUM_RECENT: Final = 4
"""The apps that asked last, which keep their caches longest."""


@dataclass(frozen=True)
class Prefix:
    """The known beginning of a prompt: its tokens, and the successive states of each block.

    A deeper block may have fewer positions, because early exits skipped it.
    """

    token_ids: Int64
    blocks: Sequence[Sequence[BlockState]] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    def num_positions(self, block: int) -> int:
        """Return the number of positions that `block` has run."""
        states = self.blocks[block] if block < len(self.blocks) else ()
        return sum(map(len, states))


@dataclass(eq=False, kw_only=True)
class _Node:
    """A segment of tokens, the states of the blocks for it, and the segments that follow it.

    A block's state may end before the segment does. `used_at` grows with each use.
    """

    token_ids: Int64
    blocks: list[BlockState] = field(default_factory=list)
    parent: _Node | None = None
    used_at: int = 0
    children: dict[int, _Node] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_bytes(self) -> int:
        return self.token_ids.nbytes + sum(state.num_bytes for state in self.blocks)

    def adopt(self, child: _Node) -> None:
        """Add a segment that follows this one."""
        child.parent = self
        self.children[int(child.token_ids[0])] = child

    def split(self, num_tokens: int) -> None:
        """Move everything from token `num_tokens` on into a child. Both get memory of their own."""
        rest = _Node(
            token_ids=self.token_ids[num_tokens:].copy(),
            blocks=[state.view(num_tokens, len(state)).copy() for state in self.blocks],
            used_at=self.used_at,
        )
        for child in self.children.values():
            rest.adopt(child)
        self.token_ids = self.token_ids[:num_tokens].copy()
        self.blocks = [state.view(0, num_tokens).copy() for state in self.blocks]
        self.children = {}
        self.adopt(rest)


class PrefixTree:
    """The kept caches of one app, which were searched last at `used_at`."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.used_at = 0
        self._root = _Node(token_ids=np.empty(0, np.int64))

    def find(self, token_ids: Int64, now: int) -> Prefix:
        """Return the longest known beginning of these tokens, and mark it as used at `now`."""
        self.used_at = now
        path = list(self._match(token_ids))
        for node, _ in path:
            node.used_at = now
        length = sum(count for _, count in path)
        num_blocks = len(path[0][0].blocks) if path else 0
        blocks = [list(_states(path, block)) for block in range(num_blocks)]
        return Prefix(token_ids[:length], blocks)

    def add(self, cascade: Cascade, num_tokens: int, max_bytes: int, now: int) -> None:
        """Keep what is missing here of a cascade's first `num_tokens`, in at most `max_bytes`."""
        token_ids = cascade.token_ids[:num_tokens]
        max_total = self.num_bytes + max_bytes
        parent = self._root
        start = 0
        for node, count in list(self._match(token_ids)):
            if count < len(node):
                node.split(count)
            self._complete(node, cascade, start, max_total)
            node.used_at = now
            parent = node
            start += count
        max_new = (max_total - self.num_bytes) // cascade.position_bytes
        self._append(parent, cascade, start, min(num_tokens, start + max_new), now)

    def remove_oldest(self, used_before: int) -> bool:
        """Remove the leaf that was not used for the longest time. Return False if each one was used
        since `used_before`.
        """
        leaves = (node for node in _descendants(self._root) if not node.children)
        leaf = min(leaves, key=lambda node: node.used_at, default=None)
        if leaf is None or leaf.parent is None or leaf.used_at >= used_before:
            return False
        del leaf.parent.children[int(leaf.token_ids[0])]
        self.num_bytes -= leaf.num_bytes
        return True

    def _match(self, token_ids: Int64) -> Iterator[tuple[_Node, int]]:
        """Yield the nodes that begin these tokens, each with its number of equal tokens."""
        node = self._root
        start = 0
        while start < len(token_ids):
            child = node.children.get(int(token_ids[start]))
            if child is None:
                return
            node = child
            count = shared_length(node.token_ids, token_ids[start:])
            yield node, count
            if count < len(node):
                return
            start += count

    def _complete(self, node: _Node, cascade: Cascade, start: int, max_total: int) -> None:
        """Keep the states of blocks that have run more of the node's positions since."""
        for block in range(cascade.num_blocks):
            state = cascade.state(block, start, start + len(node))
            if block == len(node.blocks):
                node.blocks.append(state.view(0, 0).copy())
            num_more = state.num_bytes - node.blocks[block].num_bytes
            if 0 < num_more <= max_total - self.num_bytes:
                node.blocks[block] = state.copy()
                self.num_bytes += num_more

    def _append(self, parent: _Node, cascade: Cascade, start: int, stop: int, now: int) -> None:
        """Keep tokens [start, stop) of a cascade as a new segment."""
        if start >= stop:
            return
        blocks = range(cascade.num_blocks)
        node = _Node(
            token_ids=cascade.token_ids[start:stop].copy(),
            blocks=[cascade.state(block, start, stop).copy() for block in blocks],
            used_at=now,
        )
        parent.adopt(node)
        self.num_bytes += node.num_bytes


class KeptCaches:
    """The kept caches of all apps. Any thread may use them.

    They fill the memory that `free_bytes` returns at the time. Running answers come first: before
    one begins, `find` frees what it needs. Apps that are not among the `NUM_RECENT` that asked last
    lose their caches first. Of the others, those with caches of at least mean size do. So an app
    that floods the device cannot take what a smaller app uses.
    """

    def __init__(self, free_bytes: Callable[[], int]) -> None:
        self._free_bytes = free_bytes
        self._lock = threading.Lock()
        self._trees: dict[str, PrefixTree] = {}
        self._num_uses = 0

    @property
    def num_bytes(self) -> int:
        """The memory of all kept caches."""
        return sum(tree.num_bytes for tree in self._trees.values())

    def find(self, app: str, token_ids: Sequence[int]) -> Prefix:
        """Return what the app's caches have of a prompt, of which `MIN_NEW` positions have to run.

        The memory of the prompt's answer counts as used already.
        """
        prompt = np.array(token_ids[:-MIN_NEW], np.int64)
        with self._lock:
            self._num_uses += 1
            tree = self._trees.get(app) or PrefixTree()
            prefix = tree.find(prompt, self._num_uses)
            self._make_room(0, list(self._trees), self._num_uses + 1)
        return prefix  # its arrays never change, and stay while it is used

    def keep(self, app: str, cascade: Cascade, num_tokens: int) -> None:
        """Keep the caches of an answer that has ended, for its first `num_tokens` tokens."""
        with self._lock:
            self._num_uses += 1
            tree = self._trees.setdefault(app, PrefixTree())
            num_tokens = min(num_tokens, cascade.num_filled(0))
            prefix = tree.find(cascade.token_ids[:num_tokens], self._num_uses)
            num_bytes = missing_bytes(cascade, num_tokens, prefix)
            idle = self._idle_apps()
            others = [
                name
                for name, other in self._trees.items()
                if name in idle or other.num_bytes >= tree.num_bytes
            ]
            self._make_room(num_bytes, others, self._num_uses)
            tree.add(cascade, num_tokens, max(0, self._room), self._num_uses)
            self._drop_empty()

    def clear(self) -> None:
        """Drop all caches, as when the model changes."""
        with self._lock:
            self._trees.clear()

    @property
    def _room(self) -> int:
        return self._free_bytes() - self.num_bytes

    def _make_room(self, num_bytes: int, apps: list[str], used_before: int) -> None:
        """Remove caches of these apps until there is room for `num_bytes` more."""
        while self._room < num_bytes and apps:
            victim = self._victim(apps)
            if not self._trees[victim].remove_oldest(used_before):
                apps.remove(victim)

    def _victim(self, apps: list[str]) -> str:
        """Return the app among these that loses caches next."""
        idle = [app for app in self._idle_apps() if app in apps]
        if idle:
            return idle[0]
        mean_bytes = self.num_bytes / len(self._trees)
        large = [app for app in apps if self._trees[app].num_bytes >= mean_bytes]
        return min(large or apps, key=lambda app: self._trees[app].used_at)

    def _idle_apps(self) -> list[str]:
        """Return the apps that are not among those that asked last, the longest idle first."""
        return sorted(self._trees, key=lambda app: self._trees[app].used_at)[:-NUM_RECENT]

    def _drop_empty(self) -> None:
        for app in [app for app, tree in self._trees.items() if not tree.num_bytes]:
            del self._trees[app]


def missing_bytes(cascade: Cascade, num_tokens: int, prefix: Prefix) -> int:
    """Return the memory of what a cascade has run of its first `num_tokens`, beyond a prefix."""
    num_bytes = cascade.token_ids[len(prefix) : num_tokens].nbytes
    for block in range(cascade.num_blocks):
        num_bytes += cascade.state(block, prefix.num_positions(block), num_tokens).num_bytes
    return num_bytes


def shared_length(one: Int64, other: Int64) -> int:
    """Return the number of tokens with which both sequences begin."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length


def _states(path: Sequence[tuple[_Node, int]], block: int) -> Iterator[BlockState]:
    """Yield the states of a block along a path, up to the first position that it has not run."""
    for node, count in path:
        if block >= len(node.blocks):
            return
        state = node.blocks[block].view(0, count)
        yield state
        if len(state) < count:
            return


def _descendants(node: _Node) -> Iterator[_Node]:
    waiting = list(node.children.values())
    while waiting:
        child = waiting.pop()
        yield child
        waiting += child.children.values()
