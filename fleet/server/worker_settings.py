"""The settings of the workers that `fleet up` starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """The options of each worker; None is the worker's own default.

    A worker chooses its weights at its start. Several workers share this machine's cores.
    """

    weights: str | None = None
    expected_sessions: int | None = None
    kv_budget_mb: int | None = None
    threads: int | None = None
    lower_layers: bool = False

    def arguments(self, bundle: Path, num_workers: int) -> list[str]:
        """Return the command-line options of one of `num_workers` workers."""
        options = {
            "--bundle": bundle,
            "--weights": self.weights,
            "--expected-sessions": self.expected_sessions,
            "--kv-budget-mb": self.kv_budget_mb,
            "--threads": self.threads,
        }
        if num_workers > 1 and not self.threads:  # a single worker chooses the number itself
            options["--threads"] = threads_per_worker(num_workers)
        given = {option: value for option, value in options.items() if value is not None}
        texts = [text for option, value in given.items() for text in (option, str(value))]
        return [*texts, "--lower-layers"] if self.lower_layers else texts


def threads_per_worker(num_workers: int) -> str:
    """The value of `--threads` for each of several workers that share this machine's cores."""
    return str(max(1, (os.cpu_count() or 1) // num_workers))
