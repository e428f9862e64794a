"""Whole answers at several splits over links, next to the times that `fleet plan` predicts.

The speeds of the device and of the worker are measured at one split, each alone on its core, as
`edge-agent measure` and the worker's `measure` do. The answers are those of the device and the
worker as they are deployed, with a broker and a proxy that delays each byte between them. All
splits, modes and links take turns, prompt by prompt.

Each row has two predictions. `predicted_s` has the number of round trips that the planner expects
by the bundle's calibration, `at_measured_trips_s` the number that the answers had. What a round
trip takes on this machine beyond the link and the worker's step, `round_trip_ms`, is the median of
the answers at the split of the speeds: the broker, the proxy, and two processes that share the
machine's memory. It is added to the link. No answer at another split is in the constants.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Final

from msgspec import Struct, to_builtins
from msgspec.structs import replace

from benchmarks.drivers.answer import DriverAnswer
from benchmarks.edge import machine
from benchmarks.paper.models import PaperModels
from benchmarks.paper.rig import LOOPBACK, Cost, Rig
from benchmarks.paper.rows import Link
from benchmarks.paper.systems import CALIBRATED, SYSTEMS
from benchmarks.processes import started_on, two_cores
from cloud_broker_worker.worker.speed import WorkerMeter
from cloud_broker_worker.worker.upper_layers import UpperLayers
from edge_agent.engine.speed import DeviceMeter
from fleet.bundles.manifest import Bundle, Manifest
from fleet.errors import ConfigError
from fleet.graphs.partition import Partition
from fleet.planning.cost_model import (
    ON_DEVICE,
    STANDALONE,
    CostFit,
    Expectation,
    PlanRequest,
    ServingSetting,
    expected_cost,
    on_device_cost,
    read_fits,
)
from fleet.planning.machine_speeds import MachineSpeeds
from fleet.planning.splits import deployed_point, split_fits
from fleet.protocol.modes import Mode

WARM_UP_TOKENS: Final = 8
WARM_UP_PROMPT: Final = "Name three fruits."

Progress = Callable[[str], None]
CostedAnswer = tuple[DriverAnswer, Cost]


class AnswerRow(Struct, frozen=True, kw_only=True):
    """The median seconds of an answer of one mode at one split over one link.

    `layers` are those of the device. Errors are shares of the measured time, and `round_trips` are
    the mean ones of an answer.
    """

    mode: str
    layers: int
    link: Link
    measured_s: float
    predicted_s: float
    at_measured_trips_s: float
    error: float
    error_at_measured_trips: float
    round_trips: float
    predicted_round_trips: float
    is_held_back: bool


@dataclass(frozen=True, order=True)
class AnswerCase:
    """One mode at one split over one link."""

    layers: int
    mode: str
    rtt_ms: float
    mbit_s: float

    @property
    def link(self) -> Link:
        """The link between the device and the broker."""
        return Link(self.rtt_ms, self.mbit_s)

    @property
    def system(self) -> str:
        """The name in `SYSTEMS`; a device with the whole model needs no other."""
        names = {ON_DEVICE: STANDALONE, Mode.COLLABORATIVE: CALIBRATED}
        return names.get(self.mode, self.mode)


def middle_split(manifest: Manifest) -> int:
    """Return the middle one of the splits below the last layer.

    Raises:
        ConfigError: there are fewer than two.
    """
    splits = [layer for layer in manifest.upload_layers if layer < manifest.model.num_layers]
    if len(splits) < 2:
        raise ConfigError(
            f"bundle {manifest.bundle_id} has {len(splits)} upload layers below its last one: "
            "expected at least two; export it with --uploads"
        )
    return splits[len(splits) // 2]


def answer_cases(manifest: Manifest, links: Sequence[Link]) -> Iterator[AnswerCase]:
    """Yield the cases, split by split; a mode without a link comes once."""
    modes = [Mode.VERIFIED, *([Mode.COLLABORATIVE] if deployed_point(manifest) else [])]
    for layers in manifest.splits:
        if layers == manifest.model.num_layers:
            yield AnswerCase(layers, ON_DEVICE, 0.0, 0.0)
            continue
        yield AnswerCase(layers, STANDALONE, 0.0, 0.0)
        for link in links:
            for mode in modes:
                yield AnswerCase(layers, mode, link.rtt_ms, link.mbit_s)


class SpeedMeters:
    """Meters of the device and of the worker at one split, each with one thread on its core."""

    def __init__(self, bundle: Bundle, split: int) -> None:
        self._cores = two_cores() or (None, None)
        self._device = DeviceMeter(Partition(bundle, 1, split=split))
        self._worker = WorkerMeter(UpperLayers(bundle, 1, from_layer=split))

    def run_round(self) -> None:
        """Run one after the other."""
        edge_core, cloud_core = self._cores
        with started_on(edge_core):
            self._device.run_round()
        with started_on(cloud_core):
            self._worker.run_round()

    def speeds(self) -> tuple[MachineSpeeds, MachineSpeeds]:
        """Return those of the device and of the worker."""
        return self._device.speeds(1), self._worker.speeds(1, "float32")


def measure_answers(
    bundle: Bundle,
    cases: Sequence[AnswerCase],
    prompts: Sequence[str],
    num_tokens: int,
    meters: SpeedMeters,
    progress: Progress,
) -> dict[AnswerCase, list[CostedAnswer]]:
    """Return the answers of all cases to all prompts; a round of the meters precedes each prompt.

    So a machine whose speed changes does that for both.
    """
    systems = [SYSTEMS[name] for name in dict.fromkeys(case.system for case in cases)]
    answers: dict[AnswerCase, list[CostedAnswer]] = defaultdict(list)
    with Rig(PaperModels(bundle, progress), systems, progress) as rig:
        for case in cases:
            rig.move(case.system, case.layers)
            rig.answer(case.system, WARM_UP_PROMPT, WARM_UP_TOKENS, LOOPBACK)
        for number, prompt in enumerate(prompts, 1):
            progress(f"prompt {number} of {len(prompts)}")
            meters.run_round()
            for case in cases:
                rig.move(case.system, case.layers)
                answers[case].append(rig.answer(case.system, prompt, num_tokens, case.link))
    return answers


def predict(
    fits: Sequence[CostFit],
    case: AnswerCase,
    answer: DriverAnswer,
    round_trip_ms: float,
    *,
    at_measured_trips: bool = False,
) -> Expectation:
    """Return the expected cost of an answer, as `fleet plan` does.

    `round_trip_ms` is added to the link, and may be below zero.
    """
    request = PlanRequest(
        rtt_ms=case.rtt_ms + round_trip_ms,
        mbit_s=case.mbit_s,
        prompt_tokens=answer.prompt_tokens,
        tokens=len(answer.token_ids),
    )
    if case.mode == ON_DEVICE:
        cost = on_device_cost(fits[0], request)
        if cost is None:
            raise ConfigError("the fit has no whole model; expected one of every bundle")
        return cost
    fit = next(one for one in fits if one.split_layer == case.layers)
    setting = next(one for one in fit.settings if one.mode == case.mode)
    cost = expected_cost(fit, setting, request)
    if at_measured_trips and cost.round_trips:
        share = answer.round_trips / cost.round_trips
        return expected_cost(fit, with_round_trips(setting, share), request)
    return cost


def with_round_trips(setting: ServingSetting, share: float) -> ServingSetting:
    """Return a setting with a share of its round trips, and of what each of them costs."""
    counts = tuple(
        replace(
            one,
            round_trips=one.round_trips * share,
            cloud_steps=one.cloud_steps * share,
            messages=one.messages * share,
        )
        for one in setting.counts
    )
    return replace(setting, counts=counts)


def round_trip_beyond_link_ms(
    fits: Sequence[CostFit], answers: Mapping[AnswerCase, Sequence[CostedAnswer]], fitted: int
) -> float:
    """Return the median time of a round trip that the planner's sum leaves out, at one split."""
    differences_ms = [
        (answer.total_ms - predict(fits, case, answer, 0.0, at_measured_trips=True).total_ms)
        / answer.round_trips
        for case, own in answers.items()
        for answer, _ in own
        if case.layers == fitted and answer.round_trips
    ]
    return median(differences_ms) if differences_ms else 0.0


