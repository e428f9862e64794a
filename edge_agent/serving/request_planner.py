"""The plan of a request, made before any work: token ids, length limit, thresholds and memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from edge_agent.config import AgentConfig
from edge_agent.engine.tokenizer import ChatTokenizer
from edge_agent.generation.mode_policy import Targets
from fleet.errors import ConfigError, DeadlineError, PromptError
from fleet.exits.thresholds import OFF
from fleet.graphs.cascade import Cascade
from fleet.graphs.partition import Partition
from fleet.protocol.modes import DEFAULT_AGREEMENT, Mode
from fleet.protocol.prompt import ChatMessage, PromptRequest
from fleet.protocol.types import MAX_DEADLINE_MS

MB: Final = 1 << 20
MAX_LOGPROBS: Final = 8192  # in one reply; each takes about 70 bytes
MAX_WAIT_S: Final = MAX_DEADLINE_MS / 1000 + 10.0
"""Time limit of a wait for a reply in this process; the longest answer ends before."""


@dataclass(frozen=True, kw_only=True)
class RequestPlan:
    """The plan of a request that fits the device.

    `num_bytes` is the memory of the caches. `deadline_s` counts from the arrival of the request.
    `partition` and `config` are those of the whole response. `thresholds` has one for each exit of
    the bundle. In a sample the cloud verifies every token while the cloud is reachable.
    """

    partition: Partition
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
        """Whether every token must be the full model's."""
        return self.mode is Mode.VERIFIED or (
            self.mode is Mode.AUTO and self.targets.min_agreement == 1.0
        )

    @property
    def applied_mode(self) -> Mode:
        """The mode of generation. A device that holds the whole model answers alone."""
        if self.partition.is_whole:
            return Mode.STANDALONE
        return Mode.VERIFIED if self.is_exact else self.mode

    @property
    def exit_thresholds(self) -> tuple[float, ...]:
        """The threshold of each exit of the partition. Only the last exit of a whole model is
        exact.
        """
        num_exits = len(self.partition.exits)
        is_last_only = self.is_exact and self.partition.is_whole
        return (OFF,) * num_exits if is_last_only else self.thresholds[:num_exits]

    @property
    def capacity(self) -> int:
        """Number of positions of prompt and response together."""
        return len(self.prompt_ids) + self.max_new_tokens


