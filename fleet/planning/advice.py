"""Recommended mode, threshold and split for a link and two machines, in plain sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct

from fleet.planning.cost_model import (
    CLOUD_ONLY,
    CostFit,
    Expectation,
    PlanRequest,
    check_request,
    expectations,
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
        ConfigError: a number that no link, machine or text has.
    """
    check_request(request)
    expected = expectations(fits, request)
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
        *_cloud_only_sentence(expected, [*by_rtt, *by_bandwidth]),
    ]
    sentences += _nearest("a round trip of ", "ms", request.rtt_ms, name, by_rtt)
    sentences += _beyond("ms", request.rtt_ms, [fit.rtt_ms for fit in fits])
    sentences += _nearest("", "Mbit/s", request.mbit_s, name, by_bandwidth)
    sentences += _beyond("Mbit/s", request.mbit_s, [fit.mbit_s for fit in fits])
    if len({fit.exits for fit in fits}) == 1:
        exits = ", ".join(map(str, fits[0].exits))
        sentences.append(
            f"Only exits {exits} were measured: whether another split suits better cannot be said."
        )
    return " ".join(sentences)


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
    if expectation.mode == CLOUD_ONLY or len({fit.exits for fit in fits}) == 1:
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
