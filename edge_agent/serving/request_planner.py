"""What one request needs, decided before any work: token ids, room for the answer, thresholds, memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from edge_agent.config import AgentConfig
from edge_agent.engine.cascade import Cascade
from edge_agent.engine.partition import Partition
from edge_agent.engine.tokenizer import ChatTokenizer
from edge_agent.generation.mode_policy import Targets
from fleet.errors import PromptError
from fleet.protocol.modes import DEFAULT_AGREEMENT, Mode
from fleet.protocol.prompt import PromptRequest

MB: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class RequestPlan:
    """A request that fits the device. `num_bytes` is the memory of its caches, `deadline_s` counts from its arrival.

    `config` are the settings of its whole answer. In a sample the cloud judges every token, as long as it is there.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    thresholds: tuple[float, ...]
    mode: Mode
    targets: Targets
    deadline_s: float
    num_bytes: int
    config: AgentConfig
    eos_token_ids: tuple[int, ...]
    is_sample: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether every token has to be the full model's."""
        return self.mode is Mode.VERIFIED or (
            self.mode is Mode.AUTO and self.targets.min_agreement == 1.0
        )

    @property
    def capacity(self) -> int:
        """Positions of prompt and answer together."""
        return len(self.prompt_ids) + self.max_new_tokens


class RequestPlanner:
    """Turns prompts into plans, or refuses them. `draw` gives numbers from [0, 1), by which samples are chosen."""

    def __init__(
        self,
        partition: Partition,
        tokenizer: ChatTokenizer,
        config: AgentConfig,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Raises PromptError when the configured thresholds do not fit the bundle's exits."""
        self._partition = partition
        self._tokenizer = tokenizer
        self._draw = draw
        self._max_positions = min(config.max_positions, partition.manifest.model.max_positions)
        self.follow(config)

    def follow(self, config: AgentConfig) -> None:
        """Plans by other settings from now on; raises PromptError, and changes nothing, as the constructor does."""
        self._fit(config.thresholds or self._partition.manifest.thresholds)
        self._config = config

    def plan(self, prompt: PromptRequest) -> RequestPlan:
        """Raises PromptError when thresholds, length or memory do not fit this device, whatever else it does."""
        config = self._config  # all by the same one, whatever is followed meanwhile
        prompt_ids = self._tokenizer.encode_chat(prompt.chat)
        max_new_tokens = self._room(len(prompt_ids), prompt.max_new_tokens, config.max_new_tokens)
        num_bytes = Cascade.num_bytes(self._partition, len(prompt_ids) + max_new_tokens)
        if num_bytes > config.cache_budget_mb * MB:
            raise PromptError(
                f"a prompt of {len(prompt_ids)} tokens and {max_new_tokens} new ones need {num_bytes / MB:.1f} MB of "
                f"caches; this device has {config.cache_budget_mb} MB for them (cache_budget_mb); send a shorter "
                "prompt or ask for fewer tokens"
            )
        mode = prompt.mode or config.mode
        deadline_s = (prompt.deadline_ms or config.answer_deadline_ms) / 1000
        may_sample = prompt.mode is None and mode is Mode.COLLABORATIVE
        return RequestPlan(
            prompt_ids=prompt_ids,
            max_new_tokens=max_new_tokens,
            thresholds=self._request_thresholds(prompt, config),
            mode=mode,
            targets=self._targets(prompt, config),
            deadline_s=deadline_s,
            num_bytes=num_bytes,
            config=config,
            eos_token_ids=() if prompt.ignore_eos else self._partition.manifest.model.eos_token_ids,
            is_sample=may_sample and self._draw() < config.agreement_sample,
        )

    def _targets(self, prompt: PromptRequest, config: AgentConfig) -> Targets:
        calibration = self._partition.manifest.calibration
        is_calibrated = (
            calibration
            and self._request_thresholds(prompt, config) == self._partition.manifest.thresholds
        )
        promised = calibration.target_agreement if calibration and is_calibrated else None
        agreement = config.min_agreement if prompt.min_agreement is None else prompt.min_agreement
        return Targets(
            config.target_tpot_ms if prompt.target_tpot_ms is None else prompt.target_tpot_ms,
            DEFAULT_AGREEMENT if agreement is None else agreement,
            config.max_offload_rate if prompt.max_offload_rate is None else prompt.max_offload_rate,
            promised,
        )

    def _room(self, num_prompt_tokens: int, wanted: int | None, at_most: int) -> int:
        room = self._max_positions - num_prompt_tokens
        if room < (wanted or 1):
            asked = f" and {wanted} new ones were asked for" if wanted else ""
            raise PromptError(
                f"the prompt has {num_prompt_tokens} tokens{asked}; this device holds {self._max_positions} positions "
                "for both; send a shorter prompt or ask for fewer tokens"
            )
        return wanted or min(at_most, room)

    def _request_thresholds(self, prompt: PromptRequest, config: AgentConfig) -> tuple[float, ...]:
        if prompt.thresholds is not None:
            return self._fit(prompt.thresholds)
        if prompt.threshold is not None:
            return (prompt.threshold,) * len(self._partition.manifest.exits)
        return config.thresholds or self._partition.manifest.thresholds

    def _fit(self, thresholds: tuple[float, ...]) -> tuple[float, ...]:
        exits = self._partition.manifest.exits
        if len(thresholds) != len(exits):
            raise PromptError(
                f"expected {len(exits)} thresholds, one for each of the exits {exits}, got {len(thresholds)}"
            )
        return thresholds
