"""Fit of the constants of `fleet.planning.cost_model` to latency rows of some links.

Every second link of the grid is held back for a check, as on a chessboard of round trips and
bandwidths. Times are fitted by least squares of relative errors, with no term below zero: first
both sides' CPU over steps, prompt and messages, for all systems together, then for each system the
shares of that, of its round trips and of its bytes in its time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import fmean, median
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from benchmarks.paper.figures import agreement, num_bytes, num_messages
from benchmarks.paper.measure import LATENCY, TABLE
from benchmarks.paper.rows import Link, ModelSizes, Row, Run
from fleet.errors import ConfigError
from fleet.planning.cost_model import (
    CLOUD_ONLY,
    PLAIN_SUM,
    CostFit,
    MachineSpeed,
    PlanRequest,
    ServingSetting,
    StepCounts,
    TimeShares,
    answer_terms,
    expected_cost,
    transfer_ms,
)
from fleet.protocol.modes import Mode, offload_rate

Floats = npt.NDArray[np.float64]

MODES: Final = (Mode.STANDALONE, Mode.COLLABORATIVE, Mode.VERIFIED, CLOUD_ONLY)
REFERENCES: Final = (
    Mode.VERIFIED,
    "collaborative@1.0",
)  # both give the deployed full model's tokens
PULL: Final = 0.1  # towards the plain sum, where rows do not tell terms apart
GOAL: Final = 0.15


class HeldBack(Struct, frozen=True, kw_only=True):
    """One system over one link that the fit did not see.

    It has the mean seconds of an answer, and the error as a share.
    """

    system: str
    link: Link
    measured_s: float
    predicted_s: float
    error: float


def fit_cost_model(rows: Iterable[Row], run: Run) -> tuple[CostFit, list[HeldBack]]:
    """Return the constants, and their errors on the links that were not fitted.

    Raises:
        ConfigError: there are too few links or systems, or no system was measured over enough of
            both kinds of links.
    """
    answers: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        answers[row.system].append(row)
    measured = [row for name in answers if name.startswith(MODES) for row in answers[name]]
    latency = [row for row in measured if row.part == LATENCY]
    links = sorted({row.link for row in latency}, key=lambda link: (link.mbit_s, link.rtt_ms))
    if len(links) < 3:
        raise ConfigError(
            f"latency was measured over {len(links)} links: expected 3 or more; "
            "run 'fleet bench paper --only latency'"
        )
    fitted_links = set(links[::2])
    fitted = [row for row in latency if row.link in fitted_links]
    held = [row for row in latency if row.link not in fitted_links]
    if missing := [
        mode for mode in (Mode.STANDALONE, CLOUD_ONLY) if all(row.system != mode for row in fitted)
    ]:
        raise ConfigError(
            f"no latency rows of {', '.join(missing)}, which give the time of a step; "
            "measure them, too"
        )
    work = Work(run.model)
    # Other lengths of prompts and answers separate a step, a prompt's position and a message.
    work_rows = fitted + [
        row for row in measured if row.part == TABLE and row.link not in set(links) - fitted_links
    ]
    edge = work.side(work_rows, "edge")
    cloud = work.side(work_rows, "cloud")
    by_system: dict[str, list[Row]] = defaultdict(list)
    for row in fitted:
        by_system[row.system].append(row)
    reference = next((answers[name] for name in REFERENCES if answers.get(name)), [])
    counted = CostFit(
        model=run.model.name,
        bundle_id=run.bundle_id,
        exits=run.model.exits,
        split_layer=run.model.split_layer,
        machine=run.machine,
        edge=edge,
        cloud=cloud,
        prompt_tokens=fmean(row.prompt_tokens for row in fitted),
        tokens=fmean(len(row.token_ids) for row in fitted),
        rtt_ms=(min(link.rtt_ms for link in links), max(link.rtt_ms for link in links)),
        mbit_s=(links[0].mbit_s, links[-1].mbit_s),
        errors={},
        whole=run.model.whole,
        exit_agreement=run.model.exit_agreement,
        settings=tuple(
            setting_of(name, own, agreement(answers[name], reference), work)
            for name, own in by_system.items()
        ),
    )
    settings = tuple(
        with_shares(counted, setting, by_system[setting.name]) for setting in counted.settings
    )
    result = msgspec.structs.replace(counted, settings=settings)
    checked = check_fit(result, held)
    if not checked:
        raise ConfigError(
            "no system was measured both over links to fit and over others; "
            "finish the part 'latency'"
        )
    errors = [one.error for one in checked]
    summary = {
        "held_back": float(len(errors)),
        "median": median(errors),
        "highest": max(errors),
        "within_15_percent": fmean(error <= GOAL for error in errors),
    }
    return msgspec.structs.replace(result, errors=summary), checked


def check_fit(fitted: CostFit, rows: Iterable[Row]) -> list[HeldBack]:
    """Compare predicted with measured totals, by system and link."""
    settings = {setting.name: setting for setting in fitted.settings}
    groups: dict[tuple[str, Link], list[Row]] = defaultdict(list)
    for row in rows:
        if row.system in settings:
            groups[row.system, row.link].append(row)
    result = []
    for (system, link), group in groups.items():
        measured = fmean(row.total_ms for row in group) / 1e3
        costs = [expected_cost(fitted, settings[system], request_of(row)) for row in group]
        predicted = fmean(cost.total_ms for cost in costs) / 1e3
        result.append(
            HeldBack(
                system=system,
                link=link,
                measured_s=measured,
                predicted_s=predicted,
                error=abs(predicted / measured - 1),
            )
        )
    return result


def request_of(row: Row) -> PlanRequest:
    """Return the plan request of a measured row."""
    return PlanRequest(
        rtt_ms=row.link.rtt_ms,
        mbit_s=row.link.mbit_s,
        prompt_tokens=row.prompt_tokens,
        tokens=len(row.token_ids),
    )


class Work:
    """Counter of a row's work in steps of the whole model, LM head included."""

    def __init__(self, model: ModelSizes) -> None:
        self._model = model
        self._step_layers = model.num_layers + model.head_layers

    def prompt(self, row: Row, side: str) -> float:
        """Return the share of the layers that a prompt's position ran through.

        It is all of that side's layers, or the mean where that is less.
        """
        model = self._model
        positions = row.prompt_tokens + len(row.token_ids)
        if side == "edge":
            return min(model.split_layer, row.layer_positions_edge / positions) / model.num_layers
        deepest = model.num_layers - (model.upload_layer if row.layer_positions_edge else 0)
        return min(deepest, row.layer_positions_cloud / positions) / model.num_layers

    def steps(self, row: Row, side: str) -> float:
        """Return the steps of the answer, without the prompt's.

        The positions of one verify request run together in the cloud, and weights that are read
        once for all of them make them about as expensive as one: a split's cloud needs a step of
        its layers for each request.
        """
        is_edge = side == "edge"
        model = self._model
        if not is_edge and row.layer_positions_edge and row.layer_positions_cloud:
            return (
                row.round_trips
                * (model.num_layers - model.upload_layer + model.head_layers)
                / self._step_layers
            )
        layers = row.layer_positions_edge if is_edge else row.layer_positions_cloud
        heads = row.head_calls - row.head_calls_cloud if is_edge else row.head_calls_cloud
        layers_of_answer = layers - self.prompt(row, side) * model.num_layers * row.prompt_tokens
        return (layers_of_answer + heads * model.head_layers) / self._step_layers

    def side(self, rows: Sequence[Row], side: str) -> MachineSpeed:
        """Return the components of one side's CPU seconds.

        Raises:
            ConfigError: they do not grow with its steps.
        """
        terms = np.array(
            [
                [self.steps(r, side), self.prompt(r, side) * r.prompt_tokens, num_messages(r)]
                for r in rows
            ]
        )
        seconds = np.array([row.edge_s if side == "edge" else row.cloud_s for row in rows])
        step, prompt, message = non_negative(terms, 1e3 * seconds)
        if step <= 0:
            raise ConfigError(
                f"the rows' {side} time does not grow with its steps; "
                "measure again on an idle machine"
            )
        return MachineSpeed(step, prompt / step, message / step)


