"""Cost of each mode on some link, by a linear model that was fitted to measured answers (ADR 0024).

The time of an answer is that of its steps on either side, its round trips, and its bytes over the
bandwidth. A step is that of the whole model for one token, LM head included, so that two numbers
describe other machines: milliseconds of such a step on the device and in the cloud. Other devices
are not modelled: the worker is assumed to have time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct

from fleet.errors import ConfigError
from fleet.utils.text_files import read_json

DATA: Final = Path(__file__).parent / "data/plan.json"
CLOUD_ONLY: Final = "cloud_only"
ON_DEVICE: Final = "on_device"
STANDALONE: Final = "standalone"
LEAST: Final = 1e-6  # smaller values lead to infinite figures
MAKE_FITS: Final = (
    "expected a file of fits; make one in a checkout of the project with 'fleet bench paper' and "
    "then 'fleet bench paper --fit'"
)


class MachineSpeed(Struct, frozen=True):
    """Speed of the device or the cloud as measured.

    Milliseconds of a step; steps for a prompt's position through all layers; steps a message.
    """

    step_ms: float
    prompt_steps: float
    message_steps: float


class StepCounts(Struct, frozen=True, kw_only=True):
    """Mean cost of a token at some round trip.

    Steps on either side, round trips, messages; and the share of tokens from the cloud.
    """

    rtt_ms: float
    edge_steps: float
    cloud_steps: float
    round_trips: float
    messages: float
    offload_rate: float


class TimeShares(Struct, frozen=True):
    """Shares of each term in a time: work on both sides, round trip and transfer.

    `extra_ms` is added for each round trip. All 1 and no ms is the plain sum; less than 1 means
    that a term overlaps with another.
    """

    work: float
    round_trip: float
    transfer: float
    extra_ms: float

    def of(
        self, work_ms: float, round_trips: float, num_bytes: float, rtt_ms: float, mbit_s: float
    ) -> float:
        """Return the time in milliseconds."""
        waits_ms = round_trips * (self.round_trip * rtt_ms + self.extra_ms)
        return self.work * work_ms + waits_ms + self.transfer * transfer_ms(num_bytes, mbit_s)


PLAIN_SUM: Final = TimeShares(1.0, 1.0, 1.0, 0.0)
NO_LINK: Final = TimeShares(1.0, 0.0, 1.0, 0.0)


class WholeModel(Struct, frozen=True, kw_only=True):
    """The whole model on a device, in the preset of the bundle.

    `head_layers` is the time of the LM head in layers. `tables_mb` are the embedding and the LM
    head, `layer_mb` one layer's weights and `cache_kb` its caches of a position. `agreement` is the
    share of tokens that equal those of the model in float32, None if it is not known.
    """

    num_layers: int
    head_layers: float
    tables_mb: float
    layer_mb: float
    cache_kb: float
    agreement: float | None

    def memory_mb(self, num_layers: int, positions: float) -> float:
        """Return the memory of a device with some of the layers, for one answer."""
        return self.tables_mb + num_layers * (self.layer_mb + self.cache_kb * positions / 1e3)


class ServingSetting(Struct, frozen=True, kw_only=True):
    """One way to serve.

    `threshold` is one for all exits, None for the bundle's own; `agreement` is None if it is not
    known, and `basis` is the origin of the agreement and the counts. `prompt_edge` and
    `prompt_cloud`: shares of the whole model's layers that a prompt's position runs through.
    `counts` are sorted by round trip.
    """

    name: str
    mode: str
    threshold: float | None
    agreement: float | None
    prompt_edge: float
    prompt_cloud: float
    prompt_bytes: float
    token_bytes: float
    counts: tuple[StepCounts, ...]
    total: TimeShares
    first: TimeShares
    basis: str = "measured"


class CostFit(Struct, frozen=True, kw_only=True):
    """Constants measured with one bundle on one machine.

    `prompt_tokens` and `tokens` are those of a mean answer; `errors` are those of predicted totals
    on links that the fit did not see, as shares. `exit_agreement` is that of the deepest exit with
    the full model, as calibrated.
    """

    model: str
    bundle_id: str
    exits: tuple[int, ...]
    split_layer: int
    machine: dict[str, Any]
    edge: MachineSpeed
    cloud: MachineSpeed
    prompt_tokens: float
    tokens: float
    rtt_ms: tuple[float, float]
    mbit_s: tuple[float, float]
    errors: dict[str, float]
    settings: tuple[ServingSetting, ...]
    whole: WholeModel | None = None
    exit_agreement: float | None = None


class PlanRequest(Struct, frozen=True, kw_only=True):
    """A link, two machines and an answer to plan for.

    A step of None is the fitted machine's; tokens of None are those of its mean answer; a memory of
    None has no limit.
    """

    rtt_ms: float
    mbit_s: float
    edge_step_ms: float | None = None
    cloud_step_ms: float | None = None
    prompt_tokens: int | None = None
    tokens: int | None = None
    min_agreement: float = 0.0
    device_memory_mb: float | None = None


class AnswerTerms(Struct, frozen=True, kw_only=True):
    """Terms of one answer: work of either side, `first_ms` of both up to the first token, bytes."""

    tokens: float
    edge_ms: float
    cloud_ms: float
    first_ms: float
    round_trips: float
    messages: float
    num_bytes: float
    prompt_bytes: float
    offload_rate: float


class Expectation(Struct, frozen=True, kw_only=True):
    """Expected cost of one answer; `edge_ms` and `cloud_ms` are work, which may overlap."""

    name: str
    mode: str
    threshold: float | None
    exits: tuple[int, ...]
    split_layer: int
    ttft_ms: float
    token_ms: float
    total_ms: float
    edge_ms: float
    cloud_ms: float
    num_bytes: float
    messages: float
    round_trips: float
    offload_rate: float
    agreement: float | None
    agrees: bool
    basis: str = "measured"


def read_fits(path: Path = DATA) -> tuple[CostFit, ...]:
    """Read a file of `fleet bench paper --fit`.

    Raises:
        ConfigError: the file is missing or is not one.
    """
    fits: tuple[CostFit, ...] = read_json(path, tuple[CostFit, ...], MAKE_FITS)
    if not fits:
        raise ConfigError(f"{path} holds no fit; make it again with 'fleet bench paper --fit'")
    return fits


def write_fits(fits: Sequence[CostFit], path: Path = DATA) -> None:
    """Write fits as readable JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(fits), indent=1) + b"\n")


