"""What each mode would take and cost on some link, by a linear model that was fitted to measured answers (ADR 0024).

An answer takes its steps on either side, its round trips, and its bytes over the bandwidth. Steps are those of the
whole model for one token, LM head included, so that two numbers describe other machines: milliseconds of such a step on
the device and in the cloud. Nothing here knows other devices: the worker is assumed to have time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct

from fleet.errors import ConfigError

DATA: Final = Path(__file__).parent / "data/plan.json"
CLOUD_ONLY: Final = "cloud_only"


class Side(Struct, frozen=True):
    """Device or cloud as measured: ms of a step; steps for a prompt's position through all layers; steps a message."""

    step_ms: float
    prompt_steps: float
    message_steps: float


class StepCounts(Struct, frozen=True, kw_only=True):
    """What a token takes at some round trip, on average: steps on either side, round trips, messages; and the share of
    tokens from the cloud."""

    rtt_ms: float
    edge_steps: float
    cloud_steps: float
    round_trips: float
    messages: float
    offload_rate: float


class Shares(Struct, frozen=True):
    """How much of each term a time has: of the work on both sides, of a round trip, of the transfer; and ms besides for
    each round trip. All 1 and no ms is the plain sum; less is what goes on at the same time as something else."""

    work: float
    round_trip: float
    transfer: float
    extra_ms: float

    def of(
        self, work_ms: float, round_trips: float, num_bytes: float, rtt_ms: float, mbit_s: float
    ) -> float:
        """Milliseconds."""
        waits_ms = round_trips * (self.round_trip * rtt_ms + self.extra_ms)
        return self.work * work_ms + waits_ms + self.transfer * transfer_ms(num_bytes, mbit_s)


class Setting(Struct, frozen=True, kw_only=True):
    """One way to serve. `threshold` is one for all exits, None for the bundle's own; `agreement` None is not known.

    `prompt_edge` and `prompt_cloud`: shares of the whole model's layers that a prompt's position runs through.
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
    total: Shares
    first: Shares


class Fit(Struct, frozen=True, kw_only=True):
    """What was measured with one bundle on one machine. `prompt_tokens` and `tokens` are those of a mean answer;
    `errors` are those of predicted totals on links that the fit did not see, as shares."""

    model: str
    bundle_id: str
    exits: tuple[int, ...]
    split_layer: int
    machine: dict[str, Any]
    edge: Side
    cloud: Side
    prompt_tokens: float
    tokens: float
    rtt_ms: tuple[float, float]
    mbit_s: tuple[float, float]
    errors: dict[str, float]
    settings: tuple[Setting, ...]


class Load(Struct, frozen=True, kw_only=True):
    """What is asked for. A step of None is the fitted machine's; tokens of None are those of its mean answer."""

    rtt_ms: float
    mbit_s: float
    edge_step_ms: float | None = None
    cloud_step_ms: float | None = None
    prompt_tokens: int | None = None
    tokens: int | None = None
    min_agreement: float = 0.0


class Terms(Struct, frozen=True, kw_only=True):
    """What one answer consists of: work of either side, `first_ms` of both up to the first token, what is sent."""

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
    """Of one answer. `edge_ms` and `cloud_ms` are work, which may overlap with the rest."""

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


def read_fits(path: Path = DATA) -> tuple[Fit, ...]:
    """Raises ConfigError when the file is missing or is none of `fleet bench paper --fit`."""
    try:
        fits = msgspec.json.decode(path.read_bytes(), type=tuple[Fit, ...])
    except FileNotFoundError:
        raise ConfigError(
            f"nothing was measured to plan with: there is no {path}; "
            "make it in a checkout of the project with 'fleet bench paper' and then 'fleet bench paper --fit'"
        ) from None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read {path}: {error}; expected a file of 'fleet bench paper --fit', make it again"
        ) from None
    if not fits:
        raise ConfigError(f"{path} holds no fit; make it again with 'fleet bench paper --fit'")
    return fits


