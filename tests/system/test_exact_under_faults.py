"""The default model over a real mosquitto, in verified mode, with a fault in each second turn.

    pytest tests/system/test_exact_under_faults.py --answers 40 --answer-tokens 96

runs it at full length; without the options it is short.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import pytest

from benchmarks.fidelity import PROMPTS
from benchmarks.whole_model import TIE, WholeModel
from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.protocol.modes import FALLBACK, Mode
from fleet.protocol.prompt import ChatMessage, PromptRequest
from fleet.utils.prompt_file import read_prompts
from tests.system.judge import FEW_TOKENS, next_turn
from tests.system.process_fleet import DEVICE, FIRST, ProcessFleet, process_fleet

pytestmark = [pytest.mark.real_model, pytest.mark.mosquitto]

AWAY_S = 2.0


def reset_the_device(fleet: ProcessFleet) -> None:
    fleet.links[DEVICE].reset()


def freeze_the_device(fleet: ProcessFleet) -> None:
    fleet.links[DEVICE].freeze()
    time.sleep(AWAY_S)
    fleet.links[DEVICE].heal()


def reset_the_worker(fleet: ProcessFleet) -> None:
    fleet.links[FIRST].reset()


def kill_the_worker(fleet: ProcessFleet) -> None:
    fleet.kill(FIRST)
    fleet.worker_process()


def kill_the_broker(fleet: ProcessFleet) -> None:
    fleet.broker.kill()
    fleet.broker.wait()
    fleet.start_broker()


FAULTS: tuple[Callable[[ProcessFleet], None], ...] = (
    reset_the_device,
    kill_the_worker,
    freeze_the_device,
    reset_the_worker,
    kill_the_broker,
)


@contextmanager
def real_fleet(folder: Path, bundle: Bundle) -> Iterator[ProcessFleet]:
    """A worker's process and a device."""
    config = AgentConfig(num_threads=1, assist_deadline_ms=1500)
    with process_fleet("mosquitto", folder, bundle) as fleet:
        fleet.worker_process()
        with fleet.device(config=config):
            yield fleet


@pytest.mark.timeout(7200)
def test_every_answer_is_the_whole_models_though_each_meets_a_fault(
    real_bundle: Bundle, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    num_answers = pytestconfig.getoption("answers")
    num_tokens = pytestconfig.getoption("answer_tokens")
    prompts = read_prompts(PROMPTS)[:num_answers]
    assert len(prompts) == num_answers
    answers = []
    turns = []
    with real_fleet(tmp_path, real_bundle) as fleet:
        for prompt, fault in zip(prompts, cycle(FAULTS)):  # the faults come round
            question = (ChatMessage("user", prompt),)
            first = PromptRequest(messages=question, mode=Mode.VERIFIED, max_new_tokens=FEW_TOKENS)
            asked = next_turn(first, fleet.ask(first), "Tell me more.", num_tokens)
            assert asked.messages
            turns.append(asked.messages)
            answers.append(fleet.ask(asked, fault=lambda fault=fault: fault(fleet)))  # type: ignore[misc]
            print(f"{fault.__name__}: {len(answers[-1].token_ids)} tokens, {answers[-1].last.note}")
        fleet.check_counts()
    whole = WholeModel(real_bundle, num_threads=1)
    num_differing = 0
    for messages, answer in zip(turns, answers, strict=True):
        assert FALLBACK not in answer.sources
        assert len(answer.token_ids) == num_tokens or answer.last.finish_reason == "stop"
        for difference in whole.differences(messages, answer.token_ids):
            print(f"{messages[0].content!r}: {difference}")
            assert difference.gap <= TIE
            num_differing += 1
    num_tokens = sum(len(answer.token_ids) for answer in answers)
    print(f"{num_tokens} tokens, {num_differing} not the whole model's, each in a tie")
    noticed = [answer for answer in answers if answer.last.note]
    assert len(noticed) >= num_answers // 2, "the faults came too late to be noticed"