def transfer_ms(num_bytes: float, mbit_s: float) -> float:
    """Return the transfer's time; a bandwidth of 0 is a link without a limit and takes 0."""
    return 8e-3 * num_bytes / mbit_s if mbit_s else 0.0


def counts_at(setting: ServingSetting, rtt_ms: float) -> StepCounts:
    """Interpolate the measured counts; beyond them return the nearest."""
    at = [counts.rtt_ms for counts in setting.counts]

    def between(name: str) -> float:
        return float(np.interp(rtt_ms, at, [getattr(counts, name) for counts in setting.counts]))

    values = {name: between(name) for name in StepCounts.__struct_fields__[1:]}
    return StepCounts(rtt_ms=rtt_ms, **values)


def answer_terms(fit: CostFit, setting: ServingSetting, request: PlanRequest) -> AnswerTerms:
    """Return the terms of one answer.

    Counts are taken at the round trip that is as many of the device's steps as on the fitted
    machine: how far a device drafts depends on that.
    """
    edge_step = fit.edge.step_ms if request.edge_step_ms is None else request.edge_step_ms
    cloud_step = fit.cloud.step_ms if request.cloud_step_ms is None else request.cloud_step_ms
    prompt = fit.prompt_tokens if request.prompt_tokens is None else request.prompt_tokens
    tokens = fit.tokens if request.tokens is None else request.tokens
    counts = counts_at(setting, request.rtt_ms * fit.edge.step_ms / edge_step)
    messages = counts.messages * tokens
    edge_prompt = edge_step * fit.edge.prompt_steps * setting.prompt_edge * prompt
    cloud_prompt = cloud_step * fit.cloud.prompt_steps * setting.prompt_cloud * prompt
    edge_steps = counts.edge_steps * tokens + fit.edge.message_steps * messages
    cloud_steps = counts.cloud_steps * tokens + fit.cloud.message_steps * messages
    first_edge = edge_step * counts.edge_steps
    first_cloud = cloud_step * counts.cloud_steps
    return AnswerTerms(
        tokens=tokens,
        edge_ms=edge_prompt + edge_step * edge_steps,
        cloud_ms=cloud_prompt + cloud_step * cloud_steps,
        first_ms=edge_prompt + cloud_prompt + first_edge + first_cloud,
        round_trips=counts.round_trips * tokens,
        messages=messages,
        num_bytes=setting.prompt_bytes * prompt + setting.token_bytes * tokens,
        prompt_bytes=setting.prompt_bytes * prompt,
        offload_rate=counts.offload_rate,
    )


