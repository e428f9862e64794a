"""A model in a Python program: the agent of a device without a fleet, and without a network."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Self

from edge_agent.config import AgentConfig
from edge_agent.local_api.lone_agent import NAME, lone_agent
from edge_agent.serving.agent import Agent
from edge_agent.serving.request_planner import MAX_WAIT_S, late_answer
from fleet.bundles.manifest import EDGE_SIDES, Bundle
from fleet.bundles.named_bundle import DEFAULT, load_named_bundle
from fleet.errors import BundleError, PromptError
from fleet.protocol.prompt import PromptRequest, Reply, decode_reply
from fleet.transport.prompt_client import check_not_refused
from fleet.transport.responder import Responder


class Engine(Responder):
    """A device's half of a model, which answers in this process; close it, or use `with`.

    Its mode is `standalone`, unless a request names another one. Threads may share an engine.
    """

    def __init__(self, bundle: Bundle, config: AgentConfig | None = None) -> None:
        """Load the model of a bundle.

        Raises:
            FleetError: the model does not load, or a setting is out of its range.
        """
        config = config or AgentConfig()
        stack = ExitStack()
        self.max_at_once = config.max_at_once
        self._agent = stack.enter_context(lone_agent(bundle, config))
        self._closing = weakref.finalize(self, stack.close)

    @classmethod
    def load(cls, bundle: Bundle | Path | str = DEFAULT, config: AgentConfig | None = None) -> Self:
        """Load a bundle's folder, or the default bundle, which is built if this machine has none.

        Raises:
            BundleError: there is no bundle, or it is damaged.
            FleetError: the model does not load, or a setting is out of its range.
        """
        return cls(load_named_bundle(bundle, _default_folder, EDGE_SIDES), config)

    def close(self) -> None:
        """Cancel the answers that are being generated, and free the model."""
        self._closing()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def respond(self, request: PromptRequest) -> Generator[Reply, None, None]:
        """Yield the replies to a request.

        Raises:
            PromptError: the engine is closed or busy, or refuses the request.
        """
        if not self._closing.alive:
            raise PromptError("this engine is closed; load it again with Engine.load")
        return self._stream(self._agent, request)

    def _stream(self, agent: Agent, request: PromptRequest) -> Generator[Reply, None, None]:
        arrived: SimpleQueue[bytes] = SimpleQueue()
        job = agent.submit(NAME, request, arrived.put)
        is_done = False
        try:
            while not is_done:
                reply = decode_reply(_next(arrived))
                is_done = reply.done
                check_not_refused(NAME, reply)
                yield reply
        finally:
            if not is_done:
                agent.cancel(job)


def _next(arrived: SimpleQueue[bytes]) -> bytes:
    try:
        return arrived.get(timeout=MAX_WAIT_S)
    except Empty:
        raise late_answer() from None


def _default_folder() -> Path:
    """Return the folder of the default bundle from the export, a process of its own.

    A device's process has no PyTorch, which the export needs to build the bundle.
    """
    command = (sys.executable, "-m", "onnx_export.default_bundle")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        last_line = ""
        for line in process.stdout or ():
            if last_line:
                print(last_line, file=sys.stderr, flush=True)
            last_line = line.strip()
    if process.returncode:
        raise BundleError(
            f"expected the default bundle, which cannot be made here ({last_line}); name the "
            "folder of a bundle instead"
        )
    return Path(last_line)
