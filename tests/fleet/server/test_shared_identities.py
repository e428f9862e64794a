"""Two processes with one identity are recognised. A restart is not mistaken for them."""

from __future__ import annotations

import pytest

from fleet.server.shared_identities import WINDOW_S, SharedIdentityDetector


def reports(epochs: list[int], step_s: float = 1.0) -> list[bool]:
    detector = SharedIdentityDetector()
    return [
        detector.observe("kitchen", epoch, step_s * number) for number, epoch in enumerate(epochs)
    ]


def test_epochs_that_take_turns_are_reported_once() -> None:
    assert reports([1, 2, 1, 2, 1, 2, 1]) == [False, False, False, True, False, False, False]


@pytest.mark.parametrize("epochs", [[1, 1, 1], [1, 2, 3, 4, 5], [1, 2, 1, 1, 1, 3, 3], [3, 2, 1]])
def test_restarts_and_one_late_message_are_not_reported(epochs: list[int]) -> None:
    assert not any(reports(epochs))


def test_a_lasting_fault_is_reported_again_after_an_hour() -> None:
    assert sum(reports([1, 2] * 6, step_s=WINDOW_S / 4)) > 1


def test_names_do_not_mix() -> None:
    detector = SharedIdentityDetector()
    assert not any(detector.observe(name, epoch, 0.0) for epoch in (1, 2) for name in "ab" * 2)
