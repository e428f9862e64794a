"""The tiny model whole, its cloud partitions cut at every layer, and an engine that is driven by
hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.engine import WorkerEngine
from cloud_broker_worker.worker.session import SessionKey
from cloud_broker_worker.worker.upper_layers import UpperLayers
from fleet.bundles.manifest import SCHEMA_VERSION, Bundle, Manifest, write_manifest
from fleet.protocol.codec import pack_chunk
from fleet.protocol.hidden_states import Float16
from fleet.protocol.messages import (
    PROTOCOL,
    Context,
    Open,
    Sampling,
    ToDevice,
    ToWorker,
    Verified,
    Verify,
)
from onnx_export.architecture import model_info
from onnx_export.bundle import list_files
from onnx_export.cloud import write_cloud
from onnx_export.streamed_model import StreamedModel
from onnx_export.weights import LoadedWeights

DEVICE = "edge-1"
OUTSIDE = (1 << 31) - 1  # a token of no vocabulary: as a draft it is always rejected
LayersAt = Callable[..., UpperLayers]


class TinyModel:
    """The whole model in PyTorch: the reference."""

    def __init__(self, checkpoint: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32
        ).eval()
        self.num_layers: int = self.model.config.num_hidden_layers
        self.streamed = StreamedModel(
            "tiny", self.model.config, LoadedWeights(self.model.state_dict())
        )

    @torch.inference_mode()
    def upload(self, token_ids: list[int], layer: int) -> Float16:
        """Return the upload of a device: hidden states [n, hidden] float16 that enter `layer`."""
        outputs = self.model(torch.tensor([token_ids]), output_hidden_states=True)
        rows: Float16 = outputs.hidden_states[layer][0].numpy().astype(np.float16)
        return rows

    @torch.inference_mode()
    def logits(self, hidden_states: Float16, layer: int) -> torch.Tensor:
        """Logits [n, vocab] of the whole model when `hidden_states` enter `layer`, through Hugging
        Face's forward.
        """
        rows = torch.from_numpy(hidden_states).float()[None]
        hook = self.model.model.layers[layer].register_forward_pre_hook(
            lambda _, args: (rows, *args[1:])
        )
        try:
            logits: torch.Tensor = self.model(
                torch.zeros(1, len(hidden_states), dtype=torch.int64)
            ).logits[0]
        finally:
            hook.remove()
        return logits


@pytest.fixture(scope="session")
def whole(tiny_checkpoint: Path) -> TinyModel:
    return TinyModel(tiny_checkpoint)


@pytest.fixture(scope="session")
def cloud_bundle(
    whole: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Bundle]:
    """Bundles with the cloud side alone, cut at one of the layers or at each."""

    @cache
    def make(upload_layer: int, *higher_layers: int) -> Bundle:
        uploads = (upload_layer, *higher_layers)
        folder = tmp_path_factory.mktemp("cloud")
        write_cloud(whole.streamed, upload_layer, folder / "cloud")
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            model=model_info("tiny", whole.model, 512),
            exits=uploads,
            split_layer=upload_layer,
            upload_layer=upload_layer,
            uploads=uploads,
            quantization="fp32",
            top_k=64,
            thresholds=(0.8,) * len(uploads),
            parity={},
            tools={},
            files=tuple(list_files(folder)),
        )
        write_manifest(folder, manifest)
        return Bundle.load(folder, ("cloud",))

    return make


@pytest.fixture(scope="session")
def layers_at(cloud_bundle: Callable[..., Bundle]) -> LayersAt:
    return cache(lambda *layers: UpperLayers(cloud_bundle(*layers), num_threads=1))


class Bench:
    """An engine over layers [2, 4), its time, and a device's side of the talk. Integrity is checked
    at the end.
    """

    UPLOAD_LAYER = 2

    def __init__(self, layers: UpperLayers, whole: TinyModel) -> None:
        self.layers = layers
        self.whole = whole
        self.now = 1000.0
        self.start()

    def start(self, **settings: Any) -> WorkerEngine:
        """A fresh engine with these settings."""
        config = WorkerConfig(**{"num_threads": 1, "run_ahead_positions": 0} | settings)
        self.engine = WorkerEngine(self.layers, "worker-1", config, lambda: self.now)
        return self.engine

    def upload(self, num_positions: int, seed: int = 0) -> Float16:
        token_ids = np.random.default_rng(seed).integers(3, 384, num_positions).tolist()
        return self.whole.upload(token_ids, self.UPLOAD_LAYER)

    def session_bytes(self, num_positions: int) -> int:
        """Return the bytes of a session of that size with its cache."""
        shape = self.engine.pool.shape
        return num_positions * (shape.cache_bytes + shape.hidden_bytes)

    def expected_tokens(self, hidden_states: Float16, start: int) -> tuple[int, ...]:
        """The whole model's tokens after positions [start, n)."""
        logits = self.whole.logits(hidden_states, self.UPLOAD_LAYER)[start:]
        return tuple(int(token_id) for token_id in logits.argmax(-1))

    def expected_token(self, hidden_states: Float16) -> int:
        return int(self.whole.logits(hidden_states, self.UPLOAD_LAYER)[-1].argmax())

    def send(self, message: ToWorker, device: str = DEVICE) -> list[ToDevice]:
        return [answer.message for answer in self.engine.handle(device, message, self.now)]

    def open(self, session: str = "s1", device: str = DEVICE, **changes: Any) -> list[ToDevice]:
        fields = {
            "session": session,
            "epoch": 1,
            "bundle_id": self.layers.manifest.bundle_id,
            "protocol": PROTOCOL,
            "sampling": Sampling(),
            "max_positions": 64,
            "deadline_ms": 1000,
        }
        return self.send(Open(**fields | changes), device)  # type: ignore[arg-type]

    def context(
        self,
        rows: Float16,
        start: int = 0,
        session: str = "s1",
        device: str = DEVICE,
        branch: int | None = None,
    ) -> list[ToDevice]:
        """Send context; `branch` is by default the one that the worker is on."""
        if branch is None:
            branch = self.branch(session, device)
        return self.send(Context(session, pack_chunk(branch, start, rows)), device)

    def verify(
        self,
        start: int,
        draft: tuple[int, ...],
        request: int = 0,
        branch: int | None = None,
        deadline_ms: int = 1000,
        trusted: tuple[int, ...] = (),
        session: str = "s1",
        device: str = DEVICE,
    ) -> list[ToDevice]:
        """Send a verify request; `branch` is by default the one that the worker is on."""
        if branch is None:
            branch = self.branch(session, device)
        return self.send(
            Verify(
                session=session,
                request=request,
                branch=branch,
                start=start,
                draft=draft,
                deadline_ms=deadline_ms,
                trusted=trusted,
            ),
            device,
        )

    def ask(
        self,
        position: int,
        request: int = 0,
        session: str = "s1",
        device: str = DEVICE,
        deadline_ms: int = 1000,
    ) -> list[ToDevice]:
        """Ask for the worker's own token after `position`, by a draft that it rejects."""
        return self.verify(
            position,
            (OUTSIDE,),
            request=request,
            deadline_ms=deadline_ms,
            session=session,
            device=device,
        )

    def branch(self, session: str, device: str) -> int:
        """Return the branch that the worker is on; 0 without such a session."""
        known = self.engine.sessions.get(SessionKey(device, session))
        return known.branch if known else 0

    def step(self) -> dict[SessionKey, ToDevice]:
        return dict(self.engine.step() or [])

    def token(self, session: str = "s1", device: str = DEVICE) -> Verified:
        """Step once and return the response with the worker's own token for this session."""
        message = self.step()[SessionKey(device, session)]
        assert isinstance(message, Verified), message
        assert message.token_id is not None
        return message

    def verdict(self) -> Verified:
        """Step once and return the response for session s1."""
        message = self.step()[SessionKey(DEVICE, "s1")]
        assert isinstance(message, Verified), message
        return message


@pytest.fixture
def bench(layers_at: LayersAt, whole: TinyModel) -> Iterator[Bench]:
    bench = Bench(layers_at(Bench.UPLOAD_LAYER), whole)
    yield bench
    bench.engine.check_integrity()
