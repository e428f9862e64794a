"""A device's desired configuration: settings of the fleet, of its group and of itself, merged."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from fleet.errors import ConfigError, DecodeError, OversizedError
from fleet.protocol.messages import MAX_DRAFT
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import SamplingOptions
from fleet.protocol.triggers import Triggers, check_triggers
from fleet.protocol.types import (
    Amount,
    DeadlineMs,
    Id,
    MaxNewTokens,
    Share,
    SoftwareVersion,
    Split,
    SystemPrompt,
    TargetTpotMs,
    Threshold,
)
from fleet.utils.validation import JSON_ERRORS, describe_error, is_unknown_field

MAX_DESIRED_BYTES: Final = 64 * 1024
MAX_SETTINGS_BYTES: Final = 60 * 1024  # leaves room for the small settings of other scopes
AUTO: Final = "auto"
UploadDtype = Literal["float16", "int8"]
UploadPrompt = Literal["hidden", "tokens", "auto"]


class Settings(
    SamplingOptions, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """Values that can be changed while a device serves.

    None leaves a value to the next wider scope.

    Those of :class:`SamplingOptions` and `system_prompt` are for requests that leave them out; an
    empty `system_prompt` is none. `bundle` is the id of the desired bundle. `split` is the number
    of layers that the device holds, one of its bundle's, or ``auto`` for the bundle's own.
    With `upload_prompt` ``tokens`` the prompt is uploaded as token ids to workers that accept them,
    with ``auto`` if that is faster.
    `agreement_sample` is the share of collaborative generations whose tokens are also verified by
    the cloud, to measure whether the exits still agree with it. `software` is the desired version
    of the device's software; a message to a device has it in `DesiredConfig` instead.
    """

    mode: Mode | None = None
    threshold: Threshold | None = None
    thresholds: tuple[Threshold, ...] | None = None
    target_tpot_ms: TargetTpotMs | None = None
    min_agreement: Share | None = None
    max_offload_rate: Share | None = None
    assist_deadline_ms: DeadlineMs | None = None
    answer_deadline_ms: DeadlineMs | None = None
    max_new_tokens: MaxNewTokens | None = None
    system_prompt: SystemPrompt | None = None
    max_draft: Annotated[int, Meta(ge=1, le=MAX_DRAFT)] | None = None
    upload_dtype: UploadDtype | None = None
    upload_prompt: UploadPrompt | None = None
    split: Split | None = None
    agreement_sample: Share | None = None
    bundle: Id | None = None
    software: SoftwareVersion | None = None
    triggers: Triggers | None = None

    def __post_init__(self) -> None:
        """Check the triggers; raise ValueError, which a decoder reports in its own error."""
        check_triggers(self.triggers or ())


class DesiredConfig(Struct, frozen=True, omit_defaults=True):
    """The retained message on `d/<device>/config`.

    A different version is a different configuration, whether the number is higher or lower.
    `software` is the desired version of the device's software. It is not in `settings`, because
    earlier devices refuse settings that they do not know.
    """

    version: Amount
    settings: Settings
    software: SoftwareVersion | None = None

    @classmethod
    def of(cls, version: int, settings: Settings) -> DesiredConfig:
        """Return the message for the merged settings of a device."""
        return cls(version, replace(settings, software=None), settings.software)


def merge_scopes(*scopes: Settings) -> Settings:
    """Merge scopes, given from the widest to the narrowest.

    A scope that sets `threshold` or `thresholds` decides on both.
    """
    merged: dict[str, Any] = {}
    for scope in scopes:
        values = {name: getattr(scope, name) for name in scope.__struct_fields__}
        present = {name: value for name, value in values.items() if value is not None}
        if present.keys() & {"threshold", "thresholds"}:
            merged.pop("threshold", None)
            merged.pop("thresholds", None)
        merged |= present
    return Settings(**merged)


def is_setting(word: str) -> bool:
    """Whether a word is the name of a setting."""
    return word in Settings.__struct_fields__


def known_settings() -> str:
    """Return the names of all settings, as a part of an error."""
    return f"known settings are {', '.join(Settings.__struct_fields__)}"


def parse_settings(values: dict[str, Any]) -> Settings:
    """Convert builtins to `Settings`.

    Raises:
        ConfigError: a name or a value is not valid, or the settings are larger than
            `MAX_SETTINGS_BYTES`.
    """
    try:
        settings = msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        reason = describe_error(error, Settings, values)
        if is_unknown_field(reason):
            reason += f"; {known_settings()}"
        raise ConfigError(reason) from None
    size = len(msgspec.json.encode(settings))
    if size > MAX_SETTINGS_BYTES:
        raise ConfigError(
            f"expected settings of at most {MAX_SETTINGS_BYTES} bytes as JSON, got {size}; "
            "shorten the triggers"
        )
    return settings


def encode_desired(desired: DesiredConfig) -> bytes:
    """Encode the message as JSON."""
    return msgspec.json.encode(desired)


def decode_desired(payload: bytes) -> DesiredConfig:
    """Decode the message.

    Raises:
        OversizedError: the payload is longer than `MAX_DESIRED_BYTES`.
        DecodeError: it is no desired configuration in JSON.
    """
    if len(payload) > MAX_DESIRED_BYTES:
        raise OversizedError(
            f"expected a configuration of at most {MAX_DESIRED_BYTES} bytes, got {len(payload)}"
        )
    try:
        return msgspec.json.decode(payload, type=DesiredConfig)
    except JSON_ERRORS as error:
        raise DecodeError(f"expected a desired configuration in JSON: {error}") from None
