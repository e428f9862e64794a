"""Export and worker do the same with transformers 5 as with the version of these tests, 4."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
import transformers
from packaging.requirements import Requirement

from fleet.bundles.manifest import Bundle
from tests.onnx_export.traces import shared_traces
from tests.packaging.environments import ROOT, install_beside, run
from tests.packaging.random_models import NAMES, export_all

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(600)]


def requirement(extra: str) -> Requirement:
    """Return the requirement of transformers of one of the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = map(Requirement, project["optional-dependencies"][extra])
    return next(line for line in lines if line.name == "transformers")


def test_export_and_worker_allow_both_versions() -> None:
    assert transformers.__version__.startswith("4.")
    assert str(requirement("worker")) == str(requirement("export"))
    assert {"4.57.6", "5.0.0"} == {*requirement("worker").specifier.filter(["4.57.6", "5.0.0"])}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of models that the newest transformers wrote, exported by it and by this one."""
    folder = tmp_path_factory.mktemp("transformers")
    python = install_beside(folder, str(requirement("worker")))
    show = "import transformers; print(transformers.__version__)"
    assert run(python, "-c", show, folder=folder).startswith("5.")
    variables = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    program = ("-W", "error", "-m", "tests.packaging.random_models", folder, "newest")
    run(python, *program, folder=folder, variables=variables)
    with shared_traces():
        export_all(folder, "this")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_both_versions_make_one_bundle_of_a_model(name: str, models: Path) -> None:
    this, newest = (Bundle.load(models / name / by / "bundle") for by in ("this", "newest"))
    assert this.manifest.files == newest.manifest.files
    assert this.manifest.bundle_id == newest.manifest.bundle_id


@pytest.mark.parametrize("name", NAMES)
def test_workers_with_both_versions_compute_the_same(name: str, models: Path) -> None:
    this, newest = (np.load(models / name / by / "logits.npy") for by in ("this", "newest"))
    np.testing.assert_allclose(newest, this, atol=1e-5)
