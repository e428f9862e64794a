"""A bundle with worse exits is stopped at its canary by the agreement that real devices report.

The last layers of the model change nothing, so an exit before them that uses the model's own norm
and LM head predicts the model's tokens. The heads of the other bundles are changed: a little in the
bundle that the fleet starts with, and beyond use in the bad one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.worker import Worker
from fleet.bundles.manifest import Bundle
from fleet.errors import FleetError
from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest, Usage
from fleet.registry.results import RolloutRow
from fleet.registry.rollouts.canary_analysis import CanaryLimits
from fleet.registry.rollouts.plan import RolloutPlan
from fleet.server.child_process import child
from fleet.server.home import FleetConfig, FleetHome
from fleet.transport.base import Will
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from onnx_export.bundle import export_bundle
from onnx_export.config import ExportConfig
from onnx_export.heads import HeadsFile, model_fingerprint, new_head, save_heads
from tests.brokers import HOST, free_port, wait_until
from tests.tiny import make_tiny_checkpoint

DEVICES: Final = ("d0", "d1")
EXIT: Final = 2
NUM_TOKENS: Final = 8
WAIT_S: Final = 60.0
PLAN: Final = RolloutPlan(
    percentages=(100,),
    observe_s=1.0,
    take_within_s=60.0,
    offline_after_s=60.0,
    agreement_sample=1.0,
    limits=CanaryLimits(
        min_answers=8,
        max_offload_increase=1.0,  # agreement alone decides, on a machine of any load
        max_error_rate=1.0,
        max_tpot_ratio=1000.0,
    ),
)

ChangeHead = Callable[[Tensor], Tensor]


def keep(matrix: Tensor) -> Tensor:
    return matrix


def disturb(matrix: Tensor) -> Tensor:
    return matrix + 0.05 * torch.randn_like(matrix)


def shuffle(matrix: Tensor) -> Tensor:
    return matrix[torch.randperm(len(matrix))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose layers after the exit add nothing to their input."""
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers[EXIT:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make_bundle(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[ChangeHead], Bundle]:
    """Make a bundle of the model whose exit has a changed head."""

    def make(change: ChangeHead) -> Bundle:
        folder = tmp_path_factory.mktemp(change.__name__)
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        head = new_head("linear", model, EXIT)
        torch.manual_seed(0)
        with torch.no_grad():
            head.adapter.weight.copy_(change(head.adapter.weight.clone()))
        heads = folder / "heads"
        save_heads(HeadsFile({EXIT: head}, "linear", model_fingerprint(model)), heads)
        export_bundle(
            ExportConfig(
                out=folder / "tiny",
                exits=(EXIT,),
                thresholds=(0.0,),
                model=str(checkpoint),
                heads=heads,
                quantization="fp32",
            )
        )
        return Bundle.load(folder / "tiny")

    return make


class Site:
    """A server and two devices as processes; a worker of each bundle; prompts all the time."""

    def __init__(self, folder: Path, old: Bundle, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        config = FleetConfig(
            host=HOST, port=free_port(), bundle=str(old.folder), service_port=free_port()
        )
        self.home = FleetHome.create(folder / "state", config)
        self.registry = stack.enter_context(self.home.registry())
        for name in DEVICES:
            self.home.enroll(name, Role.DEVICE, folder / name)
        server = stack.enter_context(
            child("the server", "fleet.cli", "server", "--home", str(self.home.folder))
        )
        server.wait_ready()
        self.serve(old)
        arguments = [
            ("edge_agent", "run", str(folder / name), "--threads", "1") for name in DEVICES
        ]
        devices = [stack.enter_context(child("a device", *each)) for each in arguments]
        for device in devices:
            device.wait_ready()
        link = stack.enter_context(MqttTransport.connect(stack.enter_context(self.home.operator())))
        self.client = PromptClient(link)
        self._stop = threading.Event()
        for name in DEVICES:
            thread = threading.Thread(target=self._keep_asking, args=(name,))
            thread.start()
            stack.callback(thread.join)
        stack.callback(self._stop.set)

    def serve(self, bundle: Bundle) -> str:
        """Add a bundle to the fleet, with a worker of its own; return its id."""
        bundle_id = self.home.keep_bundle(bundle.folder)
        name = f"cloud-{bundle_id[:8]}"
        identity = self.home.enroll(name, Role.WORKER, self._folder / name)
        will = Will(topics.worker_status(name), Worker.will())
        link = self._stack.enter_context(MqttTransport.connect(identity, will=will))
        self._stack.enter_context(Worker(link, bundle, WorkerConfig(num_threads=1)))
        return bundle_id

    def _keep_asking(self, device: str) -> None:
        number = 0
        while not self._stop.wait(0.05):
            number += 1
            with suppress(FleetError):  # it is busy while it changes its bundle
                self.ask(device, PromptRequest(prompt=f"{number}?", max_new_tokens=NUM_TOKENS))

    def ask(self, device: str, request: PromptRequest) -> Usage | None:
        return list(self.client.ask(device, request, timeout_s=WAIT_S))[-1].usage

    def roll_out(self, bundle_id: str) -> RolloutRow:
        """Roll a bundle out; return the row of the roll-out once it has ended."""
        self.registry.rollouts.start(bundle_id, PLAN)

        def row() -> RolloutRow:
            return self.registry.rollouts.latest()[0]

        wait_until(
            lambda: row().state not in ("waiting", "running"), "the roll-out has ended", WAIT_S
        )
        return row()

    def await_served(self, bundle_id: str) -> None:
        """Wait until every device reports the bundle; each of them answers a prompt then."""

        def served() -> set[str]:
            return {row.bundle_id for row in self.registry.stats.devices()}

        wait_until(lambda: served() == {bundle_id}, f"every device serves {bundle_id}", WAIT_S)
        asked = PromptRequest(prompt="How warm?", max_new_tokens=4, mode=Mode.VERIFIED)
        for device in DEVICES:
            usage = self.ask(device, asked)
            assert usage is not None
            assert usage.round_trips > 0


@contextmanager
def running(folder: Path, old: Bundle) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(folder, old, stack)


@pytest.mark.timeout(300)
def test_worse_exits_are_stopped_at_the_canary_and_better_ones_come_to_all(
    tmp_path: Path, make_bundle: Callable[[ChangeHead], Bundle]
) -> None:
    old = make_bundle(disturb)
    with running(tmp_path, old) as site:
        bad_id = site.serve(make_bundle(shuffle))
        undone = site.roll_out(bad_id)
        assert (undone.state, undone.stage, undone.num_told) == ("undone", 1, 1)
        assert undone.reason.startswith("agreement ")
        site.await_served(old.manifest.bundle_id)

        good_id = site.serve(make_bundle(keep))
        completed = site.roll_out(good_id)
        assert (completed.state, completed.num_told) == ("completed", len(DEVICES))
        site.await_served(good_id)
