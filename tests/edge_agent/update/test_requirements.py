"""The requirements of a wheel against the environment of the tests."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.metadata import Metadata

from edge_agent.update.requirements import check_requirements
from fleet.errors import SoftwareError

HEAD = "Metadata-Version: 2.4\nName: cecollm-fleet\nVersion: 0.9.0\n"


def metadata(*lines: str) -> Metadata:
    return Metadata.from_email(HEAD + "\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("Requires-Python: >=3.11",),
        ("Requires-Dist: numpy>=2", "Requires-Dist: msgspec"),
        ('Requires-Dist: no-such-package; extra == "bench"',),
        ('Requires-Dist: no-such-package; python_version < "3"',),
        ('Requires-Dist: onnxruntime>=1.22; extra == "edge"',
         'Requires-Dist: no-such-package; extra == "edge-gpu"'),
        ('Requires-Dist: no-such-package; extra == "edge"',
         'Requires-Dist: numpy; extra == "edge-gpu"'),
    ],
)  # fmt: skip
def test_requirements_that_are_met_are_accepted(lines: tuple[str, ...]) -> None:
    extras = ("Provides-Extra: edge", "Provides-Extra: edge-gpu", "Provides-Extra: bench")
    check_requirements(metadata(*extras, *lines))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("Requires-Python: >=4",), r"needs Python >=4"),
        (("Requires-Dist: no-such-package>=1",), r"no-such-package>=1 \(not installed\)"),
        (("Requires-Dist: numpy>=99",), rf"numpy>=99 \({version('numpy')} is installed\)"),
        (('Requires-Dist: numpy>=99; extra == "edge"',
          'Requires-Dist: numpy>=99; extra == "edge-gpu"'), "numpy>=99"),
    ],
)  # fmt: skip
def test_a_requirement_that_is_not_met_is_named(lines: tuple[str, ...], message: str) -> None:
    extras = ("Provides-Extra: edge", "Provides-Extra: edge-gpu")
    with pytest.raises(SoftwareError, match=message):
        check_requirements(metadata(*extras, *lines))
