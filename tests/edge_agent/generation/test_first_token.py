"""The first token of an answer is not delayed by drafts that are made meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from edge_agent.generation.acceptance_rate import AcceptanceRate
from edge_agent.generation.decoder import MAX_PROPOSALS, Decoder
from edge_agent.generation.speculative import SpeculativeDecoder
from edge_agent.measurements import Measurements
from fleet.bundles.manifest import Bundle
from fleet.graphs.partition import Partition
from fleet.protocol.messages import Sampling, Verified
from tests.edge_agent.generation.test_several_tokens import PROMPT, KnownText, Uploads, generate

STEP_S = 100.0


class SlowSteps(Measurements):
    """Measurements by which each position of a chunk takes `STEP_S` seconds."""

    def chunk_cost(self, num_positions: int) -> float:
        return STEP_S * num_positions


class PendingSession(Uploads):
    """A session whose worker answers when a test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.has_request = False
        self.verdict: Verified | None = None

    def ask(self, start: int, draft: Sequence[int], *args: Any, **kwargs: Any) -> None:
        del start, draft, args, kwargs
        self.has_request = True

    def wait_response(self, timeout_s: float) -> Verified | None:
        del timeout_s
        verdict, self.verdict = self.verdict, None
        self.has_request = self.has_request and verdict is None
        return verdict


@pytest.mark.parametrize(("round_trip_s", "num_proposed"), [(1.5, 0), (5.5, 4), (99.5, 15)])
def test_a_chunk_ends_before_the_first_verdict_and_may_be_longer_after_it(
    tiny_bundle: Bundle, round_trip_s: float, num_proposed: int
) -> None:
    partition = Partition(tiny_bundle, num_threads=1)
    known, _ = generate(partition, (1.0, 1.0), Sampling())
    text = [*PROMPT, *(token.token_id for token in known)]
    session: Any = PendingSession()
    proposer = KnownText(text, wrong_every=999)
    measurements = SlowSteps()
    measurements.round_trip_done(round_trip_s * STEP_S)
    acceptance = AcceptanceRate()
    for _ in range(1000):
        acceptance.update(known[0].confidence, accepted=True)
    decoder = Decoder(
        partition,
        len(text),
        (1.0, 1.0),
        Sampling(),
        session,
        measurements=measurements,
        proposer=proposer,
    )
    decoder.text += PROMPT
    drafts = SpeculativeDecoder(decoder, session, acceptance, measurements, ())
    assert drafts.advance(40) == []
    assert drafts.advance(40) == []
    assert session.has_request
    expected = [num_proposed] if num_proposed else []
    assert [proposed for proposed, _ in proposer.results] == expected

    session.verdict = Verified(
        session="s", request=0, start=0, accepted=1, token_id=None, logprobs=(0.0,)
    )
    assert [token.token_id for token in drafts.advance(40)] == text[len(PROMPT) :][:1]
    drafts.advance(40)
    assert proposer.results[-1][0] == MAX_PROPOSALS
