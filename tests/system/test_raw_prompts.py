"""A base model without a chat template: exported, and its texts continued by both halves."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.whole_model import WholeModel
from edge_agent.config import AgentConfig
from fleet.bundles.manifest import CHAT_TEMPLATE, Bundle, write_manifest
from fleet.cli.chat import Conversation, check_can_chat
from fleet.cli.demo import default_prompts
from fleet.cli.online_device import OnlineDevice
from fleet.errors import ConfigError, PromptError, RefusedPromptError
from fleet.protocol.modes import CLOUD, Mode
from fleet.protocol.prompt import ChatMessage, PromptRequest
from fleet.utils.console import new_console
from onnx_export.bundle import export_bundle
from onnx_export.config import ExportConfig
from tests.fleet.bundles.test_manifest import manifest
from tests.onnx_export.traces import shared_traces
from tests.system.memory_fleet import DEVICE, MemoryFleet, memory_fleet
from tests.tiny import make_tiny_checkpoint, make_tiny_tokenizer

TEXT = "The capital of France is"
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def base_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokenizer begins each text with a token and has no chat template."""
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("base") / "tiny-base")
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    start = ("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[start]
    )
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def export_lines() -> list[str]:
    """The lines that the export of the bundle reports."""
    return []


@pytest.fixture(scope="module")
def raw_bundle(base_checkpoint: Path, export_lines: list[str]) -> Bundle:
    config = ExportConfig(
        out=base_checkpoint.parent / "bundle",
        exits=(1,),
        model=str(base_checkpoint),
        exit_head="shared",
        quantization="fp32",
    )
    with shared_traces():
        export_bundle(config, export_lines.append)
    return Bundle.load(config.out)


@pytest.fixture(scope="module")
def fleet(raw_bundle: Bundle) -> Iterator[MemoryFleet]:
    with memory_fleet() as fleet:
        fleet.start_worker(raw_bundle)
        fleet.start_device(raw_bundle, AgentConfig(num_threads=1))
        yield fleet


def continuation(checkpoint: Path, text: str) -> tuple[int, list[int]]:
    """Return the number of tokens of a text in transformers, and those that it continues with."""
    ids = AutoTokenizer.from_pretrained(checkpoint)(text, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        whole = model.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False)
    return ids.shape[1], whole[0, ids.shape[1] :].tolist()


def test_the_export_reports_that_devices_continue_texts(
    raw_bundle: Bundle, export_lines: list[str]
) -> None:
    assert raw_bundle.manifest.prompt_format == "raw"
    assert "no chat template: devices continue the text of a prompt as it is" in export_lines


@pytest.mark.parametrize("mode", [Mode.COLLABORATIVE, Mode.VERIFIED])
def test_a_text_is_continued_as_by_transformers(
    fleet: MemoryFleet, base_checkpoint: Path, mode: Mode
) -> None:
    num_prompt_tokens, expected = continuation(base_checkpoint, TEXT)
    request = PromptRequest(prompt=TEXT, threshold=1.0, mode=mode, max_new_tokens=NUM_TOKENS)
    answer = fleet.ask(request)
    assert answer.last.usage is not None
    assert answer.last.usage.prompt_tokens == num_prompt_tokens
    assert answer.sources[CLOUD] > 0
    num_tokens = len(answer.token_ids)
    assert answer.token_ids == expected[:num_tokens]
    assert num_tokens == NUM_TOKENS or answer.last.finish_reason == "stop"


def test_the_whole_model_of_the_benchmarks_continues_the_text(
    raw_bundle: Bundle, base_checkpoint: Path
) -> None:
    answer = WholeModel(raw_bundle, num_threads=1).generate(TEXT, NUM_TOKENS)
    assert answer == continuation(base_checkpoint, TEXT)[1][: len(answer)]


def test_messages_are_refused_in_one_line_and_the_next_text_is_continued(
    fleet: MemoryFleet,
) -> None:
    messages = PromptRequest(messages=(ChatMessage("user", "hi"),), max_new_tokens=4)
    with pytest.raises(RefusedPromptError, match="has no chat template") as raised:
        fleet.ask(messages)
    assert raised.value.code == PromptError.code
    assert "\n" not in str(raised.value)
    assert fleet.ask(PromptRequest(prompt=TEXT, max_new_tokens=4)).last.done


def test_fleet_chat_refuses_a_model_without_a_template(
    fleet: MemoryFleet, raw_bundle: Bundle
) -> None:
    facts = raw_bundle.manifest
    unknown = OnlineDevice(DEVICE, fleet.client, facts.bundle_id)
    known = replace(unknown, model=facts.model.name, prompt_format=facts.prompt_format)
    with pytest.raises(ConfigError, match=r"no chat template .* use fleet prompt edge-1 'The"):
        check_can_chat(known)
    check_can_chat(unknown)  # of a bundle that is not known here
    screen = io.StringIO()
    console = new_console(file=screen, width=400)
    Conversation(console, fleet.client, DEVICE, PromptRequest(), []).handle("hello")
    assert "this model has no chat template" in screen.getvalue()


def test_the_demo_of_a_model_without_a_template_continues_texts(
    raw_bundle: Bundle, tmp_path: Path
) -> None:
    assert "The capital of France is" in default_prompts(raw_bundle.folder)
    write_manifest(tmp_path, manifest({CHAT_TEMPLATE: b""}))
    assert all(text.endswith(("?", ".")) for text in default_prompts(tmp_path))