class RequestPlanner:
    """The planner of requests. `draw` returns numbers from [0, 1), which choose the samples."""

    def __init__(
        self,
        partition: Partition,
        tokenizer: ChatTokenizer,
        config: AgentConfig,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Store the limits.

        Raises:
            PromptError: the configured thresholds do not fit the bundle's exits.
        """
        self.partition = partition
        self._manifest = partition.manifest
        self._tokenizer = tokenizer
        self._draw = draw
        self.max_positions = min(config.max_positions, partition.manifest.model.max_positions)
        self.follow(config)

    def follow(self, config: AgentConfig) -> None:
        """Use `config` from the next plan on, and load or drop blocks for another split.

        Raises:
            ConfigError, PromptError: it does not fit the bundle; the present one is kept.
            BundleError: a block cannot be loaded; the present one is kept.
        """
        self._check_thresholds(config.thresholds or self._manifest.thresholds)
        self._check_system_prompt(config.system_prompt)
        split = self._manifest.split_of(config.split)
        if split != self.partition.split:
            self.partition = self.partition.move(split)
        self._config = config

    def _check_system_prompt(self, text: str) -> None:
        """Check that a conversation can begin with the device's system prompt."""
        if not text:
            return
        messages = (ChatMessage("system", text), ChatMessage("user", "?"))
        try:
            num_tokens = len(self._tokenizer.encode_chat(messages))
        except PromptError as error:
            raise ConfigError(f"system_prompt: {error}; unset it, or set another one") from None
        if num_tokens >= self.max_positions:
            raise ConfigError(
                f"expected a system_prompt that leaves room in {self.max_positions} positions, got "
                f"{num_tokens} tokens; shorten it"
            )

    def plan(self, prompt: PromptRequest) -> RequestPlan:
        """Plan a request.

        Raises:
            PromptError: thresholds, length or memory do not fit this device even when it is idle.
        """
        config = self._config  # one of each for the whole plan: `follow` may replace them
        partition = self.partition
        prompt_ids = self._prompt_ids(prompt)
        self._check_biases(prompt)
        if prompt.constraint:
            self._tokenizer.grammars.constrain(prompt.constraint, len(prompt_ids))
        max_new_tokens = self._max_new_tokens(
            len(prompt_ids), prompt.max_new_tokens, config.max_new_tokens
        )
        _check_num_logprobs(prompt, max_new_tokens)
        num_bytes = _cache_bytes(partition, len(prompt_ids), max_new_tokens, config.cache_budget_mb)
        mode = prompt.mode or config.mode
        is_shared = mode is Mode.COLLABORATIVE and not partition.is_whole
        may_sample = prompt.mode is None and is_shared
        return RequestPlan(
            partition=partition,
            prompt_ids=prompt_ids,
            max_new_tokens=max_new_tokens,
            thresholds=self._request_thresholds(prompt, config),
            mode=mode,
            targets=self._targets(prompt, config),
            deadline_s=answer_deadline_s(prompt, config),
            num_bytes=num_bytes,
            config=config,
            eos_token_ids=() if prompt.ignore_eos else self._manifest.model.eos_token_ids,
            is_sample=may_sample and self._draw() < config.agreement_sample,
        )

    def _prompt_ids(self, prompt: PromptRequest) -> list[int]:
        prompt_ids = self._tokenizer.encode(prompt, self.max_positions)
        num_known = self.partition.num_token_ids
        if max(prompt_ids) >= num_known:
            raise PromptError(
                f"the prompt has the token id {max(prompt_ids)}, and this model has embeddings for "
                f"{num_known} ids; leave that token out, or export the bundle again"
            )
        return prompt_ids

    def _check_biases(self, prompt: PromptRequest) -> None:
        vocab_size = self._manifest.model.vocab_size
        for token_id in map(int, prompt.logit_bias or ()):
            if token_id >= vocab_size:
                raise PromptError(
                    f"expected token ids below {vocab_size} in 'logit_bias', got {token_id}; "
                    "use ids of this model's tokenizer"
                )

    def _targets(self, prompt: PromptRequest, config: AgentConfig) -> Targets:
        manifest = self._manifest
        calibration = manifest.calibration
        promised = None
        if calibration and self._request_thresholds(prompt, config) == manifest.thresholds:
            promised = calibration.target_agreement
        agreement = _first_given(prompt.min_agreement, config.min_agreement)
        return Targets(
            _first_given(prompt.target_tpot_ms, config.target_tpot_ms),
            DEFAULT_AGREEMENT if agreement is None else agreement,
            _first_given(prompt.max_offload_rate, config.max_offload_rate),
            promised,
        )

    def _max_new_tokens(self, num_prompt_tokens: int, requested: int | None, default: int) -> int:
        available = self.max_positions - num_prompt_tokens
        if available < (requested or 1):
            request = f" and {requested} new ones are requested" if requested else ""
            raise PromptError(
                f"the prompt has {num_prompt_tokens} tokens{request}; "
                f"this device holds {self.max_positions} positions for both; "
                "send a shorter prompt or ask for fewer tokens"
            )
        return requested or min(default, available)

    def _request_thresholds(self, prompt: PromptRequest, config: AgentConfig) -> tuple[float, ...]:
        if prompt.thresholds is not None:
            return self._check_thresholds(prompt.thresholds)
        if prompt.threshold is not None:
            return (prompt.threshold,) * len(self._manifest.exits)
        return config.thresholds or self._manifest.thresholds

    def _check_thresholds(self, thresholds: tuple[float, ...]) -> tuple[float, ...]:
        exits = self._manifest.exits
        if len(thresholds) != len(exits):
            expected = f"expected {len(exits)} thresholds, one for each of the exits {exits}"
            raise PromptError(f"{expected}, got {len(thresholds)}")
        return thresholds


def _check_num_logprobs(prompt: PromptRequest, max_new_tokens: int) -> None:
    """Check that the log-probabilities of an answer in one reply fit into it."""
    num_logprobs = prompt.n * max_new_tokens * (prompt.top_logprobs + 1)
    if prompt.logprobs and not prompt.stream and num_logprobs > MAX_LOGPROBS:
        raise PromptError(
            f"expected at most {MAX_LOGPROBS} log-probabilities in one reply, got {num_logprobs}: "
            f"{prompt.n * max_new_tokens} tokens with {prompt.top_logprobs} best ones each; "
            "ask for fewer, or with 'stream'"
        )


def answer_deadline_s(prompt: PromptRequest, config: AgentConfig) -> float:
    """Return the time for a response: the app's, but at most the operator's."""
    limit_ms = config.answer_deadline_ms
    return min(prompt.deadline_ms or limit_ms, limit_ms) / 1000


def late_answer() -> DeadlineError:
    """Return the error of an answer whose next reply did not come within `MAX_WAIT_S`."""
    return DeadlineError("the answer takes too long; ask for fewer tokens")


def _cache_bytes(
    partition: Partition, num_prompt_tokens: int, max_new_tokens: int, budget_mb: int
) -> int:
    num_bytes = Cascade.num_bytes(partition, num_prompt_tokens + max_new_tokens)
    if num_bytes > budget_mb * MB:
        raise PromptError(
            f"a prompt of {num_prompt_tokens} tokens and {max_new_tokens} new ones need "
            f"{num_bytes / MB:.1f} MB of caches; this device has {budget_mb} MB for them "
            "(cache_budget_mb); send a shorter prompt or ask for fewer tokens"
        )
    return num_bytes


def _first_given(requested: float | None, configured: float | None) -> float | None:
    return configured if requested is None else requested
