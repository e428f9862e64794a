"""The baselines' cloud: a worker's identity, one model, and a message for each token at once.

    python -m benchmarks.drivers.cloud --identity FOLDER --bundle FOLDER [--embedding FILE]
        [--peer COMMAND]

A bundle with every layer needs the embedding, and answers prompts; one with the upper layers
answers hidden states. With a peer's command, in JSON, that engine answers in the place of the
bundle's model.
"""

from __future__ import annotations

import argparse
import json
import logging
import queue
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.drivers.cloud_models import (
    CloudModel,
    PeerCloudModel,
    UpperCloudModel,
    WholeCloudModel,
)
from benchmarks.drivers.protocol import serve_lines
from benchmarks.drivers.wire import Failure, NextToken, ToClient, decode_to_cloud, encode
from benchmarks.engines import EngineProcess
from cloud_broker_worker.worker.worker import Worker
from fleet.bundles.manifest import Bundle
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.protocol.report import WorkerStatus, encode_status
from fleet.transport.base import Transport, Will
from fleet.transport.mqtt import MqttTransport
from fleet.version import __version__

log = logging.getLogger(__name__)


class CloudDriver:
    """A driver that serves sessions one message after the other, on a separate thread.

    It reports the work done by JSON lines.
    """

    def __init__(self, transport: Transport, model: CloudModel, version: str) -> None:
        self.version = version
        self._transport = transport
        self._model = model
        self._arrived: queue.Queue[tuple[str, bytes]] = queue.Queue()
        threading.Thread(target=self._serve, name="cloud", daemon=True).start()
        transport.subscribe(
            topics.sessions_of_worker(transport.name), lambda *message: self._arrived.put(message)
        )
        status = WorkerStatus(
            online=True, epoch=time.time_ns() // 1_000_000, bundle_ids=(), version=__version__
        )
        transport.publish(
            topics.worker_status(transport.name), encode_status(status), qos=1, retain=True
        )

    def counts(self) -> dict[str, int | None]:
        """Return the work so far; `pid` is the process that computes, if it is another one."""
        model = self._model
        return {
            "layer_positions": model.positions * model.num_layers,
            "head_calls": model.head_calls,
            "pid": model.pid,
        }

    def _serve(self) -> None:
        while True:
            topic, payload = self._arrived.get()
            _, device, session = topics.parse_topic(topic, topics.TO_WORKER_FILTER)
            try:
                for token_id in self._model.answer(session, decode_to_cloud(payload)):
                    self._send(device, session, NextToken(token_id))
            except Exception as error:  # report any failure to the device
                log.exception("session %s failed", session)
                self._send(device, session, Failure(f"{type(error).__name__}: {error}"))

    def _send(self, device: str, session: str, message: ToClient) -> None:
        self._transport.publish(topics.to_device(device, session), encode(message))


def load_cloud_model(
    bundle: Bundle, embedding: Path | None, peer: list[str] | None, stack: ExitStack
) -> tuple[CloudModel, str]:
    """Return the model of the command line, and its version."""
    if peer:
        engine = stack.enter_context(EngineProcess("peer", peer))
        return PeerCloudModel(engine, bundle.manifest.model.num_layers), engine.version
    import torch

    version = f"torch {torch.__version__}"
    return (WholeCloudModel(bundle, embedding) if embedding else UpperCloudModel(bundle)), version


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--identity", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--embedding", type=Path)
    parser.add_argument("--peer", type=json.loads)
    arguments = parser.parse_args()
    identity = Identity.load(arguments.identity)
    with ExitStack() as stack:
        bundle = Bundle.load(arguments.bundle, () if arguments.peer else ("cloud",))
        model, version = load_cloud_model(bundle, arguments.embedding, arguments.peer, stack)
        will = Will(topics.worker_status(identity.name), Worker.will())
        link = stack.enter_context(MqttTransport.connect(identity, will=will))
        serve_lines(lambda: CloudDriver(link, model, version))