def write_fits(fits: Sequence[Fit], path: Path = DATA) -> None:
    """As readable JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(fits), indent=1) + b"\n")


def transfer_ms(num_bytes: float, mbit_s: float) -> float:
    """0 for a bandwidth of 0, which is a link without a limit."""
    return 8e-3 * num_bytes / mbit_s if mbit_s else 0.0


def counts_at(setting: Setting, rtt_ms: float) -> StepCounts:
    """Between those that were measured; beyond them the nearest."""
    at = [counts.rtt_ms for counts in setting.counts]

    def between(name: str) -> float:
        return float(np.interp(rtt_ms, at, [getattr(counts, name) for counts in setting.counts]))

    values = {name: between(name) for name in StepCounts.__struct_fields__[1:]}
    return StepCounts(rtt_ms=rtt_ms, **values)


def terms(fit: Fit, setting: Setting, load: Load) -> Terms:
    """What one answer consists of. Counts are taken at the round trip that is as many of the device's steps as on the
    fitted machine: how far a device drafts depends on that."""
    edge_step = fit.edge.step_ms if load.edge_step_ms is None else load.edge_step_ms
    cloud_step = fit.cloud.step_ms if load.cloud_step_ms is None else load.cloud_step_ms
    prompt = fit.prompt_tokens if load.prompt_tokens is None else load.prompt_tokens
    tokens = fit.tokens if load.tokens is None else load.tokens
    counts = counts_at(setting, load.rtt_ms * fit.edge.step_ms / edge_step)
    messages = counts.messages * tokens
    edge_prompt = edge_step * fit.edge.prompt_steps * setting.prompt_edge * prompt
    cloud_prompt = cloud_step * fit.cloud.prompt_steps * setting.prompt_cloud * prompt
    return Terms(
        tokens=tokens,
        edge_ms=edge_prompt
        + edge_step * (counts.edge_steps * tokens + fit.edge.message_steps * messages),
        cloud_ms=cloud_prompt
        + cloud_step * (counts.cloud_steps * tokens + fit.cloud.message_steps * messages),
        first_ms=edge_prompt
        + cloud_prompt
        + edge_step * counts.edge_steps
        + cloud_step * counts.cloud_steps,
        round_trips=counts.round_trips * tokens,
        messages=messages,
        num_bytes=setting.prompt_bytes * prompt + setting.token_bytes * tokens,
        prompt_bytes=setting.prompt_bytes * prompt,
        offload_rate=counts.offload_rate,
    )


def expect(fit: Fit, setting: Setting, load: Load) -> Expectation:
    """What one answer takes and costs."""
    t = terms(fit, setting, load)
    link = (load.rtt_ms, load.mbit_s)
    total_ms = setting.total.of(t.edge_ms + t.cloud_ms, t.round_trips, t.num_bytes, *link)
    ttft_ms = min(total_ms, setting.first.of(t.first_ms, 1.0, t.prompt_bytes, *link))
    return Expectation(
        name=setting.name,
        mode=setting.mode,
        threshold=setting.threshold,
        exits=fit.exits,
        split_layer=fit.split_layer,
        ttft_ms=ttft_ms,
        token_ms=(total_ms - ttft_ms) / max(1.0, t.tokens - 1),
        total_ms=total_ms,
        edge_ms=t.edge_ms,
        cloud_ms=t.cloud_ms,
        num_bytes=t.num_bytes,
        messages=t.messages,
        round_trips=t.round_trips,
        offload_rate=t.offload_rate,
        agreement=setting.agreement,
        agrees=load.min_agreement == 0 or (setting.agreement or 0.0) >= load.min_agreement,
    )


def expectations(fits: Sequence[Fit], load: Load) -> list[Expectation]:
    """Of every setting of every split, those that agree enough first, then by total time; cloud-only once."""
    found = [
        expect(fit, setting, load)
        for i, fit in enumerate(fits)
        for setting in fit.settings
        if i == 0 or setting.mode != CLOUD_ONLY
    ]
    return sorted(found, key=lambda e: (not e.agrees, e.total_ms))


def check_load(load: Load) -> None:
    """Raises ConfigError for a value outside its range."""
    for name, value in msgspec.structs.asdict(load).items():
        if name == "min_agreement":
            if not 0 <= value <= 1:
                raise ConfigError(f"agreement {value}: expected a number from 0 to 1")
        elif value is not None and not (0 < value < 1e9 or (value == 0 and name == "rtt_ms")):
            raise ConfigError(f"{name} {value}: expected a number above 0")
