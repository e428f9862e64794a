"""Values that Python code gives, and errors of fields with choices."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cloud_broker_worker.worker.config import WorkerConfig
from edge_agent.config import AgentConfig
from fleet.errors import ConfigError, PromptError
from fleet.protocol.desired_config import parse_settings
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import parse_prompt
from fleet.utils.text_files import decode_json
from fleet.utils.validation import validated


def test_a_text_becomes_the_mode_that_it_names() -> None:
    config = validated(AgentConfig(mode="standalone"))  # type: ignore[arg-type]
    assert config.mode is Mode.STANDALONE


def test_a_valid_configuration_is_unchanged() -> None:
    for config in (AgentConfig(thresholds=(0.5, 1.0), num_threads=1), WorkerConfig()):
        assert validated(config) == config


def test_a_value_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"AgentConfig: .*max_positions"):
        validated(AgentConfig(max_positions=1))
    with pytest.raises(ConfigError, match=r"WorkerConfig: .*float32, int4, int8"):
        validated(WorkerConfig(weights="float8"))  # type: ignore[arg-type]


def test_an_error_of_a_mode_names_all_modes() -> None:
    reasons = []
    for refused in (
        lambda: parse_settings({"mode": "fast"}),
        lambda: parse_prompt(b'{"prompt": "hi", "mode": "fast"}'),
        lambda: decode_json(b'{"mode": "fast"}', "agent.json", AgentConfig),
    ):
        with pytest.raises((ConfigError, PromptError)) as caught:
            refused()
        reasons.append(str(caught.value))
    for reason in reasons:
        assert all(mode in reason.split("expected one of ")[1] for mode in Mode)


def test_an_error_of_an_optional_field_with_choices_names_them() -> None:
    with pytest.raises(ConfigError, match="expected one of float16, int8, got 'int4'"):
        parse_settings({"upload_dtype": "int4"})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"temperature": "hot"}, "temperature: expected a number from 0 to 5, got 'hot'"),
        ({"top_p": 0}, "top_p: expected a number above 0 and at most 1, such as 0.8, got 0"),
        ({"stop": "a"}, "stop: expected a list, each of it a text, got 'a'"),
        ({"tools": {}}, "tools: expected a list, each of it an object, got {}"),
        ({"messages": "hi"}, "messages: expected a list, each of it an object, got 'hi'"),
        ({"prompt": 5}, "prompt: expected a text, got 5"),
        ({"seed": 1.5}, "seed: expected a whole number from 0 to 9,223,372,036,854,775,807, got 1"),
        ({"mode": None, "n": None}, "n: expected a whole number from 1 to 4, got null"),
        ({"stop": [""]}, "stop[0]: expected a text of at least 1 character"),
        ({"stop": ["a"] * 50}, "stop: expected a list of at most 4 items"),
        ({"logit_bias": {"-1": 1}}, "logit_bias: expected whole numbers as keys"),
        ({"logit_bias": {"1": 101}}, "logit_bias[...]: expected a number from -100 to 100"),
        ({"logit_bias": {"1": "x"}}, "logit_bias[...]: expected a number from -100 to 100"),
    ],
)
def test_an_error_of_a_number_has_its_range_and_the_value(
    fields: dict[str, object], reason: str
) -> None:
    with pytest.raises(PromptError) as caught:
        parse_prompt(msgspec.json.encode({"prompt": "hi"} | fields))
    assert reason in str(caught.value)


def test_an_error_in_a_file_has_the_kind_of_the_value() -> None:
    with pytest.raises(ConfigError, match=r"num_threads: expected .*, got a text$"):
        decode_json(b'{"num_threads": "two"}', "agent.json", AgentConfig)


def test_only_an_unknown_setting_of_a_device_lists_the_known_ones(tmp_path: Path) -> None:
    for content, is_listed in (
        (b'{"treshold": 1}', True),
        (b'{"num_threads": "two"}', False),
        (b'{"triggers": [{"nam": "x"}]}', False),
    ):
        (tmp_path / "agent.json").write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            AgentConfig.load(tmp_path)
        assert ("known settings are" in str(caught.value)) is is_listed
