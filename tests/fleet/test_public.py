"""The public names of the packages, which are imported when they are used."""

from __future__ import annotations

from types import ModuleType

import pytest

import edge_agent
import fleet
from fleet import public


@pytest.mark.parametrize("package", [fleet, edge_agent])
def test_every_public_name_leads_to_what_has_it(package: ModuleType) -> None:
    for name in package.__all__:
        value = getattr(package, name)
        assert name == "__version__" or value.__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = package.Nothing


def test_the_package_and_its_door_have_the_same_names() -> None:
    classes = {name for name, value in vars(public).items() if isinstance(value, type)}
    assert classes == set(fleet.__all__) - {"__version__"}
