"""The settings of the workers that `fleet up` starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cloud_broker_worker.worker.config import default_weights
from fleet.bundles.manifest import read_manifest
from fleet.bundles.tensor_file import TensorFile
from fleet.errors import BundleError


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """The options of each worker; None is the default for its bundle and this machine.

    The default weights are the fastest that keep the agreement with float32. For a model that was
    not measured, they have the size of the bundle's own. Several workers share this machine's
    cores.
    """

    weights: str | None = None
    kv_budget_mb: int | None = None
    threads: int | None = None

    def arguments(self, bundle: Path, num_workers: int) -> list[str]:
        """Return the command-line options of one of `num_workers` workers."""
        weights = self.weights or bundle_weights(bundle)
        arguments = ["--bundle", str(bundle), "--weights", weights]
        if self.kv_budget_mb:
            arguments += ["--kv-budget-mb", str(self.kv_budget_mb)]
        if self.threads:
            arguments += ["--threads", str(self.threads)]
        elif num_workers > 1:  # a single worker chooses the number itself
            arguments += ["--threads", threads_per_worker(num_workers)]
        return arguments


def bundle_weights(bundle: Path) -> str:
    """Return the default weights for the bundle in a folder.

    Raises:
        BundleError: the bundle's manifest or cloud partition cannot be read.
    """
    model = read_manifest(bundle).model.name
    try:
        with TensorFile(bundle / "cloud/model.safetensors") as file:
            types = {entry.dtype for entry in file.entries.values()}
    except (OSError, ValueError) as error:
        raise BundleError(
            f"the cloud partition of {bundle} cannot be read: {error}; export the bundle again"
        ) from None
    return default_weights(model, "F32" if "F32" in types else "BF16")


def threads_per_worker(num_workers: int) -> str:
    """The value of `--threads` for each of several workers that share this machine's cores."""
    return str(max(1, (os.cpu_count() or 1) // num_workers))