def answer_row(
    case: AnswerCase,
    answers: Sequence[CostedAnswer],
    fits: Sequence[CostFit],
    fitted: int,
    round_trip_ms: float,
) -> AnswerRow:
    """Return the row of a case."""
    costs = [predict(fits, case, answer, round_trip_ms) for answer, _ in answers]
    at_trips = [
        predict(fits, case, answer, round_trip_ms, at_measured_trips=True) for answer, _ in answers
    ]
    measured_s = median(answer.total_ms for answer, _ in answers) / 1e3
    predicted_s = median(cost.total_ms for cost in costs) / 1e3
    at_measured_trips_s = median(cost.total_ms for cost in at_trips) / 1e3
    return AnswerRow(
        mode=case.mode,
        layers=case.layers,
        link=case.link,
        measured_s=measured_s,
        predicted_s=predicted_s,
        at_measured_trips_s=at_measured_trips_s,
        error=predicted_s / measured_s - 1,
        error_at_measured_trips=at_measured_trips_s / measured_s - 1,
        round_trips=fmean(answer.round_trips for answer, _ in answers),
        predicted_round_trips=fmean(cost.round_trips for cost in costs),
        is_held_back=case.layers != fitted,
    )


def held_back_errors(rows: Sequence[AnswerRow], name: str) -> dict[str, float]:
    """Return the median and the highest error of the rows that are held back."""
    errors = [abs(float(getattr(row, name))) for row in rows if row.is_held_back]
    return {"median": median(errors), "highest": max(errors)}


def compare_answers(
    bundle: Bundle,
    fitted: int | None,
    links: Sequence[Link],
    prompts: Sequence[str],
    num_tokens: int,
    progress: Progress,
) -> dict[str, Any]:
    """Measure speeds at the split `fitted`, by default the middle one, and answers at all splits.

    Return the constants, the rows and their errors.
    """
    fitted = fitted or middle_split(bundle.manifest)
    meters = SpeedMeters(bundle, fitted)
    cases = list(answer_cases(bundle.manifest, links))
    answers = measure_answers(bundle, cases, prompts, num_tokens, meters, progress)
    device, worker = meters.speeds()
    fits = split_fits(bundle.manifest, device, worker, read_fits()[0])
    round_trip_ms = round_trip_beyond_link_ms(fits, answers, fitted)
    rows = [answer_row(case, own, fits, fitted, round_trip_ms) for case, own in answers.items()]
    return {
        "model": bundle.manifest.model.name,
        "bundle_id": bundle.manifest.bundle_id,
        "fitted": fitted,
        "prompts": len(prompts),
        "tokens": num_tokens,
        "device": to_builtins(device),
        "worker": to_builtins(worker),
        "round_trip_ms": round_trip_ms,
        "rows": to_builtins(rows),
        "answers": {str(case): to_builtins(own) for case, own in answers.items()},
        "errors": {
            "predicted": held_back_errors(rows, "error"),
            "at_measured_trips": held_back_errors(rows, "error_at_measured_trips"),
        },
        "machine": machine(),
    }
