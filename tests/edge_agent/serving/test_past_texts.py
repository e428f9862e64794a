"""Past texts of a device's apps and triggers: kept when an answer ends, and saved at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_agent.config import AgentConfig, TableStorage
from edge_agent.generation.suffix_tables import MAX_TABLES, SuffixTables
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.errors import RefusedPromptError
from fleet.protocol import topics
from fleet.protocol.modes import LOOKUP, Mode
from fleet.protocol.prompt import PromptRequest
from fleet.protocol.triggers import Trigger
from fleet.transport.prompt_client import PromptClient
from tests.brokers import wait_until
from tests.conftest import MakeTinyBundle
from tests.system.memory_fleet import APP, DEVICE, WAIT_S, MemoryFleet, memory_fleet

TRIGGER = Trigger(name="heat", events=f"{APP}/warmth", template="{celsius} degrees")
CONFIG = AgentConfig(
    num_threads=1, mode=Mode.STANDALONE, max_new_tokens=4, triggers=(TRIGGER,), thresholds=(1, 1)
)
PROMPT = PromptRequest(prompt="How warm is it?")
MOST_ANSWERS = 20


def answer_both(fleet: MemoryFleet) -> list[int]:
    """Send a prompt and an event; return the tokens of the prompt's answer."""
    token_ids = fleet.ask(PROMPT).token_ids
    fleet.watcher.publish(topics.app_event(APP, "warmth"), b'{"celsius": 31}', qos=1)
    for _ in range(2):
        fleet.reports.get(timeout=WAIT_S)
    return token_ids


def run_agent(bundle: Bundle, folder: Path, storage: TableStorage) -> list[int]:
    config = replace(CONFIG, suffix_tables=storage)
    with memory_fleet() as fleet:
        transport = fleet.connect(DEVICE)
        with Agent(transport, bundle, config, tables_folder=folder):
            return answer_both(fleet)


def test_texts_are_saved_for_each_app_and_trigger(tiny_bundle: Bundle, tmp_path: Path) -> None:
    token_ids = run_agent(tiny_bundle, tmp_path, "disk")
    tables = SuffixTables.for_bundle(tiny_bundle.manifest, tmp_path, "disk")
    assert [*tables.of(APP).token_ids][-5:-1] == token_ids
    assert len(tables.of(APP, TRIGGER.name).token_ids) > len(token_ids)


def test_tables_of_apps_whose_answers_fail_are_dropped_as_well(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        agent, _ = fleet.start_device(tiny_bundle, CONFIG)
        late = replace(PROMPT, deadline_ms=1)
        for number in range(MAX_TABLES + 4):
            client = PromptClient(fleet.connect(f"late-{number}"))
            with pytest.raises(RefusedPromptError, match="deadline"):
                list(client.ask(DEVICE, late, timeout_s=WAIT_S))
        tables = vars(vars(agent)["_tables"])["_tables"]
        wait_until(lambda: len(tables) == MAX_TABLES, "the device drops the oldest tables")


@pytest.mark.parametrize("storage", ["memory", "off"])
def test_no_text_reaches_the_disk_if_the_device_may_not_keep_it(
    tiny_bundle: Bundle, tmp_path: Path, storage: TableStorage
) -> None:
    run_agent(tiny_bundle, tmp_path, storage)
    assert list(tmp_path.iterdir()) == []


def test_a_repeated_prompt_drafts_its_answer_and_gets_the_same_verified_one(
    make_tiny_bundle: MakeTinyBundle,
) -> None:
    """Whether a proposal pays depends on measured times, so the prompt is repeated."""
    bundle = make_tiny_bundle((1, 2), None, None, "balanced")
    config = AgentConfig(num_threads=1, mode=Mode.VERIFIED, max_new_tokens=24)
    with memory_fleet() as fleet:
        fleet.start_worker(bundle)
        fleet.start_device(bundle, config)
        answers = [fleet.ask(PROMPT)]
        while LOOKUP not in answers[-1].sources and len(answers) < MOST_ANSWERS:
            answers.append(fleet.ask(PROMPT))
    assert LOOKUP in answers[-1].sources
    assert all(answer.token_ids == answers[0].token_ids for answer in answers)


def test_a_kept_proposal_does_not_hide_the_exit_from_the_sample(
    make_tiny_bundle: MakeTinyBundle,
) -> None:
    bundle = make_tiny_bundle((1, 2), None, None, "balanced")
    config = AgentConfig(num_threads=1, max_new_tokens=24, agreement_sample=1.0, thresholds=(0, 0))
    with memory_fleet() as fleet:
        fleet.start_worker(bundle)
        fleet.start_device(bundle, config)
        answers = [fleet.ask(PROMPT)]
        while LOOKUP not in answers[-1].sources and len(answers) < MOST_ANSWERS:
            answers.append(fleet.ask(PROMPT))
        reports = [fleet.reports.get(timeout=WAIT_S) for _ in answers]
    assert LOOKUP in answers[-1].sources
    counts = {(report.tokens, report.judged, report.agreed) for report in reports}
    assert len(counts) == 1
    ((num_tokens, num_judged, num_agreed),) = counts
    assert num_judged == num_tokens > num_agreed
