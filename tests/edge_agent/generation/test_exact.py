"""With positions run one by one, what was drafted and cut off leaves no trace, not even in the last
bit.
"""

from __future__ import annotations

import numpy as np
import pytest

from fleet.bundles.manifest import Bundle
from fleet.graphs.cascade import Cascade
from fleet.graphs.partition import Partition

PROMPT = [5, 9, 300, 17, 42]
ANSWER = [7, 8, 21, 33]


@pytest.fixture(scope="module")
def partition(tiny_bundle: Bundle) -> Partition:
    return Partition(tiny_bundle, num_threads=1)


def stepwise(partition: Partition) -> Cascade:
    """Every block over every token as it comes."""
    cascade = Cascade(partition, 64)
    for token_ids in (PROMPT, *([token_id] for token_id in ANSWER)):
        cascade.append(token_ids)
        for block in range(len(partition.blocks)):
            cascade.run(block)
    return cascade


def test_drafts_backlogs_and_rewinds_change_no_bit(partition: Partition) -> None:
    cascade = Cascade(partition, 64, one_by_one_from=len(PROMPT))
    last = len(partition.blocks) - 1
    cascade.append(PROMPT)
    cascade.run(0)
    cascade.append([*ANSWER[:2], 99, 98])
    cascade.run(0)
    for block in range(len(partition.blocks)):
        cascade.fill(block)
    cascade.truncate(len(PROMPT) + 2)
    cascade.append(ANSWER[2:])
    for block in range(len(partition.blocks)):
        cascade.run(block)
    expected = stepwise(partition)
    np.testing.assert_array_equal(cascade.hidden_states(last, 0), expected.hidden_states(last, 0))
