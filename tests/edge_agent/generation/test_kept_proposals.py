"""A proposal that an exit rejects may stay in the text, as a draft for the cloud."""

from __future__ import annotations

from edge_agent.generation.acceptance_rate import AcceptanceRate
from edge_agent.generation.combined_proposer import CombinedProposer
from edge_agent.generation.decoder import Decoder, ExitChoice
from edge_agent.generation.suffix_table import SuffixTable
from fleet.bundles.manifest import Bundle
from fleet.graphs.partition import Partition
from fleet.protocol.messages import Sampling

PROMPT = [5, 9, 300, 17, 42]
PAST = [201, 202, 203, 204, 205]


def decoder_of(bundle: Bundle) -> Decoder:
    """Return a decoder whose prompt has run, and whose app has had `PAST` after this prompt."""
    table = SuffixTable()
    decoder = Decoder(
        Partition(bundle, num_threads=1),
        64,
        (1.0, 1.0),
        Sampling(),
        proposer=CombinedProposer(table, lambda num_positions: 1 + 0.01 * num_positions),
    )
    decoder.text += PROMPT
    first = decoder.advance(1)[0].token_id
    table.add([*PROMPT, first, *PAST])
    return decoder


def test_rejected_proposals_stay_if_they_are_preferred(tiny_bundle: Bundle) -> None:
    decoder = decoder_of(tiny_bundle)
    choices = decoder.advance(4, prefers=lambda _: True)
    assert decoder.text[-4:-1] == PAST[:3]
    assert [choice.proposal.token_id for choice in choices if choice.proposal] == PAST[:3]
    assert all(choice.proposal.is_kept for choice in choices if choice.proposal)
    after = decoder_of(tiny_bundle)
    after.text += PAST[:3]
    assert after.choose().token_id == choices[-1].token_id


def test_a_rejected_proposal_ends_the_step_otherwise_and_is_reported(tiny_bundle: Bundle) -> None:
    decoder = decoder_of(tiny_bundle)
    choices = decoder.advance(4)
    assert len(choices) == 1
    assert decoder.text[-1] == choices[0].token_id != PAST[0]
    assert choices[0].proposal is not None
    assert (choices[0].proposal.token_id, choices[0].proposal.is_kept) == (PAST[0], False)
    assert 0 < choices[0].proposal.chance < 1


def test_only_the_choices_before_a_kept_proposal_count_as_right(tiny_bundle: Bundle) -> None:
    decoder = decoder_of(tiny_bundle)
    asked: list[ExitChoice] = []

    def prefers(choice: ExitChoice) -> bool:
        asked.append(choice)
        return True

    decoder.advance(4, prefers)
    proposer = decoder._proposer
    assert isinstance(proposer, CombinedProposer)
    assert sum(memory.num_right for memory in proposer.memories.values()) == 0
    assert sum(memory.num_tried for memory in proposer.memories.values()) == 1
    assert len(asked) == 3


def test_the_clouds_choices_tell_which_proposals_to_prefer() -> None:
    acceptance = AcceptanceRate()
    assert acceptance.proposal_probability(0.9) > acceptance.probability(0.5)
    for _ in range(50):
        acceptance.update_proposal(0.9, accepted=False)
    assert acceptance.proposal_probability(0.9) < 0.2 < acceptance.proposal_probability(0.5)
    assert acceptance.probability(0.9) > 0.8
