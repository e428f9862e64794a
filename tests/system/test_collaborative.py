"""Collaborative mode: confident tokens come from the exits, all others from the cloud."""

from __future__ import annotations

from collections import Counter

import pytest
from transformers import DynamicCache

from benchmarks.whole_model import WholeModel
from edge_agent.generation.decoder import Decoder
from fleet.graphs.cascade import Cascade
from fleet.protocol.messages import Sampling
from fleet.protocol.modes import CLOUD, exit_source
from fleet.protocol.prompt import ChatMessage, PromptRequest
from tests.conftest import MakeTinyBundle
from tests.system.memory_fleet import WAIT_S, memory_fleet

PROMPTS = ("How warm is it?", "Say something about rivers.", "0123456789 " * 8)
LAYOUTS = [((1,), 1), ((3,), 3), ((1, 3), 1), ((2, 3), 3)]
NUM_TOKENS = 32


def reference(whole: WholeModel, prompt: str, threshold: float) -> list[tuple[int, str]]:
    """Token by token, with nothing drafted: the first exit that is sure, else the whole model."""
    num_exits = len(whole.partition.manifest.exits)
    prompt_ids = whole.tokenizer.encode_chat([ChatMessage("user", prompt)])
    capacity = len(prompt_ids) + NUM_TOKENS
    decoder = Decoder(whole.partition, capacity, (threshold,) * num_exits, Sampling())
    cascade = Cascade(whole.partition, capacity)
    cache = DynamicCache()
    decoder.text += prompt_ids
    answer: list[tuple[int, str]] = []
    while len(answer) < NUM_TOKENS:
        choice = decoder.choose()
        logits = whole.logits(cascade, cache, decoder.text[cascade.num_tokens :])
        token = (
            (choice.token_id, exit_source(choice.exit_layer))
            if choice.is_confident
            else (int(logits.argmax()), CLOUD)
        )
        answer.append(token)
        decoder.text.append(token[0])
        if token[0] in whole.partition.manifest.model.eos_token_ids:
            break
    return answer


@pytest.mark.parametrize(("exits", "upload_layer"), LAYOUTS)
def test_every_token_is_that_of_the_first_sure_exit_or_the_clouds(
    make_tiny_bundle: MakeTinyBundle, exits: tuple[int, ...], upload_layer: int
) -> None:
    bundle = make_tiny_bundle(exits, upload_layer=upload_layer)
    sources = Counter[str]()
    whole = WholeModel(bundle, num_threads=1)
    with memory_fleet() as fleet:
        worker, _ = fleet.start_worker(bundle)
        fleet.start_device(bundle)
        for threshold in (0.04, 0.05, 0.06):
            for prompt in PROMPTS:
                answer = fleet.ask(
                    PromptRequest(prompt=prompt, threshold=threshold, max_new_tokens=NUM_TOKENS)
                )
                expected = reference(whole, prompt, threshold)
                said = [
                    (reply.token_id, reply.source)
                    for reply in answer.replies
                    if reply.token_id is not None
                ]
                assert said == expected
                sources.update(source for _, source in expected)
                report = fleet.reports.get(timeout=WAIT_S)
                assert report.assists <= report.sources.get(CLOUD, 0)
                assert (report.verifies, report.judged) == (0, 0)
        worker.engine.check_integrity()
    assert sources[CLOUD] > 0
    assert sources.total() > sources[CLOUD]
