"""Rows of the paper's experiments from a known linear model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.paper.rows import Link, ModelSizes, Row, Run, Traffic
from benchmarks.paper.sizes import GRID

MODEL = ModelSizes(
    name="tiny",
    num_layers=30,
    exits=(24,),
    split_layer=24,
    upload_layer=24,
    thresholds=(0.9,),
    layer_parameters=3_538_944,
    head_parameters=28_311_552,
)
RUN = Run(
    run="r1",
    machine={"processor": "a test's", "cores": 2},
    versions={"torch": "2"},
    bundle_id="b" * 32,
    model=MODEL,
    size="full",
    seed=0,
    at=1.0,
)
EDGE_STEP_MS = 20.0
CLOUD_STEP_MS = 35.0
PROMPT_STEPS = 0.2
MESSAGE_STEPS = 0.05
EXTRA_MS = 2.0
OVERLAP = {"verified": 0.8}  # share of the work that takes time
SYSTEMS = ("standalone", "collaborative@0.8", "verified", "cloud_only")


def row(system: str = "verified", **changes: object) -> Row:
    """Return an answer of ten tokens with some values changed."""
    values: dict[str, object] = {
        "part": "table",
        "system": system,
        "dataset": "alpaca",
        "sample": 0,
        "repeat": 0,
        "link": Link(20.0, 31.0),
        "run": "r1",
        "prompt_tokens": 20,
        "token_ids": tuple(range(10)),
        "tokens_from": {"cloud": 10},
        "ttft_ms": 100.0,
        "total_ms": 1000.0,
        "edge_s": 0.2,
        "cloud_s": 0.5,
        "traffic": Traffic(1000, 500, 12, 10),
        "round_trips": 10,
        "layer_positions_edge": 0,
        "layer_positions_cloud": 900,
        "head_calls": 10,
        "head_calls_cloud": 10,
    }
    return Row(**(values | changes))  # type: ignore[arg-type]


def linear_rows(
    links: tuple[Link, ...] = GRID, noise: float = 0.0, samples: int = 4
) -> Iterator[Row]:
    """Return the latency part: every system over every link, with relative noise of all times."""
    random = np.random.default_rng(0)
    for link in links:
        for sample in range(samples):
            for system in SYSTEMS:
                prompt = 40 + 37 * sample
                tokens = 100 - 5 * sample
                yield answer(
                    system, link, sample, prompt, tokens, 1 + noise * random.standard_normal()
                )


def answer(system: str, link: Link, sample: int, prompt: int, tokens: int, factor: float) -> Row:
    """Return one answer; a device drafts further where the round trip is longer."""
    positions = prompt + tokens
    drafted = 13 * tokens // 10
    asked = 4 * tokens // 10
    rounds = round(tokens / (4 + link.rtt_ms / 20))
    edge, cloud, heads, heads_cloud, trips, messages = {
        "standalone": (24 * positions, 0, tokens, 0, 0, 0),
        "collaborative@0.8": (24 * positions, 6 * positions, tokens, asked, asked, 3 * asked),
        "verified": (
            24 * (prompt + drafted),
            6 * (prompt + drafted),
            drafted,
            drafted,
            rounds,
            3 * rounds,
        ),
        "cloud_only": (0, 30 * positions, 0, tokens, 1, tokens),
    }[system]
    num_bytes = (
        0
        if system == "standalone"
        else 60 * messages + (0 if system == "cloud_only" else 1200 * positions)
    )
    steps = {
        side: ((layers - of_prompt) + head * MODEL.head_layers) / (30 + MODEL.head_layers)
        + PROMPT_STEPS * of_prompt / 30
        + MESSAGE_STEPS * messages
        for side, layers, of_prompt, head in (
            ("edge", edge, edge // max(1, edge) * 24 * prompt, heads),
            ("cloud", cloud, cloud // max(1, cloud) * (6 if edge else 30) * prompt, heads_cloud),
        )
    }
    if edge and cloud:  # the positions of one verify request run together
        of_questions = trips * (6 + MODEL.head_layers) / (30 + MODEL.head_layers)
        steps["cloud"] = of_questions + PROMPT_STEPS * prompt * 6 / 30 + MESSAGE_STEPS * messages
    edge_ms = EDGE_STEP_MS * steps["edge"]
    cloud_ms = CLOUD_STEP_MS * steps["cloud"]
    transfer_ms = num_bytes * 8 / (1000 * link.mbit_s)
    total = (
        OVERLAP.get(system, 1.0) * (edge_ms + cloud_ms)
        + trips * (link.rtt_ms + EXTRA_MS)
        + transfer_ms
    )
    from_cloud = {"standalone": 0, "cloud_only": tokens}.get(system, asked)
    return row(
        system,
        part="latency",
        link=link,
        sample=sample,
        prompt_tokens=prompt,
        token_ids=tuple(range(tokens)),
        tokens_from={"cloud": from_cloud, "exit:24": tokens - from_cloud},
        total_ms=total * factor,
        ttft_ms=total * factor / 20,
        edge_s=edge_ms * factor / 1e3,
        cloud_s=cloud_ms * factor / 1e3,
        traffic=Traffic(num_bytes, 0, messages, 0),
        round_trips=trips,
        layer_positions_edge=edge,
        layer_positions_cloud=cloud,
        head_calls=heads + heads_cloud,
        head_calls_cloud=heads_cloud,
    )
