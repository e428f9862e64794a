"""The settings of one device with their defaults, read from `agent.json` in its identity folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from fleet.errors import ConfigError
from fleet.protocol.desired_config import Settings, UploadDtype, UploadPrompt
from fleet.protocol.messages import MAX_DRAFT
from fleet.protocol.modes import Mode
from fleet.protocol.triggers import Triggers, check_triggers
from fleet.protocol.types import (
    DeadlineMs,
    Penalty,
    Provider,
    RepetitionPenalty,
    Share,
    Split,
    SystemPrompt,
    TargetTpotMs,
    Temperature,
    Threshold,
    TopK,
    TopP,
)
from fleet.utils.text_files import decode_json
from fleet.utils.validation import is_unknown_field

CONFIG_FILE: Final = "agent.json"

TableStorage = Literal["disk", "memory", "off"]


LOCKABLE: Final = tuple(sorted({*Settings.__struct_fields__} - {"bundle", "software", "threshold"}))


class AgentConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The settings that an operator may change on a device.

    Empty `thresholds` mean those of the bundle. The settings from `temperature` to `system_prompt`
    are for requests that leave them out; an empty `system_prompt` is none. `split` is the number of
    layers that the device holds, or ``auto`` for the bundle's own. `max_queued_requests` includes
    the active requests. `max_kept_reports` is the number of reports that wait on disk for the
    collector before the oldest are merged. `reuse_share` is the share of `cache_budget_mb` for the
    caches of earlier answers; with 0, each prompt begins afresh. `agreement_sample` is the share of
    collaborative responses whose tokens are also verified by the cloud. `suffix_tables` is the
    place of the past texts of each app, from which the device proposes tokens. `update_timeout_s`
    is the time within which a new version of the device's software has to confirm itself. `locked`
    names settings that the fleet's configuration does not change.
    """

    mode: Mode = Mode.COLLABORATIVE
    thresholds: tuple[Threshold, ...] = ()
    provider: Provider = "auto"
    num_threads: Annotated[int, Meta(ge=1, le=256)] = min(4, os.cpu_count() or 1)
    max_positions: Annotated[int, Meta(ge=16, le=1 << 20)] = 2048
    max_new_tokens: Annotated[int, Meta(ge=1)] = 128
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: Share = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    system_prompt: SystemPrompt = ""
    max_concurrent_requests: Annotated[int, Meta(ge=1, le=64)] = 4
    max_queued_requests: Annotated[int, Meta(ge=1, le=1000)] = 8
    max_kept_reports: Annotated[int, Meta(ge=256, le=1 << 20)] = 10_000
    cache_budget_mb: Annotated[int, Meta(ge=1, le=1 << 20)] = 512
    reuse_share: Share = 0.1
    assist_deadline_ms: DeadlineMs = 3000
    answer_deadline_ms: DeadlineMs = 300_000
    target_tpot_ms: TargetTpotMs | None = None
    min_agreement: Share | None = None
    max_offload_rate: Share | None = None
    upload_dtype: UploadDtype = "float16"
    upload_prompt: UploadPrompt = "hidden"
    split: Split = "auto"
    max_draft: Annotated[int, Meta(ge=1, le=MAX_DRAFT)] = 32
    agreement_sample: Share = 0.0
    suffix_tables: TableStorage = "disk"
    triggers: Triggers = ()
    update_timeout_s: Annotated[float, Meta(gt=0, le=86_400)] = 300.0
    locked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check triggers and locks. A decoder reports the ValueError in its own error."""
        check_triggers(self.triggers)
        unknown = sorted(set(self.locked) - set(LOCKABLE))
        if unknown:
            raise ValueError(f"cannot lock {unknown[0]!r}; expected some of {', '.join(LOCKABLE)}")

    @property
    def max_at_once(self) -> int:
        """The number of requests that are answered at a time."""
        return min(self.max_concurrent_requests, self.max_queued_requests)

    @classmethod
    def load(cls, folder: Path) -> AgentConfig:
        """Load the settings in `folder`, or the defaults if it has no `agent.json`.

        Raises:
            ConfigError: the file is not JSON, or has a key that is unknown or out of range.
            OSError: the file cannot be read.
        """
        path = folder / CONFIG_FILE
        if not os.path.lexists(path):  # a link that leads nowhere is an error
            return cls()
        try:
            config: AgentConfig = decode_json(path.read_bytes(), str(path), cls)
        except ConfigError as error:
            if not is_unknown_field(str(error)):
                raise
            known = ", ".join(cls.__struct_fields__)
            raise ConfigError(f"{error}; known settings are {known}") from None
        return config