def setting_of(name: str, rows: Sequence[Row], agreed: float | None, work: Work) -> ServingSetting:
    """Return one system's counts, from its rows over the links that are fitted.

    Its times are the plain sum at first.
    """
    value = name.partition("@")[2]
    positions = np.array([[row.prompt_tokens, len(row.token_ids)] for row in rows], float)
    prompt_bytes, token_bytes = non_negative(
        positions, np.array([num_bytes(row) for row in rows], float)
    )
    by_rtt: dict[float, list[Row]] = defaultdict(list)
    for row in rows:
        by_rtt[row.link.rtt_ms].append(row)
    return ServingSetting(
        name=name,
        mode=next(mode for mode in MODES if name.startswith(mode)),
        threshold=float(value) if value not in ("", "calibrated") else None,
        agreement=1.0 if name in (*REFERENCES, CLOUD_ONLY) else agreed,
        prompt_edge=fmean(work.prompt(row, "edge") for row in rows),
        prompt_cloud=fmean(work.prompt(row, "cloud") for row in rows),
        prompt_bytes=prompt_bytes,
        token_bytes=token_bytes,
        counts=tuple(counts_of(rtt_ms, group, work) for rtt_ms, group in sorted(by_rtt.items())),
        total=PLAIN_SUM,
        first=PLAIN_SUM,
    )


