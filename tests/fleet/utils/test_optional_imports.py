"""Imports of packages that an extra installs."""

from __future__ import annotations

import gc
import importlib

import pytest

from fleet.errors import MissingExtraError
from fleet.utils.optional_imports import needs, require


def test_a_missing_package_is_an_error_that_names_the_extra() -> None:
    with (
        pytest.raises(MissingExtraError, match=r"needs no_such_package, .*cecollm-fleet\[plots\]"),
        needs("plots"),
    ):
        importlib.import_module("no_such_package.figures")


def test_a_missing_module_of_this_project_is_a_fault() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), needs("plots"):
        importlib.import_module("fleet.no_such_module")


def test_packages_are_checked_without_an_import() -> None:
    require("server", "sqlalchemy", "aiohttp")
    with pytest.raises(MissingExtraError, match=r"needs no_such_package, .*cecollm-fleet\[edge\]"):
        require("edge", "onnxruntime", "no_such_package")


def test_no_garbage_is_collected_during_imports() -> None:
    with needs("edge"):
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(MissingExtraError), needs("plots"):
        importlib.import_module("no_such_package")
    assert gc.isenabled()
