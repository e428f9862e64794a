"""Which mode, threshold and split suit a link and two machines, and where another would: plain sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct

from fleet.planning.cost_model import CLOUD_ONLY, Expectation, Fit, Load, check_load, expectations

RANGE: Final = (
    0.1,
    1000.0,
)  # of round trips in ms and of Mbit/s in which other choices are looked for
NUM_POINTS: Final = 121


class Crossing(Struct, frozen=True):
    """From `at` on (ms or Mbit/s, the other as asked for) `above` is faster than `below`."""

    at: float
    below: str
    above: str


class DeploymentPlan(Struct, frozen=True, kw_only=True):
    """Expectations, those that agree enough first and among them the fastest; `best` is None where none does."""

    load: Load
    best: str | None
    advice: str
    expectations: list[Expectation]
    by_rtt_ms: list[Crossing]
    by_mbit_s: list[Crossing]
    fits: list[dict[str, Any]]


def plan(fits: Sequence[Fit], load: Load) -> DeploymentPlan:
    """Which mode, threshold and split suit, what to expect, and where another would.

    Raises:
        ConfigError: a number that no link, machine or text has.
    """
    check_load(load)
    found = expectations(fits, load)
    best = found[0] if found[0].agrees else None

    def at_rtt(rtt_ms: float) -> str:
        return _title(expectations(fits, msgspec.structs.replace(load, rtt_ms=rtt_ms))[0], fits)

    def at_bandwidth(mbit_s: float) -> str:
        return _title(expectations(fits, msgspec.structs.replace(load, mbit_s=mbit_s))[0], fits)

    by_rtt = list(crossings(at_rtt)) if best else []
    by_bandwidth = list(crossings(at_bandwidth)) if best else []
    return DeploymentPlan(
        load=load,
        best=_title(best, fits) if best else None,
        advice=advise(fits, load, found, by_rtt, by_bandwidth),
        expectations=found,
        by_rtt_ms=by_rtt,
        by_mbit_s=by_bandwidth,
        fits=[_about(fit) for fit in fits],
    )


def crossings(fastest: Callable[[float], str]) -> Iterator[Crossing]:
    """Where the fastest changes within `RANGE`, to a thousandth."""
    points = np.geomspace(*RANGE, NUM_POINTS).tolist()
    names = [fastest(point) for point in points]
    for low, high, below, above in zip(points, points[1:], names, names[1:], strict=False):
        if below != above:
            while high > 1.001 * low:
                middle = (low * high) ** 0.5
                low, high = (middle, high) if fastest(middle) == below else (low, middle)
            yield Crossing(high, below, fastest(high))


def advise(
    fits: Sequence[Fit],
    load: Load,
    found: Sequence[Expectation],
    by_rtt: Sequence[Crossing],
    by_bandwidth: Sequence[Crossing],
) -> str:
    """The plan in plain sentences."""
    best = found[0]
    if not best.agrees:
        known = max((e.agreement for e in found if e.agreement is not None), default=0.0)
        return f"nothing measured agrees to {load.min_agreement:g}; the highest is {known:.3f}"
    name = _title(best, fits)
    words = [
        f"{name} is the fastest: {best.total_ms / 1e3:.2f} s an answer, {best.ttft_ms:.0f} ms to the first token."
    ]
    cloud = next((e for e in found if e.mode == CLOUD_ONLY), None)
    if best.mode == CLOUD_ONLY:
        words.append(
            "A device of its own does not pay here, unless the link may fail or the cloud's time is scarce."
        )
    elif cloud is not None:
        never = all(CLOUD_ONLY not in (turn.below, turn.above) for turn in (*by_rtt, *by_bandwidth))
        reach = f"from {RANGE[0]:g} to {RANGE[1]:g}"
        slower = (
            f", and no other round trip or bandwidth {reach} alone makes it the fastest"
            if never
            else ""
        )
        words.append(f"Cloud-only takes {cloud.total_ms / 1e3:.2f} s{slower}.")
    for what, unit, value, turns, measured in (
        ("a round trip of ", "ms", load.rtt_ms, by_rtt, _reach(fit.rtt_ms for fit in fits)),
        ("", "Mbit/s", load.mbit_s, by_bandwidth, _reach(fit.mbit_s for fit in fits)),
    ):
        words += _turns(what, unit, value, name, turns)
        if not measured[0] <= value <= measured[1]:
            words.append(
                f"{value:g} {unit} is beyond what was measured ({measured[0]:g} to {measured[1]:g})."
            )
    if len({fit.exits for fit in fits}) == 1:
        exits = ", ".join(map(str, fits[0].exits))
        words.append(
            f"Only exits {exits} were measured: whether another split suits better cannot be said."
        )
    return " ".join(words)


def _reach(spans: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """From the lowest to the highest of some."""
    lows, highs = zip(*spans, strict=True)
    return min(lows), max(highs)


def _turns(
    what: str, unit: str, value: float, name: str, found: Sequence[Crossing]
) -> Iterator[str]:
    """The nearest crossings on either side."""
    below = [crossing for crossing in found if crossing.at <= value and crossing.above == name]
    above = [crossing for crossing in found if crossing.at > value and crossing.below == name]
    if below:
        yield f"Below {what}{below[-1].at:.3g} {unit} {below[-1].below} is faster."
    if above:
        yield f"From {what}{above[0].at:.3g} {unit} on {above[0].above} is faster."


def _title(expectation: Expectation, fits: Sequence[Fit]) -> str:
    """With the exits where there is more than one choice of them."""
    if expectation.mode == CLOUD_ONLY or len({fit.exits for fit in fits}) == 1:
        return expectation.name
    return f"{expectation.name} with exits {','.join(map(str, expectation.exits))}"


def _about(fit: Fit) -> dict[str, Any]:
    """Where the figures come from."""
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
