"""The way back from a completed roll-out: another roll-out, of the bundle before."""

from __future__ import annotations

from collections import Counter

from msgspec.structs import replace

from fleet.errors import RolloutError
from fleet.registry.rollouts.plan import MAX_CANARY, RolloutPlan, RolloutProgress


def bundles_before(progress: RolloutProgress, bundle_id: str) -> Counter[str]:
    """Return the number of a roll-out's devices by the other bundle that they served before."""
    before = Counter(each.served or each.bundle or "" for each in progress.members.values())
    del before[""], before[bundle_id]
    return before


def previous_bundle(progress: RolloutProgress, bundle_id: str) -> str | None:
    """Return the bundle that most devices served before a roll-out of `bundle_id`; None if none."""
    most_common = bundles_before(progress, bundle_id).most_common(1)
    return most_common[0][0] if most_common else None


def no_way_back(rollout: int) -> RolloutError:
    """Return the error of a roll-out whose previous bundle is not known."""
    return RolloutError(
        f"no device of roll-out {rollout} served another bundle before; choose one with "
        "'fleet bundle list', and bring it with 'fleet bundle rollout BUNDLE'"
    )


def plan_back(plan: RolloutPlan, *, at_once: bool) -> RolloutPlan:
    """Return the plan of the way back: that of the roll-out, or one stage without a comparison."""
    if not at_once:
        return RolloutPlan(group=plan.group) if plan.at_once else plan
    return replace(
        plan,
        canary=MAX_CANARY,
        canary_group=None,
        percentages=(100,),
        agreement_sample=0.0,
        at_once=True,
    )
