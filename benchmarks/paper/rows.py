"""Measurements, a row for each answer, in a file of JSON lines that survives interruptions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
from msgspec import Struct

from fleet.errors import ConfigError
from fleet.planning.cost_model import WholeModel


class Link(Struct, frozen=True):
    """Round trip in ms and bandwidth each way in Mbit/s; 0 in both is the loopback."""

    rtt_ms: float = 0.0
    mbit_s: float = 0.0


class Traffic(Struct, frozen=True):
    """Traffic on the device's link for one answer.

    Bytes of TCP payload, TLS included, and MQTT messages.
    """

    bytes_up: int
    bytes_down: int
    messages_up: int
    messages_down: int


class Row(Struct, frozen=True, kw_only=True):
    """One answer of one system to one sample.

    `system` is as in `benchmarks.paper.systems.SYSTEMS`. Times are seen from the device; `edge_s`
    and `cloud_s` are seconds of CPU that either side spent on it, each with one thread.
    `tokens_from` counts tokens by source. `round_trips` are those that the device waited for;
    `layer_positions_edge` and `layer_positions_cloud` are (position, layer) pairs that ran on
    either side, and `head_calls` positions that the LM head evaluated on both, `head_calls_cloud`
    of them on the cloud's: work, where `cloud_s` is time.
    """

    part: str
    system: str
    dataset: str
    sample: int
    repeat: int
    link: Link
    run: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    tokens_from: dict[str, int]
    ttft_ms: float
    total_ms: float
    edge_s: float
    cloud_s: float
    traffic: Traffic
    round_trips: int
    layer_positions_edge: int
    layer_positions_cloud: int
    head_calls: int
    head_calls_cloud: int
    joules: float | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Return the key of the measurement; there is one row for each."""
        return (
            self.part,
            self.system,
            self.dataset,
            self.sample,
            self.repeat,
            self.link.rtt_ms,
            self.link.mbit_s,
        )


class Scored(Struct, frozen=True, kw_only=True):
    """One answer of one system to a sample of a task, and its score.

    `score` is the task's metric of this answer and `details` all of them by name; `preference`, for
    tasks of two choices, log P(first) - log P(second) where the token was chosen. Of the deployed
    full model, along the answer's own tokens, are: `nll`, their mean negative log-likelihood,
    `agreement`, the share that it would have chosen itself, and `gap`, the maximum by which its
    logit of another token exceeds the answer's.
    """

    system: str
    dataset: str
    sample: int
    run: str
    text: str
    token_ids: tuple[int, ...]
    tokens_from: dict[str, int]
    score: float | None = None
    label: int | None = None
    preference: float | None = None
    nll: float | None = None
    agreement: float | None = None
    gap: float | None = None
    details: dict[str, float] = {}

    @property
    def key(self) -> tuple[object, ...]:
        """Return the key of the score; there is one for each."""
        return self.system, self.dataset, self.sample


class ModelSizes(Struct, frozen=True, kw_only=True):
    """Units of an answer's work.

    Parameters are those of one layer's products, and of the LM head's. `whole` is the whole model
    on a device, and `exit_agreement` the deepest exit's, both None in rows of earlier versions.
    """

    name: str
    num_layers: int
    exits: tuple[int, ...]
    split_layer: int
    upload_layer: int
    thresholds: tuple[float, ...]
    layer_parameters: int
    head_parameters: int
    whole: WholeModel | None = None
    exit_agreement: float | None = None

    @property
    def head_layers(self) -> float:
        """The LM head's parameters over a layer's."""
        return self.head_parameters / self.layer_parameters


class Run(Struct, frozen=True, kw_only=True):
    """The conditions of rows, which refer to it by `run`."""

    run: str
    machine: dict[str, object]
    versions: dict[str, str]
    bundle_id: str
    model: ModelSizes
    size: str
    seed: int
    at: float


KeyedT = TypeVar("KeyedT", Row, Scored)


class RowFile(Generic[KeyedT]):
    """A file of rows of one kind.

    Appends are whole lines on the disk; a torn last line is dropped.
    """

    def __init__(self, path: Path, kind: type[KeyedT]) -> None:
        """Read a file; raise ConfigError when it holds something else."""
        self._path = path
        self._decoder: msgspec.json.Decoder[KeyedT] = msgspec.json.Decoder(kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows: dict[tuple[object, ...], KeyedT] = {row.key: row for row in self._read()}

    def _read(self) -> Iterator[KeyedT]:
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self._path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                yield self._decoder.decode(line)
            except msgspec.MsgspecError as error:
                raise ConfigError(
                    f"{self._path}, line {number}: expected a row of this version, "
                    f"got something else ({error}); move the file away and run again"
                ) from None

    def __contains__(self, key: tuple[object, ...]) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[KeyedT]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: KeyedT) -> None:
        """Store a row durably, also through a crash of the machine."""
        self._rows[row.key] = row
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")
            file.flush()
            os.fsync(file.fileno())