def counts_of(rtt_ms: float, rows: Sequence[Row], work: Work) -> StepCounts:
    """Return a token's counts, over all rows."""
    tokens = max(1, sum(len(row.token_ids) for row in rows))
    sources: dict[str, int] = defaultdict(int)
    for row in rows:
        for source, count in row.tokens_from.items():
            sources[source] += count
    return StepCounts(
        rtt_ms=rtt_ms,
        edge_steps=sum(work.steps(row, "edge") for row in rows) / tokens,
        cloud_steps=sum(work.steps(row, "cloud") for row in rows) / tokens,
        round_trips=sum(row.round_trips for row in rows) / tokens,
        messages=sum(map(num_messages, rows)) / tokens,
        offload_rate=offload_rate(sources),
    )


def with_shares(counted: CostFit, setting: ServingSetting, rows: Sequence[Row]) -> ServingSetting:
    """Return a setting with the shares of its terms in the system's time."""
    requests = [request_of(row) for row in rows]
    terms = [answer_terms(counted, setting, request) for request in requests]
    pairs = list(zip(terms, requests, strict=True))
    total = shares_of(
        [(t.edge_ms + t.cloud_ms, t.round_trips, t.num_bytes, request) for t, request in pairs],
        [row.total_ms for row in rows],
    )
    first = shares_of(
        [(t.first_ms, 1.0, t.prompt_bytes, request) for t, request in pairs],
        [row.ttft_ms for row in rows],
    )
    return msgspec.structs.replace(setting, total=total, first=first)


def shares_of(
    terms: Iterable[tuple[float, float, float, PlanRequest]], measured_ms: Sequence[float]
) -> TimeShares:
    """Fit shares by least squares of relative errors over work in ms, round trips and bytes."""
    columns = [
        [work, trips * request.rtt_ms, transfer_ms(size, request.mbit_s), trips]
        for work, trips, size, request in terms
    ]
    relative = np.array(columns) / np.array(measured_ms)[:, None]
    pull = PULL * np.eye(3, 4)
    solved = non_negative(
        np.vstack([relative, pull]), np.append(np.ones(len(relative)), [PULL] * 3)
    )
    return TimeShares(*solved)


def non_negative(matrix: Floats, target: Floats) -> list[float]:
    """Solve least squares with no unknown below 0, [n, k] and [n] to k.

    The result is the best of all choices of unknowns that are 0.
    """
    width = matrix.shape[1]
    best = [0.0] * width
    least = float(np.sum(target**2))
    for count in range(1, width + 1):
        for columns in combinations(range(width), count):
            values = np.linalg.lstsq(matrix[:, columns], target, rcond=None)[0]
            rest = float(np.sum((matrix[:, columns] @ values - target) ** 2))
            if np.all(values >= 0) and rest < least:
                best = [0.0] * width
                least = rest
                for column, value in zip(columns, values.tolist(), strict=True):
                    best[column] = value
    return best
