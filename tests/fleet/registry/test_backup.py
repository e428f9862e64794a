"""Copies of a registry: their errors and their command lines show no secret."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fleet.errors import RegistryError
from fleet.registry.backup import dump_registry

URL = "postgresql://fleet{password}@127.0.0.1:1/fleet?sslmode=disable{parameter}"
PROGRAM = """\
#!/bin/sh
echo "$PGPASSWORD $*" > "{out}"
echo "no server" >&2
exit 1
"""


@pytest.mark.parametrize(
    "url",
    [
        URL.format(password=":geheim", parameter=""),
        URL.format(password="", parameter="&password=geheim"),
    ],
)
def test_a_backup_that_fails_shows_no_password(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pg_dump` receives it in the environment, which other users cannot read."""
    out = tmp_path / "received"
    program = tmp_path / "pg_dump"
    program.write_text(PROGRAM.format(out=out))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(
        RegistryError, match=r"pg_dump failed on the registry .*: no server"
    ) as error:
        dump_registry(url, tmp_path / "dump")
    assert "geheim" not in str(error.value)
    password, arguments = out.read_text().split(" ", 1)
    assert password == "geheim"
    assert "geheim" not in arguments
    assert "sslmode=disable" in arguments
