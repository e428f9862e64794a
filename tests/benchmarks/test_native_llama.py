"""The native build of llama.cpp: its options, its facts, and the commands of its driver."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import native_llama
from benchmarks.drivers.llama_native import server_command
from benchmarks.native_llama import BUILD_FILE, build_facts, build_key, write_build_file
from benchmarks.peers import native_command
from fleet.errors import FleetError

SYSTEM_INFO = "system_info: n_threads = 2 | CPU : SSE3 = 1 | AMX_INT8 = 0 | AVX512_VNNI = 1 | "


def program(folder: Path, line: str) -> None:
    """Write a server that prints a line and ends, as one without a model does."""
    path = folder / "llama-server"
    path.write_text(f"#!/bin/sh\necho '{line}' >&2\nexit 1\n")
    Path(path).chmod(0o755)


def test_the_facts_are_the_options_and_what_the_build_reports(tmp_path: Path) -> None:
    program(tmp_path, f"0.00 I {SYSTEM_INFO}")
    write_build_file(tmp_path)
    facts = build_facts(tmp_path)
    assert facts["instruction_sets"] == ["SSE3", "AVX512_VNNI"]
    assert "-DGGML_NATIVE=ON" in facts["options"]
    assert json.loads((tmp_path / BUILD_FILE).read_text()) == facts


def test_a_build_that_reports_nothing_is_refused(tmp_path: Path) -> None:
    program(tmp_path, "no model")
    with pytest.raises(FleetError, match="reports no instruction sets; build it again"):
        write_build_file(tmp_path)


def test_a_build_for_x86_64_has_no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert "-mno-amx-tile" in native_llama.compiler_flags()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert native_llama.compiler_flags() == ()


def test_another_processor_has_another_build(monkeypatch: pytest.MonkeyPatch) -> None:
    before = build_key()
    monkeypatch.setattr(native_llama, "processor_name", lambda: "another")
    assert build_key() != before


def test_options_of_a_server_reach_its_command_line() -> None:
    command = native_command(Path("/b"), Path("/m.gguf"), 2, "--spec-type=ngram-simple")
    assert command[-1] == "--option=--spec-type=ngram-simple"
    server = server_command(Path("/b"), Path("/m.gguf"), 2, 4000, ["--spec-type=ngram-simple"])
    assert server[0] == "/b/llama-server"
    assert server[-2:] == ["--spec-type", "ngram-simple"]
    assert server[server.index("--threads") + 1] == server[server.index("--threads-batch") + 1]
