"""What an operator wants of devices: settings, merged from those of all, of a group and of the device itself."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from fleet.errors import ConfigError, DecodeError, OversizedError
from fleet.protocol.messages import MAX_DRAFT, DeadlineMs, Id
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import Share, TargetTpotMs, Threshold
from fleet.protocol.report import Amount
from fleet.protocol.triggers import Triggers, check_triggers

MAX_DESIRED_BYTES: Final = 64 * 1024
MAX_SETTINGS_BYTES: Final = 60 * 1024  # leaves room for the small settings of other scopes
UploadDtype = Literal["float16", "int8"]


class Settings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What can be changed while a device serves; None is not said, so that the next wider scope decides.

    `bundle` is the id of the bundle that the device shall serve; `agreement_sample` the share of collaborative answers
    whose tokens are put to the cloud as well, to see whether the exits still agree with it.
    """

    mode: Mode | None = None
    threshold: Threshold | None = None
    thresholds: tuple[Threshold, ...] | None = None
    target_tpot_ms: TargetTpotMs | None = None
    min_agreement: Share | None = None
    max_offload_rate: Share | None = None
    assist_deadline_ms: DeadlineMs | None = None
    answer_deadline_ms: DeadlineMs | None = None
    max_new_tokens: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    max_draft: Annotated[int, Meta(ge=1, le=MAX_DRAFT)] | None = None
    upload_dtype: UploadDtype | None = None
    agreement_sample: Share | None = None
    bundle: Id | None = None
    triggers: Triggers | None = None

    def __post_init__(self) -> None:
        """Raises ValueError, which a decoder reports in its own error."""
        check_triggers(self.triggers or ())


class DesiredConfig(Struct, frozen=True):
    """The retained message on `d/<device>/config`. Another version is another configuration, whether higher or not."""

    version: Amount
    settings: Settings


def merge(*scopes: Settings) -> Settings:
    """From the widest scope to the narrowest; one that gives `threshold` or `thresholds` decides on both."""
    merged: dict[str, Any] = {}
    for scope in scopes:
        said = {
            name: value
            for name in scope.__struct_fields__
            if (value := getattr(scope, name)) is not None
        }
        if said.keys() & {"threshold", "thresholds"}:
            merged.pop("threshold", None)
            merged.pop("thresholds", None)
        merged |= said
    return Settings(**merged)


def parse_settings(values: dict[str, Any]) -> Settings:
    """Settings out of builtins; raises ConfigError that names what is known, or how large they may be."""
    try:
        settings = msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{error}; known settings are {', '.join(Settings.__struct_fields__)}"
        ) from None
    if (size := len(msgspec.json.encode(settings))) > MAX_SETTINGS_BYTES:
        raise ConfigError(
            f"expected settings of at most {MAX_SETTINGS_BYTES} bytes as JSON, got {size}; shorten the triggers"
        )
    return settings


def encode_desired(desired: DesiredConfig) -> bytes:
    return msgspec.json.encode(desired)


def decode_desired(payload: bytes) -> DesiredConfig:
    """Raises OversizedError or DecodeError."""
    if len(payload) > MAX_DESIRED_BYTES:
        raise OversizedError(
            f"expected a configuration of at most {MAX_DESIRED_BYTES} bytes, got {len(payload)}"
        )
    try:
        return msgspec.json.decode(payload, type=DesiredConfig)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"expected a desired configuration in JSON: {error}") from None
