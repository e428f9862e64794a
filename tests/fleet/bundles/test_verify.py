"""The faults of a bundle that `fleet bundle verify` finds."""

from __future__ import annotations

import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from safetensors.torch import load_file, save_file
from torch import Tensor

from fleet.bundles.manifest import (
    MANIFEST_FILE,
    Bundle,
    FileEntry,
    Manifest,
    hash_file,
    read_manifest,
    write_manifest,
)
from fleet.bundles.signature import SIGNATURE_FILE, sign_bundle
from fleet.bundles.verify import verify_bundle
from fleet.errors import BundleError, ConfigError
from provisioning.authority import CertificateAuthority


@pytest.fixture
def folder(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle.folder, tmp_path / "bundle")


def write_keys(folder: Path, private_key: Any = None) -> tuple[Path, Path]:
    """A key pair in PEM files: private, public."""
    private_key = private_key or ec.generate_private_key(ec.SECP256R1())
    folder.mkdir(exist_ok=True)
    private = folder / "key.pem"
    public = folder / "public.pem"
    private.write_bytes(
        private_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        private_key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


def rewrite(folder: Path, **changes: Any) -> Manifest:
    """Write a manifest with correct hashes and other values."""
    fields = msgspec.structs.asdict(read_manifest(folder)) | changes
    fields["files"] = tuple(
        FileEntry(entry.path, (folder / entry.path).stat().st_size, hash_file(folder / entry.path))
        for entry in fields["files"]
    )
    manifest = Manifest(**fields)
    write_manifest(folder, manifest)
    return manifest


def change_tensors(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    path = folder / "cloud/model.safetensors"
    save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)


def findings(folder: Path, key: Path | None = None) -> str:
    verdict = verify_bundle(folder, key)
    assert verdict.ok == (not verdict.findings)
    assert all("\n" not in finding for finding in verdict.findings)
    return "; ".join(verdict.findings)


def fleet(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fleet.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_an_exported_bundle_is_valid_and_reported_as_unsigned(
    folder: Path, tiny_bundle: Bundle
) -> None:
    result = fleet("bundle", "verify", folder)
    assert (result.returncode, result.stderr) == (0, "")
    assert (
        result.stdout == f"bundle {tiny_bundle.manifest.bundle_id} is good; signature: unsigned\n"
    )


def test_every_finding_is_one_line_and_the_status_is_1(folder: Path) -> None:
    (folder / "edge/lm_head.onnx").unlink()
    (folder / "extra.txt").write_text("what am I")
    result = fleet("bundle", "verify", folder)
    assert result.returncode == 1
    missing, extra = result.stderr.splitlines()
    assert "lm_head.onnx is missing" in missing
    assert "extra.txt is not in the manifest" in extra
    verdict = msgspec.json.decode(fleet("bundle", "verify", folder, "--json").stdout)
    assert (verdict["ok"], verdict["signature"], len(verdict["findings"])) == (False, "unsigned", 2)


@pytest.mark.parametrize(
    "name", ["edge/block_1.onnx", "cloud/model.safetensors", "tokenizer/chat_template.jinja"]
)
def test_an_altered_byte_is_found(name: str, folder: Path) -> None:
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{name} was altered" in findings(folder)


def test_a_folder_without_a_manifest_is_one_finding(tmp_path: Path) -> None:
    assert findings(tmp_path).startswith("no usable bundle in")
    result = fleet("bundle", "verify", tmp_path)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"exits": (2, 1)}, r"exits (2, 1): expected increasing"),
        ({"exits": (1, 5)}, r"exits (1, 5): expected increasing layers from 1 to 4"),
        ({"split_layer": 1}, "split 1 and upload layer 2"),
        ({"uploads": (1, 2)}, "upload layers (1, 2): expected increasing ones from 2 on"),
        ({"uploads": (2, 3)}, "upload layers (2, 3): expected some of the exits (1, 2)"),
        ({"uploads": (2, 4)}, "upload layers (2, 4): expected increasing ones from 2 on and below"),
        ({"upload_layer": 3}, "split 2 and upload layer 3"),
        ({"thresholds": (0.8,)}, "1 thresholds for 2 exits"),
        (
            {"exits": (1, 2, 3), "split_layer": 3, "thresholds": (1, 1, 1)},
            "names edge/block_2.onnx 0 times",
        ),
        (
            {"exits": (1, 3), "split_layer": 3, "upload_layer": 3},
            "block_1.onnx has 4 cache inputs and outputs",
        ),
        ({"upload_layer": 1}, "cloud/config.json: num_hidden_layers is 2, expected 3"),
        ({"top_k": 5}, "edge/lm_head.onnx: top_ids is int64[any, 64], expected int64[any, 5]"),
    ],
)
def test_a_manifest_with_other_sizes_is_found(
    changes: dict[str, Any], finding: str, folder: Path
) -> None:
    rewrite(folder, **changes)
    assert finding in findings(folder)


