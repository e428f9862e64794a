"""Our device as it is deployed: the real agent over the fleet's broker, with an app on the device.

python -m benchmarks.drivers.agent --identity FOLDER --bundle FOLDER --upload float16

It is controlled by JSON lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgspec
import onnxruntime as ort

from benchmarks.drivers.answer import Stopwatch
from benchmarks.drivers.local_app import LocalApp
from benchmarks.drivers.protocol import serve_lines
from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle, Manifest
from fleet.errors import FleetError
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest
from fleet.transport.base import Will
from fleet.transport.mqtt import MqttTransport

# A short delay of the machine must not turn cloud tokens into the device's own.
ASSIST_DEADLINE_MS: Final = 60_000


class AgentDriver:
    """A driver that answers in any mode, with any thresholds."""

    version = f"onnxruntime {ort.__version__}"

    def __init__(
        self, agent: Agent, app: LocalApp, manifest: Manifest, config: AgentConfig
    ) -> None:
        self._agent = agent
        self._app = app
        self._manifest = manifest
        self._config = config

    def answer(
        self, prompt: str, max_new_tokens: int, mode: str, thresholds: Sequence[float] | None = None
    ) -> dict[str, Any]:
        """Return a greedy answer; `thresholds` are the bundle's by default.

        See `DriverAnswer`, and `counts` for the rest.
        """
        request = PromptRequest(
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            mode=Mode(mode),
            ignore_eos=True,
            thresholds=None if thresholds is None else tuple(thresholds),
        )
        before = self._work()
        usage = None
        watch = Stopwatch()
        for reply in self._app.ask(request):
            if reply.token_id is not None and reply.source:
                watch.add(reply.token_id, reply.source)
            usage = reply.usage
        if usage is None:
            raise FleetError("the agent ended its answer without counts; it is of another version")
        layer_positions, head_calls = (
            after - earlier for after, earlier in zip(self._work(), before, strict=True)
        )
        answer = watch.answer(
            usage.prompt_tokens,
            round_trips=usage.round_trips,
            layer_positions=layer_positions,
            head_calls=head_calls,
        )
        return dict(msgspec.to_builtins(answer))

    def move(self, split: int) -> dict[str, int]:
        """Hold `split` layers from the next answer on."""
        self._config = msgspec.structs.replace(self._config, split=split)
        self._agent.follow(self._config, 0)
        return {"split": split}

    def counts(self) -> dict[str, int]:
        """Return the messages so far.

        `questioned` is the number of tokens requested from workers since the last call.
        """
        return {
            "messages_up": self._app.messages_up,
            "messages_down": self._app.messages_down,
            "questioned": self._app.take_num_questioned(),
        }

    def _work(self) -> tuple[int, int]:
        work = self._agent.work
        layers = [stop - start for start, stop in pairwise((0, *self._manifest.exits))]
        return sum(n * of for n, of in zip(work.positions, layers, strict=True)), work.head_calls


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--identity", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--upload", default="float16")
    arguments = parser.parse_args()
    identity = Identity.load(arguments.identity)
    bundle = Bundle.load(arguments.bundle, ("edge", "tokenizer"))
    config = AgentConfig(
        num_threads=1,
        max_positions=bundle.manifest.model.max_positions,
        upload_dtype=arguments.upload,
        assist_deadline_ms=ASSIST_DEADLINE_MS,
        reuse_share=0.0,  # rows ask the same prompts
    )
    will = Will(topics.device_status(identity.name), Agent.will())
    with MqttTransport.connect(identity, will=will) as link:
        app = LocalApp(link)
        with Agent(app, bundle, config) as agent:
            serve_lines(lambda: AgentDriver(agent, app, bundle.manifest, config))
