"""Expected costs of each mode on a link, and the advice, as tables."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest

from fleet.errors import ConfigError
from fleet.planning.advice import crossings, plan_deployment
from fleet.planning.cost_model import (
    DATA,
    CostFit,
    Expectation,
    MachineSpeed,
    PlanRequest,
    ServingSetting,
    StepCounts,
    TimeShares,
    expectations,
    expected_cost,
    read_fits,
    write_fits,
)

SUM = TimeShares(work=1.0, round_trip=1.0, transfer=1.0, extra_ms=0.0)


def setting(
    name: str, agreement: float | None, *counts: StepCounts, **changes: object
) -> ServingSetting:
    mode, _, threshold = name.partition("@")
    of = ServingSetting(
        name=name,
        mode=mode,
        threshold=float(threshold) if threshold else None,
        agreement=agreement,
        prompt_edge=0.0,
        prompt_cloud=0.0,
        prompt_bytes=0.0,
        token_bytes=0.0,
        counts=counts,
        total=SUM,
        first=SUM,
    )
    return msgspec.structs.replace(of, **changes)


# A step is 20 ms on the device and 40 ms in the cloud. Alone: 20 ms a token. Collaborative: 20,
# half a round trip and a tenth of a step of the cloud. Cloud-only: 40 ms a token and one round trip
# an answer of 100 tokens.
ALONE = setting(
    "standalone",
    0.9,
    StepCounts(
        rtt_ms=0.0, edge_steps=1.0, cloud_steps=0.0, round_trips=0.0, messages=0.0, offload_rate=0.0
    ),
)
TOGETHER = setting(
    "collaborative@0.8",
    0.97,
    StepCounts(
        rtt_ms=0.0, edge_steps=1.0, cloud_steps=0.1, round_trips=0.5, messages=1.5, offload_rate=0.5
    ),
    prompt_bytes=1000.0,
    token_bytes=500.0,
)
CLOUD = setting(
    "cloud_only",
    1.0,
    StepCounts(
        rtt_ms=0.0,
        edge_steps=0.0,
        cloud_steps=1.0,
        round_trips=0.01,
        messages=1.0,
        offload_rate=1.0,
    ),
    prompt_cloud=1.0,
    token_bytes=50.0,
)
FIT = CostFit(
    model="m",
    bundle_id="b",
    exits=(24,),
    split_layer=24,
    machine={"processor": "p"},
    edge=MachineSpeed(20.0, 0.2, 0.0),
    cloud=MachineSpeed(40.0, 0.25, 0.0),
    prompt_tokens=50.0,
    tokens=100.0,
    rtt_ms=(1.0, 100.0),
    mbit_s=(10.0, 100.0),
    errors={"median": 0.03, "highest": 0.1},
    settings=(ALONE, TOGETHER, CLOUD),
)
LINK = PlanRequest(rtt_ms=20.0, mbit_s=8.0)


@pytest.mark.parametrize(
    ("of", "load", "total_ms"),
    [
        (ALONE, LINK, 100 * 20),
        (ALONE, PlanRequest(rtt_ms=20.0, mbit_s=8.0, edge_step_ms=30.0), 100 * 30),
        (TOGETHER, LINK, 100 * (20 + 4) + 50 * 20 + (50 * 1000 + 100 * 500) / 1000),
        (
            TOGETHER,
            PlanRequest(rtt_ms=0.0, mbit_s=8.0, tokens=10, prompt_tokens=1),
            10 * 24 + (1000 + 10 * 500) / 1000,
        ),
        (
            TOGETHER,
            PlanRequest(rtt_ms=20.0, mbit_s=80.0),
            100 * (20 + 4) + 50 * 20 + (50 * 1000 + 100 * 500) / 10_000,
        ),
        (CLOUD, LINK, 100 * 40 + 50 * 0.25 * 40 + 20 + 100 * 50 / 1000),
        (
            CLOUD,
            PlanRequest(rtt_ms=20.0, mbit_s=8.0, cloud_step_ms=4.0),
            100 * 4 + 50 * 0.25 * 4 + 20 + 100 * 50 / 1000,
        ),
    ],
)
def test_an_answer_is_its_steps_its_round_trips_and_its_bytes(
    of: ServingSetting, load: PlanRequest, total_ms: float
) -> None:
    assert expected_cost(FIT, of, load).total_ms == pytest.approx(total_ms)


def test_the_first_token_waits_for_the_prompt_and_one_round_trip() -> None:
    found = expected_cost(FIT, CLOUD, LINK)
    assert found.ttft_ms == pytest.approx(50 * 0.25 * 40 + 40 + 20)
    assert found.token_ms == pytest.approx((found.total_ms - found.ttft_ms) / 99)


def test_only_shares_of_the_terms_take_time() -> None:
    overlapping = msgspec.structs.replace(
        TOGETHER, total=TimeShares(work=0.5, round_trip=0.8, transfer=0.0, extra_ms=3.0)
    )
    expected = 0.5 * 100 * 24 + 50 * (0.8 * 20 + 3)
    assert expected_cost(FIT, overlapping, LINK).total_ms == pytest.approx(expected)


DRAFTS = setting(
    "verified",
    1.0,
    StepCounts(
        rtt_ms=10.0,
        edge_steps=1.2,
        cloud_steps=0.4,
        round_trips=0.5,
        messages=1.0,
        offload_rate=0.2,
    ),
    StepCounts(
        rtt_ms=50.0,
        edge_steps=2.0,
        cloud_steps=0.8,
        round_trips=0.1,
        messages=0.4,
        offload_rate=0.2,
    ),
)


@pytest.mark.parametrize(
    ("rtt_ms", "edge_step_ms", "round_trips"),
    [
        (0.0, 20.0, 50),
        (10.0, 20.0, 50),
        (30.0, 20.0, 30),
        (50.0, 20.0, 10),
        (500.0, 20.0, 10),
        (60.0, 40.0, 30),
    ],
)
def test_counts_lie_between_those_that_were_measured_by_round_trip_in_steps(
    rtt_ms: float, edge_step_ms: float, round_trips: float
) -> None:
    load = PlanRequest(rtt_ms=rtt_ms, mbit_s=8.0, edge_step_ms=edge_step_ms)
    assert expected_cost(FIT, DRAFTS, load).round_trips == pytest.approx(round_trips)


@pytest.mark.parametrize(
    ("load", "best"),
    [
        (LINK, "standalone"),
        (msgspec.structs.replace(LINK, min_agreement=0.95), "collaborative@0.8"),
        (msgspec.structs.replace(LINK, min_agreement=0.98), "cloud_only"),
        (PlanRequest(rtt_ms=20.0, mbit_s=8.0, cloud_step_ms=4.0), "cloud_only"),
        (PlanRequest(rtt_ms=100.0, mbit_s=8.0, min_agreement=0.95), "cloud_only"),
    ],
)
def test_the_fastest_that_agrees_enough_is_the_best(load: PlanRequest, best: str) -> None:
    made = plan_deployment((FIT,), load)
    assert made.best == best
    assert made.advice.startswith(f"{best} is the fastest: ")
    assert [one.agrees for one in made.expectations] == sorted(
        [one.agrees for one in made.expectations], reverse=True
    )


def test_the_advice_has_the_links_from_which_another_is_faster() -> None:
    made = plan_deployment((FIT,), PlanRequest(rtt_ms=20.0, mbit_s=80.0, min_agreement=0.95))
    # 2400 + 50 r + 10 = 4000 + 500 + r + 0.5
    (crossing,) = made.by_rtt_ms
    assert (crossing.below, crossing.above) == ("collaborative@0.8", "cloud_only")
    assert crossing.at == pytest.approx(2090.5 / 49, rel=2e-3)
    assert "From a round trip of 42.7 ms on cloud_only is faster." in made.advice
    # 2400 + 1000 + 800 / m = 4000 + 500 + 20 + 40 / m
    (crossing,) = made.by_mbit_s
    assert (crossing.below, crossing.above) == ("cloud_only", "collaborative@0.8")
    assert crossing.at == pytest.approx(760 / 1120, rel=2e-3)
    assert "Below 0.679 Mbit/s cloud_only is faster." in made.advice
    assert "Cloud-only takes 4.52 s." in made.advice
    alone = plan_deployment((FIT,), LINK)
    assert (
        "Cloud-only takes 4.53 s, and no other round trip or bandwidth from 0.1 to 1000 alone makes"
        in alone.advice
    )


def test_the_advice_warns_about_links_that_were_not_measured() -> None:
    words = plan_deployment((FIT,), PlanRequest(rtt_ms=300.0, mbit_s=31.0)).advice
    assert "300 ms is beyond what was measured (1 to 100)." in words
    assert "Only exits 24 were compared; 'edge-agent measure' measures a machine" in words
    assert "beyond" not in plan_deployment((FIT,), PlanRequest(rtt_ms=20.0, mbit_s=31.0)).advice


def test_no_mode_is_best_where_none_agrees_enough() -> None:
    fit = msgspec.structs.replace(FIT, settings=(ALONE, TOGETHER))
    made = plan_deployment((fit,), msgspec.structs.replace(LINK, min_agreement=0.99))
    assert (made.best, made.by_rtt_ms) == (None, [])
    assert made.advice == "nothing measured agrees to 0.99; the highest is 0.970"


def test_an_unknown_agreement_is_none() -> None:
    fit = msgspec.structs.replace(FIT, settings=(msgspec.structs.replace(ALONE, agreement=None),))
    assert [
        one.agrees for one in expectations((fit,), msgspec.structs.replace(LINK, min_agreement=0.1))
    ] == [False]
    assert plan_deployment((fit,), LINK).best == "standalone"


def test_two_splits_are_distinct_and_cloud_only_is_one() -> None:
    shallow = msgspec.structs.replace(
        FIT,
        exits=(8,),
        split_layer=8,
        settings=(
            msgspec.structs.replace(
                ALONE,
                counts=(
                    StepCounts(
                        rtt_ms=0.0,
                        edge_steps=0.4,
                        cloud_steps=0.0,
                        round_trips=0.0,
                        messages=0.0,
                        offload_rate=0.0,
                    ),
                ),
            ),
            CLOUD,
        ),
    )
    made = plan_deployment((FIT, shallow), LINK)
    assert made.best == "standalone with exits 8"
    assert sum(one.mode == "cloud_only" for one in made.expectations) == 1
    assert "whether another split" not in made.advice


def test_crossings_are_found_to_a_thousandth() -> None:
    found = list(crossings(lambda at: "a" if at < 3 else "b" if at < 70 else "a"))
    assert [(one.below, one.above) for one in found] == [("a", "b"), ("b", "a")]
    assert [one.at for one in found] == pytest.approx([3, 70], rel=2e-3)


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (PlanRequest(rtt_ms=-1.0, mbit_s=8.0), "rtt_ms -1.0: expected a number from 0.000001"),
        (PlanRequest(rtt_ms=1.0, mbit_s=0.0), "mbit_s 0.0: expected a number from 0.000001"),
        (PlanRequest(rtt_ms=1.0, mbit_s=8.0, edge_step_ms=0.0), "edge_step_ms 0.0"),
        (PlanRequest(rtt_ms=float("nan"), mbit_s=8.0), "rtt_ms nan"),
        (PlanRequest(rtt_ms=1e-320, mbit_s=8.0), "rtt_ms 1e-320: expected"),
        (PlanRequest(rtt_ms=1.0, mbit_s=1e-320), "mbit_s 1e-320: expected"),
        (
            PlanRequest(rtt_ms=1.0, mbit_s=8.0, min_agreement=2.0),
            "agreement 2.0: expected a number from 0 to 1",
        ),
    ],
)
def test_numbers_that_no_link_has_are_refused(load: PlanRequest, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_deployment((FIT,), load)


def test_a_fit_survives_its_file(tmp_path: Path) -> None:
    write_fits([FIT], tmp_path / "new" / "plan.json")
    assert read_fits(tmp_path / "new" / "plan.json") == (FIT,)


@pytest.mark.parametrize("least", [1e-6, 999_999_999.0])
def test_every_figure_of_an_accepted_request_is_finite(least: float) -> None:
    request = PlanRequest(
        rtt_ms=999_999_999.0,
        mbit_s=least,
        edge_step_ms=least,
        cloud_step_ms=least,
        prompt_tokens=1_000_000,
        tokens=1_000_000,
    )
    for one in expectations(read_fits(DATA), request):
        assert math.isfinite(one.total_ms + one.ttft_ms + one.token_ms)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "fleet bench paper --fit"),
        ("[]", "holds no fit"),
        ('{"a": 1}', "expected a file of"),
        ("\xff", "is not in UTF-8"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "plan.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=words):
        read_fits(tmp_path / "plan.json")


def test_an_expectation_is_of_one_answer() -> None:
    found = expected_cost(FIT, TOGETHER, LINK)
    assert found == Expectation(
        name="collaborative@0.8",
        mode="collaborative",
        threshold=0.8,
        exits=(24,),
        split_layer=24,
        ttft_ms=94.0,
        token_ms=(3500 - 94) / 99,
        total_ms=3500.0,
        edge_ms=2000.0,
        cloud_ms=400.0,
        num_bytes=100_000.0,
        messages=150.0,
        round_trips=50.0,
        offload_rate=0.5,
        agreement=0.97,
        agrees=True,
    )
