"""Modes, and the sources of tokens."""

import pytest

from fleet.errors import ConfigError
from fleet.exits.exit_policy import check_threshold, exit_emits
from fleet.protocol.modes import Mode, exit_source, offload_rate, parse_mode


@pytest.mark.parametrize(
    ("confidence", "threshold", "emits"),
    [
        (0.79, 0.8, False),
        (0.8, 0.8, True),
        (0.81, 0.8, True),
        (0.0, 0.0, True),
        (1.0, 1.0, False),
        (0.999, 1.0, False),
        (float("nan"), 0.5, False),
    ],
)
def test_an_exit_emits_from_its_threshold_on_and_never_at_a_threshold_of_one(
    confidence: float, threshold: float, emits: bool
) -> None:
    assert exit_emits(confidence, threshold) is emits


@pytest.mark.parametrize("mode", Mode)
def test_a_mode_is_known_by_its_name(mode: Mode) -> None:
    assert parse_mode(mode.value) is mode


def test_an_unknown_mode_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown mode 'cloudy': expected one of standalone, collaborative"
    ):
        parse_mode("cloudy")


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_threshold_from_zero_to_one_is_kept(value: float) -> None:
    assert check_threshold(value) == value


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_any_other_threshold_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="expected a number from 0 to 1"):
        check_threshold(value)


def test_a_source_names_its_exit_layer() -> None:
    assert exit_source(8) == "exit:8"


@pytest.mark.parametrize(
    ("sources", "rate"),
    [
        ({}, 0.0),
        ({"cloud": 0}, 0.0),
        ({"exit:8": 3}, 0.0),
        ({"exit:8": 1, "exit:15": 1, "cloud": 1, "fallback": 1}, 0.25),
        ({"cloud": 5}, 1.0),
    ],
)
def test_the_offload_rate_is_the_share_of_the_cloud_in_all_tokens(
    sources: dict[str, int], rate: float
) -> None:
    assert offload_rate(sources) == rate
