"""All operations, from which the routes, their documentation and the client are made."""

from __future__ import annotations

from typing import Any, Final

from fleet.operator_api.alarm_operations import (
    ACKNOWLEDGE_ALARMS,
    COUNT_ALARMS,
    LIST_ALARM_EVENTS,
    LIST_ALARM_RULES,
    LIST_ALARMS,
    MUTE_ALARMS,
    SET_ALARM_RULE,
    UNSET_ALARM_RULE,
)
from fleet.operator_api.audit_operations import CHECK_FLEET, LIST_CHANGES
from fleet.operator_api.bundle_operations import (
    LIST_BUNDLES,
    LIST_ROLLOUTS,
    PAUSE_ROLLOUT,
    REMOVE_BUNDLE,
    RENAME_BUNDLE,
    RESUME_ROLLOUT,
    ROLL_BACK,
    SHOW_ROLLOUT,
    START_ROLLOUT,
)
from fleet.operator_api.device_operations import (
    LIST_DEVICES,
    MOVE_DEVICE,
    SHOW_DEVICE,
    TAG_DEVICE,
)
from fleet.operator_api.identity_operations import (
    ALLOW,
    DELETE_IDENTITY,
    DISALLOW,
    ENROLL,
    INVITE,
    LIST_IDENTITIES,
    LIST_TOKENS,
    RESUME,
    REVOKE,
    SHOW_IDENTITY,
    SUSPEND,
)
from fleet.operator_api.key_operations import CREATE_KEY, LIST_KEYS, REVOKE_KEY
from fleet.operator_api.operation import Operation
from fleet.operator_api.operator_operations import (
    ADD_OPERATOR,
    CREATE_OPERATOR_KEY,
    LIST_OPERATOR_KEYS,
    LIST_OPERATORS,
    MAKE_OPERATOR_LINK,
    REMOVE_OPERATOR,
    REVOKE_OPERATOR_KEY,
    SET_OPERATOR_ROLE,
)
from fleet.operator_api.settings_operations import (
    LIST_CONFIG_LAGS,
    SET_SETTINGS,
    SHOW_SETTINGS,
    UNSET_SETTINGS,
)
from fleet.operator_api.software_operations import LIST_UPDATES, LIST_VERSIONS, ROLL_OUT_VERSION
from fleet.operator_api.stats_operations import (
    LIST_BUNDLE_STATS,
    LIST_DEVICE_STATS,
    LIST_GROUP_STATS,
    LIST_HOUR_STATS,
    LIST_SESSIONS,
    LIST_WORKERS,
)

OPERATIONS: Final[tuple[Operation[Any, Any], ...]] = (
    LIST_DEVICES,
    SHOW_DEVICE,
    MOVE_DEVICE,
    TAG_DEVICE,
    LIST_DEVICE_STATS,
    LIST_GROUP_STATS,
    LIST_BUNDLE_STATS,
    LIST_HOUR_STATS,
    LIST_SESSIONS,
    LIST_WORKERS,
    LIST_BUNDLES,
    RENAME_BUNDLE,
    REMOVE_BUNDLE,
    LIST_ROLLOUTS,
    SHOW_ROLLOUT,
    START_ROLLOUT,
    PAUSE_ROLLOUT,
    RESUME_ROLLOUT,
    ROLL_BACK,
    SHOW_SETTINGS,
    SET_SETTINGS,
    UNSET_SETTINGS,
    LIST_CONFIG_LAGS,
    LIST_VERSIONS,
    LIST_UPDATES,
    ROLL_OUT_VERSION,
    LIST_IDENTITIES,
    SHOW_IDENTITY,
    ENROLL,
    INVITE,
    SUSPEND,
    RESUME,
    REVOKE,
    DELETE_IDENTITY,
    ALLOW,
    DISALLOW,
    LIST_TOKENS,
    LIST_KEYS,
    CREATE_KEY,
    REVOKE_KEY,
    LIST_CHANGES,
    CHECK_FLEET,
    LIST_ALARMS,
    COUNT_ALARMS,
    LIST_ALARM_EVENTS,
    ACKNOWLEDGE_ALARMS,
    LIST_ALARM_RULES,
    SET_ALARM_RULE,
    UNSET_ALARM_RULE,
    MUTE_ALARMS,
    LIST_OPERATORS,
    ADD_OPERATOR,
    SET_OPERATOR_ROLE,
    REMOVE_OPERATOR,
    MAKE_OPERATOR_LINK,
    LIST_OPERATOR_KEYS,
    CREATE_OPERATOR_KEY,
    REVOKE_OPERATOR_KEY,
)
