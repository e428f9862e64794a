"""Auto mode in one answer: collaborative, standalone while the cloud is away, and back."""

from __future__ import annotations

import threading

from msgspec.structs import replace

from benchmarks.whole_model import WholeModel
from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.protocol.modes import CLOUD, FALLBACK, Mode
from fleet.protocol.prompt import PromptRequest
from fleet.transport.in_memory import InMemoryTransport
from tests.system.memory_fleet import DEVICE, WAIT_S, Answer, memory_fleet

NUM_TOKENS = 400
AWAY = 60
BACK = 160
PROMPT = PromptRequest(
    prompt="Tell me about the sea.",
    mode=Mode.AUTO,
    threshold=0.06,
    min_agreement=0.5,
    max_new_tokens=NUM_TOKENS,
)


def ask(
    bundle: Bundle, prompt: PromptRequest, config: AgentConfig
) -> tuple[Answer, InMemoryTransport]:
    with memory_fleet() as fleet:
        _, cloud = fleet.start_worker(bundle)
        fleet.start_device(bundle, config)
        answer = Answer()
        for reply in fleet.client.ask(DEVICE, prompt, timeout_s=WAIT_S):
            answer.replies.append(reply)
            if reply.seq == AWAY:
                cloud.drop()
            if reply.seq == BACK:
                cloud.restore()
    return answer, cloud


def test_an_answer_goes_on_alone_while_the_cloud_is_away_and_comes_back_to_it(
    tiny_bundle: Bundle,
) -> None:
    answer, _ = ask(tiny_bundle, PROMPT, AgentConfig(num_threads=1))
    assert answer.last.error is None
    assert answer.last.usage is not None
    sources = [reply.source for reply in answer.replies if reply.token_id is not None]
    assert len(sources) == NUM_TOKENS
    assert CLOUD in sources[:AWAY]
    assert FALLBACK in sources[AWAY:]
    last_alone = max(i for i, source in enumerate(sources) if source == FALLBACK)
    assert CLOUD in sources[last_alone:]
    reasons = [(switch.mode, switch.reason) for switch in answer.last.usage.switches]
    gone = (Mode.STANDALONE, "the link is down")
    back = (Mode.COLLABORATIVE, "the link is back")
    assert reasons.index(gone) < reasons.index(back)


def test_who_asks_for_nothing_but_the_full_models_tokens_gets_them_also_after_an_outage(
    tiny_bundle: Bundle,
) -> None:
    prompt = replace(PROMPT, min_agreement=1.0)
    with memory_fleet() as fleet:
        _, cloud = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        answer = Answer()
        for reply in fleet.client.ask(DEVICE, prompt, timeout_s=WAIT_S):
            answer.replies.append(reply)
            if reply.seq == AWAY:
                cloud.drop()
                threading.Timer(0.5, cloud.restore).start()
    assert answer.last.error is None
    assert FALLBACK not in answer.sources
    assert answer.token_ids == WholeModel(tiny_bundle, num_threads=1).generate(
        "Tell me about the sea.", NUM_TOKENS
    )
