"""The settings of the workers that `fleet up` starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cloud_broker_worker.worker.config import default_weights
from fleet.bundles.manifest import read_manifest


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """The options of each worker; None is the default for its bundle and this machine.

    The default weights are the fastest that keep the agreement with float32; several workers share
    this machine's cores.
    """

    weights: str | None = None
    kv_budget_mb: int | None = None
    threads: int | None = None

    def arguments(self, bundle: Path, num_workers: int) -> list[str]:
        """Return the command-line options of one of `num_workers` workers."""
        weights = self.weights or default_weights(read_manifest(bundle).model.name)
        arguments = ["--bundle", str(bundle), "--weights", weights]
        if self.kv_budget_mb:
            arguments += ["--kv-budget-mb", str(self.kv_budget_mb)]
        if self.threads:
            arguments += ["--threads", str(self.threads)]
        elif num_workers > 1:  # a single one chooses its own number
            arguments += ["--threads", threads_per_worker(num_workers)]
        return arguments


def threads_per_worker(num_workers: int) -> str:
    """The value of `--threads` for each of several workers that share this machine's cores."""
    return str(max(1, (os.cpu_count() or 1) // num_workers))
