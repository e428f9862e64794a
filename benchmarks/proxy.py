"""A TCP proxy in front of a broker that counts bytes and imitates faults of networks."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal, Self

HOST: Final = "127.0.0.1"
CALL_S: Final = 10.0
MAX_QUEUED_PIECES: Final = 64
LINGER_0: Final = struct.pack("ii", 1, 0)  # a close then sends RST

Way = Literal["up", "down"]


@dataclass(frozen=True)
class Shape:
    """The delay and speed of bytes in one direction.

    They travel in pieces of at most `piece_bytes`, each `latency_s` late with a jitter of
    `jitter_s`.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = float("inf")
    piece_bytes: int = 1 << 16


class Pace:
    """The arrival times of the pieces of one connection in one direction.

    As in TCP, no piece overtakes another.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._sent = 0.0
        self._due = 0.0

    def due(self, now: float, num_bytes: int, shape: Shape) -> float:
        """Return the arrival time of a piece sent at `now`, after the earlier pieces."""
        self._sent = max(self._sent, now) + num_bytes / shape.bytes_per_s
        late = shape.latency_s + self._random.uniform(-shape.jitter_s, shape.jitter_s)
        self._due = max(self._due, self._sent + max(0.0, late))
        return self._due


class Proxy:
    """A proxy to `target` on this machine; changes hold for live connections and new ones.

    Use it as a context manager; its methods return when the change is made. It listens on `port`,
    and `num_bytes` counts the bytes of each direction. asyncio's usual loops sleep whole
    milliseconds; `new_loop` may make a finer one.
    """

    def __init__(
        self,
        target: int,
        seed: int = 0,
        new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    ) -> None:
        self.shapes: dict[Way, Shape] = {"up": Shape(), "down": Shape()}
        self.num_bytes: Counter[Way] = Counter()
        self.num_connections = 0
        self._target = target
        self._seed = seed
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._placeholder: socket.socket | None = None
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._new_loop = new_loop
        self._thread = threading.Thread(target=self._run_loop, name=f"proxy-{target}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._loop = self._started.result(CALL_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(CALL_S)

    def shape(self, up: Shape, down: Shape | None = None) -> None:
        """Set the shape of both directions; `down` is that of `up` by default."""
        self.shapes = {"up": up, "down": down or up}

    def cut(self) -> None:
        """Close every connection; new ones are accepted."""
        self._call(lambda: self._end_all(reset=False))

    def reset(self) -> None:
        """End every connection with RST; new ones are accepted."""
        self._call(lambda: self._end_all(reset=True))

    def refuse(self) -> None:
        """Close every connection; new ones are refused."""
        self._call(self._refuse)

    def freeze(self) -> None:
        """Hold back every byte; held bytes arrive after `heal`."""
        self._call(self._gate.clear)

    def swallow(self) -> None:
        """Make every connection half open: bytes are read and dropped silently. New ones work."""
        self._call(self._swallow)

    def heal(self) -> None:
        """Accept connections again, release frozen bytes, and reset half-open connections."""
        self._call(self._heal)

    def _call(self, function: Callable[[], object]) -> None:
        async def call() -> None:
            result = function()
            if asyncio.iscoroutine(result):
                await result

        asyncio.run_coroutine_threadsafe(call(), self._loop).result(CALL_S)

    def _run_loop(self) -> None:
        with asyncio.Runner(loop_factory=self._new_loop) as runner:
            runner.run(self._run())

    async def _run(self) -> None:
        self._stopping = asyncio.Event()
        self._gate = asyncio.Event()
        self._gate.set()
        self._server = await asyncio.start_server(self._serve, HOST, 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self._started.set_result(asyncio.get_running_loop())
        await self._stopping.wait()
        await self._refuse()
        if self._placeholder:
            self._placeholder.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            far_reader, far_writer = await asyncio.open_connection(HOST, self._target)
        except OSError:
            _end(writer, reset=True)
            return
        self.num_connections += 1
        connection = _Connection(self, writer, far_writer)
        self._connections.add(connection)
        try:
            seed = self._seed + 2 * self.num_connections
            await connection.run(reader, far_reader, Pace(seed), Pace(seed + 1), self._gate)
        finally:
            self._connections.discard(connection)

    async def _end_all(self, *, reset: bool) -> None:
        for connection in list(self._connections):
            await connection.end(reset=reset)

    def _swallow(self) -> None:
        for connection in self._connections:
            connection.swallows = True

    async def _refuse(self) -> None:
        self._server.close()
        if self._placeholder is None:
            self._placeholder = socket.socket()
            self._placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._placeholder.bind(
                (HOST, self.port)
            )  # without listening: no other process gets the port
        await self._end_all(reset=False)

    async def _heal(self) -> None:
        self._gate.set()
        for connection in list(self._connections):
            if connection.swallows:
                await connection.end(reset=True)
        if self._placeholder:
            self._placeholder.close()
            self._placeholder = None
            self._server = await asyncio.start_server(self._serve, HOST, self.port)


class _Connection:
    """A client's connection and the one to the target.

    Each direction has a task that reads and one that writes.
    """

    def __init__(self, proxy: Proxy, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.swallows = False
        self._proxy = proxy
        self._ends = (near, far)
        self._ended = asyncio.Event()

    async def run(
        self,
        near: asyncio.StreamReader,
        far: asyncio.StreamReader,
        up: Pace,
        down: Pace,
        gate: asyncio.Event,
    ) -> None:
        """Forward until one side ends; bytes sent before are included."""
        ups: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_QUEUED_PIECES)
        downs: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_QUEUED_PIECES)
        tasks = [
            asyncio.ensure_future(task)
            for task in (
                self._read(near, ups, up, "up"),
                self._write(self._ends[1], ups, gate),
                self._read(far, downs, down, "down"),
                self._write(self._ends[0], downs, gate),
            )
        ]
        await self._ended.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.end(reset=False)

    async def _read(
        self,
        reader: asyncio.StreamReader,
        queue: asyncio.Queue[tuple[float, bytes]],
        pace: Pace,
        way: Way,
    ) -> None:
        clock = asyncio.get_running_loop().time
        piece = b"-"
        while piece:
            try:
                piece = await reader.read(self._proxy.shapes[way].piece_bytes)
            except OSError:
                piece = b""
            self._proxy.num_bytes[way] += len(piece)
            if not self.swallows:
                await queue.put((pace.due(clock(), len(piece), self._proxy.shapes[way]), piece))

    async def _write(
        self,
        writer: asyncio.StreamWriter,
        queue: asyncio.Queue[tuple[float, bytes]],
        gate: asyncio.Event,
    ) -> None:
        clock = asyncio.get_running_loop().time
        piece = b"-"
        with suppress(OSError):
            while piece:
                due, piece = await queue.get()
                await asyncio.sleep(max(0.0, due - clock()))
                await gate.wait()
                writer.write(piece)
                await writer.drain()
        self._ended.set()

    async def end(self, *, reset: bool) -> None:
        """End both sides."""
        self._ended.set()
        for writer in self._ends:
            _end(writer, reset=reset)


def _end(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    if reset and not writer.is_closing():
        with suppress(OSError):
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0
            )
            writer.transport.abort()
            return
    writer.close()
