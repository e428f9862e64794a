"""The suffix table of an app: bounded, and each turn of a chat adds only what is new."""

from __future__ import annotations

from edge_agent.generation.suffix_index import MAX_MATCH
from edge_agent.generation.suffix_table import MAX_TOKENS, SuffixTable


def test_a_full_table_keeps_the_newest_texts() -> None:
    table = SuffixTable()
    for start in range(0, 5 * MAX_TOKENS, 1000):
        table.add(range(start, start + 1000))
        assert len(table.token_ids) <= MAX_TOKENS
    assert table.num_added == 82
    newest = 81_000
    assert table.guess([newest, newest + 1, newest + 2], 1)[0].token_id == newest + 3
    assert table.guess([10, 11, 12], 1) == []


def test_a_text_longer_than_a_table_fits() -> None:
    table = SuffixTable()
    table.add([1, 2, 3])
    table.add(range(4 * MAX_TOKENS))
    assert len(table.token_ids) <= MAX_TOKENS
    assert table.guess([4 * MAX_TOKENS - 2], 1)[0].token_id == 4 * MAX_TOKENS - 1


def test_a_text_that_continues_a_recent_one_adds_its_end() -> None:
    table = SuffixTable()
    chat = list(range(500))
    table.add(chat)
    table.add([9] * 40)
    before = len(table.token_ids)
    table.add([*chat, 1000, 1001])
    assert len(table.token_ids) == before + MAX_MATCH + 3
    assert table.guess([497, 498, 499], 2)[0].token_id == 1000


def test_a_table_is_made_of_the_tokens_of_another_one() -> None:
    table = SuffixTable()
    table.add([1, 2, 3, 4])
    table.add([5, 6, 7, 8])
    copy = SuffixTable(table.token_ids)
    assert copy.guess([1, 2, 3], 4) == table.guess([1, 2, 3], 4)
    assert copy.token_ids == table.token_ids
