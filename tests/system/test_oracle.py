"""With every exit off the answer is the whole model's at every split and upload layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.whole_model import WholeModel
from fleet.bundles.manifest import Bundle
from fleet.protocol.modes import CLOUD
from fleet.protocol.prompt import PromptRequest
from tests.system.memory_fleet import memory_fleet

PROMPTS = ("How warm is it?", "Say something about rivers.", "0123456789 " * 8)
LAYOUTS = [
    ((1,), 1), ((2,), 2), ((3,), 3), ((1, 2), 2), ((1, 2), 1), ((1, 3), 3), ((1, 3), 1),
    ((2, 3), 3), ((2, 3), 2), ((1, 2, 3), 3), ((1, 2, 3), 2), ((1, 2, 3), 1),
]  # fmt: skip


@pytest.mark.parametrize(("exits", "upload_layer"), LAYOUTS)
def test_collaboration_without_exits_equals_the_whole_model(
    make_tiny_bundle: Callable[..., Bundle], exits: tuple[int, ...], upload_layer: int
) -> None:
    bundle = make_tiny_bundle(exits, upload_layer=upload_layer)
    whole = WholeModel(bundle, num_threads=1)
    with memory_fleet() as fleet:
        fleet.start_worker(bundle)
        fleet.start_device(bundle)
        for prompt in PROMPTS:
            answer = fleet.ask(PromptRequest(prompt=prompt, threshold=1.0, max_new_tokens=24))
            assert answer.token_ids == whole.generate(prompt, 24)
            assert answer.sources == {CLOUD: len(answer.token_ids)}
