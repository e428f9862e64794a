"""The baselines' device: prompts or hidden states to a worker of `benchmarks.drivers.cloud`.

python -m benchmarks.drivers.client --identity FOLDER --bundle FOLDER

It is controlled by JSON lines.
"""

from __future__ import annotations

import argparse
import queue
import threading
import uuid
from pathlib import Path
from typing import Any, Final

import msgspec
import onnxruntime as ort

from benchmarks.drivers.answer import DriverAnswer, Stopwatch
from benchmarks.drivers.protocol import serve_lines
from benchmarks.drivers.wire import (
    Dtype,
    Failure,
    Prompt,
    ToCloud,
    decode_to_client,
    encode,
    pieces,
)
from edge_agent.engine.tokenizer import ChatTokenizer
from fleet.bundles.manifest import Bundle
from fleet.errors import FleetError
from fleet.graphs.cascade import Cascade
from fleet.graphs.partition import Partition
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.protocol.modes import CLOUD
from fleet.protocol.prompt import PromptRequest
from fleet.protocol.report import WorkerStatus, decode_status
from fleet.transport.base import Transport
from fleet.transport.mqtt import MqttTransport

TOKEN_TIMEOUT_S: Final = 60.0
WORKER_TIMEOUT_S: Final = 10.0


class Channel:
    """A connection to workers that counts messages in both directions."""

    def __init__(self, transport: Transport) -> None:
        self.messages_up = self.messages_down = 0
        self._transport = transport
        self._online: set[str] = set()
        self._changed = threading.Condition()
        self._arrived: queue.Queue[tuple[str, bytes] | None] = queue.Queue()
        transport.subscribe(topics.WORKER_STATUS_FILTER, self._on_status, qos=1)
        transport.subscribe(topics.to_device(transport.name, "+"), self._on_token)

    def open(self, worker: str) -> ClientSession:
        """Open a session with a worker.

        Raises:
            FleetError: the worker is not online within `WORKER_TIMEOUT_S` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: worker in self._online, WORKER_TIMEOUT_S):
                raise FleetError(f"{worker} was not online within {WORKER_TIMEOUT_S:g} s")
        return ClientSession(self, worker)

    def send(self, worker: str, session: str, message: ToCloud) -> None:
        self.messages_up += 1
        self._transport.publish(
            topics.to_worker(worker, self._transport.name, session), encode(message)
        )

    def token(self, worker: str, session: str) -> int:
        """Return the session's next token.

        Raises:
            FleetError: the worker failed, is offline, or sent nothing for `TOKEN_TIMEOUT_S`
                seconds.
        """
        while True:
            if worker not in self._online:
                raise FleetError(f"{worker} went offline during an answer")
            try:
                arrived = self._arrived.get(timeout=TOKEN_TIMEOUT_S)
            except queue.Empty:
                raise FleetError(f"{worker} sent nothing for {TOKEN_TIMEOUT_S:g} s") from None
            if arrived is None or arrived[0] != session:
                continue
            message = decode_to_client(arrived[1])
            if isinstance(message, Failure):
                raise FleetError(f"{worker} failed: {message.message}")
            return message.token_id

    def _on_token(self, topic: str, payload: bytes) -> None:
        self.messages_down += 1
        self._arrived.put((topic.rsplit("/", 1)[-1], payload))

    def _on_status(self, topic: str, payload: bytes) -> None:
        (worker,) = topics.parse_topic(topic, topics.WORKER_STATUS_FILTER)
        with self._changed:
            if decode_status(payload, WorkerStatus).online:
                self._online.add(worker)
            else:
                self._online.discard(worker)
                self._arrived.put(None)  # wakes up a waiting session
            self._changed.notify_all()


class ClientSession:
    """One answer of one worker."""

    def __init__(self, channel: Channel, worker: str) -> None:
        self._channel = channel
        self._worker = worker
        self._name = uuid.uuid4().hex

    def send(self, message: ToCloud) -> None:
        self._channel.send(self._worker, self._name, message)

    def token(self) -> int:
        """Return the next token; raise FleetError as `Channel.token` does."""
        return self._channel.token(self._worker, self._name)


class ClientDriver:
    """A driver with greedy answers. See `DriverAnswer`, and `counts` for the rest."""

    version = f"onnxruntime {ort.__version__}"

    def __init__(self, transport: Transport, bundle: Bundle) -> None:
        self._partition = Partition(bundle, 1)
        self._tokenizer = ChatTokenizer(bundle)
        self._manifest = bundle.manifest
        self._channel = Channel(transport)

    def cloud_only(self, prompt: str, max_new_tokens: int, worker: str) -> dict[str, Any]:
        """Upload the prompt's tokens; the cloud streams the answer."""
        session = self._channel.open(worker)
        watch = Stopwatch()
        prompt_ids = self._encode(prompt)
        session.send(Prompt(tuple(prompt_ids), max_new_tokens))
        while len(watch.token_ids) < max_new_tokens:
            watch.add(session.token(), CLOUD)
        return to_json(watch.answer(len(prompt_ids), round_trips=1))

    def split(
        self, prompt: str, max_new_tokens: int, worker: str, dtype: Dtype, history: bool = False
    ) -> dict[str, Any]:
        """Run all layers of the device and upload the new positions' hidden states once a token.

        With `history` the hidden states of all positions are uploaded each time.
        """
        session = self._channel.open(worker)
        watch = Stopwatch()
        prompt_ids = self._encode(prompt)
        capacity = len(prompt_ids) + max_new_tokens
        cascade = Cascade(self._partition, capacity)
        waiting = prompt_ids
        sent = 0
        top = self._manifest.exits.index(self._manifest.upload_layer)
        while len(watch.token_ids) < max_new_tokens:
            cascade.append(waiting)
            for block in range(top + 1):
                cascade.fill(block)
            start = 0 if history else sent
            for piece in pieces(cascade.hidden_states(top, start), start, capacity, dtype):
                session.send(piece)
            sent = cascade.num_tokens
            watch.add(session.token(), CLOUD)
            waiting = watch.token_ids[-1:]
        positions = cascade.num_tokens * self._manifest.upload_layer
        return to_json(
            watch.answer(
                len(prompt_ids), round_trips=len(watch.token_ids), layer_positions=positions
            )
        )

    def counts(self) -> dict[str, int]:
        """Return the messages so far."""
        return {
            "messages_up": self._channel.messages_up,
            "messages_down": self._channel.messages_down,
        }

    def _encode(self, prompt: str) -> list[int]:
        return self._tokenizer.encode(PromptRequest(prompt=prompt))


def to_json(answer: DriverAnswer) -> dict[str, Any]:
    """Return an answer as built-in types for a line of JSON."""
    return dict(msgspec.to_builtins(answer))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--identity", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    arguments = parser.parse_args()
    identity = Identity.load(arguments.identity)
    bundle = Bundle.load(arguments.bundle, ("edge", "tokenizer"))
    with MqttTransport.connect(identity) as link:
        serve_lines(lambda: ClientDriver(link, bundle))