def expected_cost(fit: CostFit, setting: ServingSetting, request: PlanRequest) -> Expectation:
    """Return the expected time and cost of one answer."""
    terms = answer_terms(fit, setting, request)
    link = (request.rtt_ms, request.mbit_s)
    work_ms = terms.edge_ms + terms.cloud_ms
    total_ms = setting.total.of(work_ms, terms.round_trips, terms.num_bytes, *link)
    first_ms = setting.first.of(terms.first_ms, 1.0, terms.prompt_bytes, *link)
    ttft_ms = min(total_ms, first_ms)
    agreement = setting.agreement or 0.0
    return Expectation(
        name=setting.name,
        mode=setting.mode,
        threshold=setting.threshold,
        exits=fit.exits,
        split_layer=fit.split_layer,
        ttft_ms=ttft_ms,
        token_ms=(total_ms - ttft_ms) / max(1.0, terms.tokens - 1),
        total_ms=total_ms,
        edge_ms=terms.edge_ms,
        cloud_ms=terms.cloud_ms,
        num_bytes=terms.num_bytes,
        messages=terms.messages,
        round_trips=terms.round_trips,
        offload_rate=terms.offload_rate,
        agreement=setting.agreement,
        agrees=request.min_agreement == 0 or agreement >= request.min_agreement,
        basis=setting.basis,
    )


def on_device_setting(fit: CostFit, whole: WholeModel) -> ServingSetting:
    """Return the whole model on the device: a step a token, and no link.

    Its work takes the share of the time that standalone answers' work took.
    """
    alone = next((one for one in fit.settings if one.mode == STANDALONE), None)
    step = StepCounts(
        rtt_ms=0.0,
        edge_steps=1.0,
        cloud_steps=0.0,
        round_trips=0.0,
        messages=0.0,
        offload_rate=0.0,
    )
    return ServingSetting(
        name=ON_DEVICE,
        mode=ON_DEVICE,
        threshold=None,
        agreement=whole.agreement,
        prompt_edge=1.0,
        prompt_cloud=0.0,
        prompt_bytes=0.0,
        token_bytes=0.0,
        counts=(step,),
        total=alone.total if alone else PLAIN_SUM,
        first=msgspec.structs.replace(alone.first, round_trip=0.0) if alone else NO_LINK,
    )


def on_device_cost(fit: CostFit, request: PlanRequest) -> Expectation | None:
    """Return the expected cost with the whole model on the device, None if that is not known."""
    if fit.whole is None:
        return None
    layers = fit.whole.num_layers
    whole_fit = msgspec.structs.replace(fit, exits=(layers,), split_layer=layers)
    return expected_cost(whole_fit, on_device_setting(fit, fit.whole), request)


def device_memory_mb(fit: CostFit, num_layers: int, request: PlanRequest) -> float | None:
    """Return the memory of a device with some of the layers for one answer, None if not known."""
    prompt = fit.prompt_tokens if request.prompt_tokens is None else request.prompt_tokens
    tokens = fit.tokens if request.tokens is None else request.tokens
    return fit.whole.memory_mb(num_layers, prompt + tokens) if fit.whole else None


def has_room(fit: CostFit, num_layers: int, request: PlanRequest) -> bool:
    """Return whether a device has room for some of the layers; for an unknown need it has."""
    needed_mb = device_memory_mb(fit, num_layers, request)
    limit_mb = request.device_memory_mb
    return needed_mb is None or limit_mb is None or needed_mb <= limit_mb


def expectations(fits: Sequence[CostFit], request: PlanRequest) -> list[Expectation]:
    """Return the expected cost of every setting of every split that the device has room for.

    Cloud-only and the whole model on the device come once. Those with enough agreement are first,
    then sorted by total time.
    """
    expected = [
        expected_cost(fit, setting, request)
        for i, fit in enumerate(fits)
        for setting in fit.settings
        if (i == 0 if setting.mode == CLOUD_ONLY else has_room(fit, fit.split_layer, request))
    ]
    whole = on_device_cost(fits[0], request)
    if whole and has_room(fits[0], whole.split_layer, request):
        expected.append(whole)
    return sorted(expected, key=lambda one: (not one.agrees, one.total_ms))


def check_request(request: PlanRequest) -> None:
    """Raise ConfigError for a value outside its range."""
    for name, value in msgspec.structs.asdict(request).items():
        if name == "min_agreement":
            if not 0 <= value <= 1:
                raise ConfigError(f"agreement {value}: expected a number from 0 to 1")
        elif value is not None and not (LEAST <= value < 1e9 or (value == 0 and name == "rtt_ms")):
            raise ConfigError(f"{name} {value}: expected a number from {LEAST:f} up to 1e9")
