"""A TCP proxy before a broker, which counts bytes and does to a link what networks do: slow it, cut it, and worse."""

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
from types import TracebackType
from typing import Final, Literal, Self

HOST: Final = "127.0.0.1"
CALL_S: Final = 10.0
MAX_QUEUED_PIECES: Final = 64
LINGER_0: Final = struct.pack("ii", 1, 0)  # a close then sends RST

Way = Literal["up", "down"]


@dataclass(frozen=True)
class Shape:
    """How bytes travel one way: in pieces of at most `piece_bytes`, each `latency_s` late, give or take `jitter_s`."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = float("inf")
    piece_bytes: int = 1 << 16


class Pace:
    """When each piece of one way of one connection arrives; never before the one ahead of it, as in TCP."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._sent = 0.0
        self._due = 0.0

    def due(self, now: float, num_bytes: int, shape: Shape) -> float:
        """The time when a piece arrives that sets off `now`, behind what is still being sent."""
        self._sent = max(self._sent, now) + num_bytes / shape.bytes_per_s
        late = shape.latency_s + self._random.uniform(-shape.jitter_s, shape.jitter_s)
        self._due = max(self._due, self._sent + max(0.0, late))
        return self._due


class Proxy:
    """Forwards connections to `target` on this machine. What is done to it holds for live connections and new ones.

    Use as a context manager; its methods return when the change is made. `port` is where it listens, and `num_bytes`
    counts what has come each way. asyncio's usual loops sleep whole milliseconds; `new_loop` may make a finer one.
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(CALL_S)

    def shape(self, up: Shape, down: Shape | None = None) -> None:
        """Gives both ways a shape, `down` that of `up` where it is not given."""
        self.shapes = {"up": up, "down": down or up}

    def cut(self) -> None:
        """Closes every connection; new ones are taken."""
        self._call(lambda: self._end_all(reset=False))

    def reset(self) -> None:
        """Ends every connection with RST; new ones are taken."""
        self._call(lambda: self._end_all(reset=True))

    def refuse(self) -> None:
        """Closes every connection; new ones are refused."""
        self._call(self._refuse)

    def freeze(self) -> None:
        """Holds back every byte; what was held arrives when it is healed."""
        self._call(self._gate.clear)

    def swallow(self) -> None:
        """Makes every connection half open: bytes are taken and lost, and nobody is told. New ones work."""
        self._call(self._swallow)

    def heal(self) -> None:
        """Takes connections again, lets through what was frozen, and resets those that are half open."""
        self._call(self._heal)

    def _call(self, what: Callable[[], object]) -> None:
        async def call() -> None:
            result = what()
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
            )  # without listening: nobody else gets the port meanwhile
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
    """A client's connection and the one to the target, with a task each way that reads and one that writes."""

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
        """Forwards until one side ends, what it said before included."""
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
        """Ends both sides."""
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
