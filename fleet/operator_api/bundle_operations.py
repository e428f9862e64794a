"""Operations on bundles and their roll-outs."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from fleet.operator_api.operation import NoFields, Operation, OperatorRole
from fleet.operator_api.paging import ListPage, PageQuery
from fleet.registry.results import BundleRow, RolloutRow
from fleet.registry.rollouts.plan import RolloutPlan

RolloutId = Annotated[int, Meta(ge=1, le=1_000_000_000)]


class StoredBundle(BundleRow, frozen=True, kw_only=True):
    """A bundle, with facts of its files in the fleet's folder.

    `disk_bytes` is their size, or None if they are missing. `exits` are the layers of its exits,
    and `prompt_format` is how its model reads prompts; both are empty if they are not known.
    """

    disk_bytes: int | None
    exits: tuple[int, ...] = ()
    prompt_format: str = ""


class BundleList(Struct, frozen=True, kw_only=True):
    """The bundles, the newest first."""

    bundles: list[StoredBundle]


class BundleNaming(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A bundle by its id, its name or the beginning of its id, and its new name."""

    bundle: str
    name: str


class NamedBundleId(Struct, frozen=True, kw_only=True):
    """A bundle's id and its name."""

    bundle_id: str
    name: str


class BundleRemoval(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A bundle to remove; with `force` also one that a completed roll-out could go back to."""

    bundle: str
    force: bool = False


class RemovedBundle(Struct, frozen=True, kw_only=True):
    """A removed bundle, and the bytes that its files had."""

    bundle_id: str
    freed_bytes: int


class RolloutQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The roll-outs of one page."""


class RolloutList(ListPage, frozen=True, kw_only=True):
    """A page of roll-outs, the newest first."""

    rollouts: list[RolloutRow]


class RolloutKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A roll-out by its id."""

    rollout: RolloutId


class RolloutStart(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A bundle by its id, its name or the beginning of its id, and the plan of its roll-out."""

    bundle: str
    plan: RolloutPlan = RolloutPlan()


class RolloutChoice(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A roll-out; None is the open one."""

    rollout: RolloutId | None = None


class RolloutUndoing(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A roll-out; None is the open one, or the newest if none is open.

    With `at_once` a completed one is undone on all devices at once, without comparison.
    """

    rollout: RolloutId | None = None
    at_once: bool = False


LIST_BUNDLES: Final = Operation(
    method="GET",
    path="/bundles",
    role=OperatorRole.VIEWER,
    request=NoFields,
    response=BundleList,
    summary="List the bundles: their size on disk, devices and workers, and an open roll-out.",
)
RENAME_BUNDLE: Final = Operation(
    method="PUT",
    path="/bundles/{bundle}/name",
    role=OperatorRole.OPERATOR,
    request=BundleNaming,
    response=NamedBundleId,
    summary="Give a bundle a name, which every operation accepts instead of its id.",
)
REMOVE_BUNDLE: Final = Operation(
    method="DELETE",
    path="/bundles/{bundle}",
    role=OperatorRole.ADMIN,
    request=BundleRemoval,
    response=RemovedBundle,
    summary="Remove a bundle that no device needs, and delete its files from the fleet's folder.",
)
LIST_ROLLOUTS: Final = Operation(
    method="GET",
    path="/rollouts",
    role=OperatorRole.VIEWER,
    request=RolloutQuery,
    response=RolloutList,
    summary="List the roll-outs: their progress, their findings, and what they wait for.",
)
SHOW_ROLLOUT: Final = Operation(
    method="GET",
    path="/rollouts/{rollout}",
    role=OperatorRole.VIEWER,
    request=RolloutKey,
    response=RolloutRow,
    summary="Show one roll-out.",
)
START_ROLLOUT: Final = Operation(
    method="POST",
    path="/rollouts",
    role=OperatorRole.OPERATOR,
    request=RolloutStart,
    response=RolloutRow,
    summary="Bring a bundle to devices, stage by stage, and undo it if it is worse than before.",
)
PAUSE_ROLLOUT: Final = Operation(
    method="POST",
    path="/rollouts/pause",
    role=OperatorRole.OPERATOR,
    request=RolloutChoice,
    response=RolloutRow,
    summary="Pause a roll-out; meanwhile it is not undone by itself.",
)
RESUME_ROLLOUT: Final = Operation(
    method="POST",
    path="/rollouts/resume",
    role=OperatorRole.OPERATOR,
    request=RolloutChoice,
    response=RolloutRow,
    summary="Resume a paused roll-out.",
)
ROLL_BACK: Final = Operation(
    method="POST",
    path="/rollouts/roll-back",
    role=OperatorRole.OPERATOR,
    request=RolloutUndoing,
    response=RolloutRow,
    summary="Undo a roll-out; after its end, bring the previous bundle back, stage by stage.",
)
