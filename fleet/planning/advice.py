"""Recommended mode, threshold and split for a link and two machines, in plain sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct

from fleet.errors import ConfigError
from fleet.planning.cost_model import (
    CLOUD_ONLY,
    ON_DEVICE,
    CostFit,
    Expectation,
    PlanRequest,
    check_request,
    device_memory_mb,
    expectations,
    has_room,
    on_device_cost,
)

RANGE: Final = (0.1, 1000.0)
"""Round trips in ms and bandwidths in Mbit/s between which crossings are searched."""
NUM_POINTS: Final = 121


class Crossing(Struct, frozen=True):
    """A value `at` (ms or Mbit/s, the other as requested) from which `above` beats `below`."""

    at: float
    below: str
    above: str


class DeploymentPlan(Struct, frozen=True, kw_only=True):
    """Expectations, in order: those with enough agreement come first, the fastest of them first.

    `best` is None if none has enough agreement.
    """

    load: PlanRequest
    best: str | None
    advice: str
    expectations: list[Expectation]
    by_rtt_ms: list[Crossing]
    by_mbit_s: list[Crossing]
    fits: list[dict[str, Any]]


def plan_deployment(fits: Sequence[CostFit], request: PlanRequest) -> DeploymentPlan:
    """Recommend a mode, a threshold and a split, and find the links where another is faster.

    Raises:
        ConfigError: a number that no link, machine or text has, or a device without room.
    """
    check_request(request)
    expected = expectations(fits, request)
    if not expected:
        raise ConfigError(
            f"no split fits {request.device_memory_mb:g} MB of the device's memory, and cloud-only "
            "was not measured; give more memory, or a bundle with an earlier exit"
        )
    best = expected[0] if expected[0].agrees else None

    def fastest_at(**changes: float) -> str:
        changed = msgspec.structs.replace(request, **changes)
        return _title(expectations(fits, changed)[0], fits)

    by_rtt: list[Crossing] = []
    by_bandwidth: list[Crossing] = []
    if best:
        by_rtt = list(crossings(lambda rtt_ms: fastest_at(rtt_ms=rtt_ms)))
        by_bandwidth = list(crossings(lambda mbit_s: fastest_at(mbit_s=mbit_s)))
    return DeploymentPlan(
        load=request,
        best=_title(best, fits) if best else None,
        advice=describe_plan(fits, request, expected, by_rtt, by_bandwidth),
        expectations=expected,
        by_rtt_ms=by_rtt,
        by_mbit_s=by_bandwidth,
        fits=[_origin(fit) for fit in fits],
    )


def crossings(fastest: Callable[[float], str]) -> Iterator[Crossing]:
    """Find the values within `RANGE`, to a thousandth, at which the fastest changes."""
    points = np.geomspace(*RANGE, NUM_POINTS).tolist()
    names = [fastest(point) for point in points]
    for low, high, below, above in zip(points, points[1:], names, names[1:], strict=False):
        if below != above:
            yield _bisect(fastest, low, high, below)


def _bisect(fastest: Callable[[float], str], low: float, high: float, below: str) -> Crossing:
    while high > 1.001 * low:
        middle = (low * high) ** 0.5
        if fastest(middle) == below:
            low = middle
        else:
            high = middle
    return Crossing(high, below, fastest(high))


def describe_plan(
    fits: Sequence[CostFit],
    request: PlanRequest,
    expected: Sequence[Expectation],
    by_rtt: Sequence[Crossing],
    by_bandwidth: Sequence[Crossing],
) -> str:
    """Return the plan in plain sentences."""
    best = expected[0]
    if not best.agrees:
        agreements = [one.agreement for one in expected if one.agreement is not None]
        highest = max(agreements, default=0.0)
        return f"nothing measured agrees to {request.min_agreement:g}; the highest is {highest:.3f}"
    name = _title(best, fits)
    sentences = [
        f"{name} is the fastest: {best.total_ms / 1e3:.2f} s an answer, "
        f"{best.ttft_ms:.0f} ms to the first token.",
        *_on_device_sentence(fits, request, expected),
        *_cloud_only_sentence(expected, [*by_rtt, *by_bandwidth]),
    ]
    sentences += _nearest("a round trip of ", "ms", request.rtt_ms, name, by_rtt)
    sentences += _beyond("ms", request.rtt_ms, [fit.rtt_ms for fit in fits])
    sentences += _nearest("", "Mbit/s", request.mbit_s, name, by_bandwidth)
    sentences += _beyond("Mbit/s", request.mbit_s, [fit.mbit_s for fit in fits])
    sentences += _one_split(fits) if best.mode != ON_DEVICE else []
    return " ".join(sentences)


def _one_split(fits: Sequence[CostFit]) -> list[str]:
    """Return the way to compare other splits, where there is only one."""
    if len({fit.exits for fit in fits}) > 1:
        return []
    only = f"Only exits {', '.join(map(str, fits[0].exits))} were compared;"
    if not fits[0].errors:  # computed from the speeds of machines
        return [f"{only} a bundle with more exits has more splits."]
    return [
        f"{only} 'edge-agent measure' measures a machine, and 'fleet plan --machine' compares "
        "the splits of a bundle on it."
    ]


def _on_device_sentence(
    fits: Sequence[CostFit], request: PlanRequest, expected: Sequence[Expectation]
) -> Iterator[str]:
    """Compare the best with the whole model on the device, where that is or would be faster."""
    best = expected[0]
    fit = fits[0]
    on_device = on_device_cost(fit, request)
    if on_device is None:
        return
    if best.mode == ON_DEVICE:
        yield _wrong_choice(fits, expected)
        return
    if on_device.total_ms >= best.total_ms:
        return
    takes = f"The whole model on the device would take {on_device.total_ms / 1e3:.2f} s, but"
    if not has_room(fit, on_device.split_layer, request):
        memory_mb = device_memory_mb(fit, on_device.split_layer, request)
        yield f"{takes} needs {memory_mb:.0f} MB there, of {request.device_memory_mb:g} MB."
    elif on_device.agreement is None:
        yield f"{takes} its agreement with the full model was not measured."
    else:
        yield f"{takes} agrees only to {on_device.agreement:.3f}."


def _wrong_choice(fits: Sequence[CostFit], expected: Sequence[Expectation]) -> str:
    """Return the sentence for a model that belongs on the device."""
    verdict = "The whole model belongs on the device; a split is the wrong choice here"
    splits = [one for one in expected if one.agrees and one.mode not in (ON_DEVICE, CLOUD_ONLY)]
    if not splits:
        return f"{verdict}."
    name = _title(splits[0], fits)
    return f"{verdict}: the fastest, {name}, takes {splits[0].total_ms / 1e3:.2f} s."


def _cloud_only_sentence(
    expected: Sequence[Expectation], crossed: Sequence[Crossing]
) -> Iterator[str]:
    """Compare the best with cloud-only."""
    if expected[0].mode == CLOUD_ONLY:
        yield (
            "A device of its own does not pay here, "
            "unless the link may fail or the cloud's time is scarce."
        )
        return
    cloud = next((one for one in expected if one.mode == CLOUD_ONLY), None)
    if cloud is not None:
        never = all(CLOUD_ONLY not in (crossing.below, crossing.above) for crossing in crossed)
        link = f"no other round trip or bandwidth from {RANGE[0]:g} to {RANGE[1]:g}"
        slower = f", and {link} alone makes it the fastest" if never else ""
        yield f"Cloud-only takes {cloud.total_ms / 1e3:.2f} s{slower}."


def _nearest(
    prefix: str, unit: str, value: float, name: str, crossed: Sequence[Crossing]
) -> Iterator[str]:
    """Describe the nearest crossings on either side of a value."""
    below = [crossing for crossing in crossed if crossing.at <= value and crossing.above == name]
    above = [crossing for crossing in crossed if crossing.at > value and crossing.below == name]
    if below:
        yield f"Below {prefix}{below[-1].at:.3g} {unit} {below[-1].below} is faster."
    if above:
        yield f"From {prefix}{above[0].at:.3g} {unit} on {above[0].above} is faster."


def _beyond(unit: str, value: float, spans: Iterable[tuple[float, float]]) -> Iterator[str]:
    """Warn about a value outside the measured range."""
    lows, highs = zip(*spans, strict=True)
    if not min(lows) <= value <= max(highs):
        measured = f"{min(lows):g} to {max(highs):g}"
        yield f"{value:g} {unit} is beyond what was measured ({measured})."


def _title(expectation: Expectation, fits: Sequence[CostFit]) -> str:
    """Return a name, with the exits where there is more than one choice of them."""
    if expectation.mode in (CLOUD_ONLY, ON_DEVICE) or len({fit.exits for fit in fits}) == 1:
        return expectation.name
    return f"{expectation.name} with exits {','.join(map(str, expectation.exits))}"


def _origin(fit: CostFit) -> dict[str, Any]:
    """Return the origin of a fit's figures."""
    return {
        "model": fit.model,
        "bundle_id": fit.bundle_id,
        "exits": fit.exits,
        "split_layer": fit.split_layer,
        "machine": fit.machine,
        "edge_step_ms": fit.edge.step_ms,
        "cloud_step_ms": fit.cloud.step_ms,
        "errors": fit.errors,
    }