def test_a_model_of_another_width_is_found_on_both_sides(folder: Path) -> None:
    rewrite(folder, model=msgspec.structs.replace(read_manifest(folder).model, hidden_size=32))
    found = findings(folder)
    assert (
        "edge/block_0.onnx: hidden_states is float[1, any, 64], expected float[1, any, 32]" in found
    )
    assert "cloud/model.safetensors: lm_head.weight is (384, 64), expected (384, 32)" in found


def test_a_graph_without_an_output_is_found(folder: Path) -> None:
    path = folder / "edge/lm_head.onnx"
    graph = onnx.load(path)
    del graph.graph.output[2]
    onnx.save_model(graph, path)
    rewrite(folder)
    assert findings(folder) == "edge/lm_head.onnx: confidence is missing, expected float[any]"


def test_a_graph_that_is_none_is_found(folder: Path) -> None:
    (folder / "edge/block_0.onnx").write_bytes(b"no graph")
    rewrite(folder)
    assert "ONNX Runtime cannot load" in findings(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        struct.pack("<Q", 1 << 60),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 8) + b'{"a":{}}',
        struct.pack("<Q", 20) + b'{"a":{"shape":null}}',
        struct.pack("<Q", 10_000) + b'{"a":' + b"[" * 9995,
    ],
)
def test_tensors_that_cannot_be_read_are_found(header: bytes, folder: Path) -> None:
    (folder / "cloud/model.safetensors").write_bytes(header)
    rewrite(folder)
    assert "the cloud partition cannot be read" in findings(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cloud_partition_in_16_bits_is_valid(dtype: torch.dtype, folder: Path) -> None:
    change_tensors(folder, lambda tensor: tensor.to(dtype))
    rewrite(folder)
    assert findings(folder) == ""


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda tensor: tensor * math.nan, "values that are infinite or not a number"),
        (lambda tensor: tensor.double(), "has the type F64, expected one of F32, BF16, F16"),
    ],
)
def test_tensors_of_other_values_are_one_finding(
    change: Callable[[Tensor], Tensor], finding: str, folder: Path
) -> None:
    change_tensors(folder, change)
    rewrite(folder)
    verdict = verify_bundle(folder)
    assert len(verdict.findings) == 1
    assert finding in verdict.findings[0]


def test_a_signed_bundle_is_valid_by_its_key_alone(folder: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path / "keys")
    _, other = write_keys(tmp_path / "others")
    assert fleet("bundle", "sign", folder, "--key", private).returncode == 0
    assert verify_bundle(folder, public).signature == "valid"
    assert "another key signed it" in findings(folder, other)
    unchecked = verify_bundle(folder)
    assert (unchecked.ok, unchecked.signature) == (True, "not checked")
    assert "give the signer's public key" in unchecked.notes[0]


def test_a_manifest_changed_after_signing_is_found(folder: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path / "keys")
    sign_bundle(folder, private)
    rewrite(folder, thresholds=(0.1, 0.1))
    assert "the manifest was altered" in findings(folder, public)
    (folder / SIGNATURE_FILE).write_bytes(b"no signature")
    assert "is no signature of" in findings(folder, public)


def test_an_unsigned_bundle_fails_when_a_key_is_given(folder: Path, tmp_path: Path) -> None:
    assert "is unsigned: expected manifest.sig" in findings(
        folder, write_keys(tmp_path / "keys")[1]
    )


def test_a_certificate_serves_as_the_key(folder: Path, tmp_path: Path) -> None:
    CertificateAuthority.create(tmp_path / "ca")
    (private,) = (tmp_path / "ca").glob("*key.pem")
    sign_bundle(folder, private)
    assert verify_bundle(folder, tmp_path / "ca" / "ca.pem").signature == "valid"


def test_a_key_of_another_kind_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    keys = (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1()))
    for private, public in (write_keys(tmp_path / "keys", key) for key in keys):
        with pytest.raises(
            ConfigError, match="expected an unencrypted private key in PEM on the curve P-256"
        ):
            sign_bundle(folder, private)
        with pytest.raises(ConfigError, match="expected a public key or certificate"):
            verify_bundle(folder, public)
    with pytest.raises(ConfigError, match="cannot read"):
        verify_bundle(folder, tmp_path / "nowhere.pem")
    assert not (folder / SIGNATURE_FILE).exists()


def test_an_altered_bundle_is_not_signed(folder: Path, tmp_path: Path) -> None:
    (folder / "cloud/config.json").write_text("{}")
    result = fleet("bundle", "sign", folder, "--key", write_keys(tmp_path / "keys")[0])
    assert result.returncode == 1
    assert "was altered" in result.stderr
    assert not (folder / SIGNATURE_FILE).exists()


def test_loading_ignores_the_signature_and_wants_the_schema(folder: Path) -> None:
    (folder / SIGNATURE_FILE).write_bytes(b"whatever")
    assert Bundle.load(folder).manifest.schema_version == 4
    path = folder / MANIFEST_FILE
    path.write_bytes(path.read_bytes().replace(b'"schema_version": 4', b'"schema_version": 1'))
    with pytest.raises(BundleError, match="expected schema 4, got 1"):
        Bundle.load(folder)
