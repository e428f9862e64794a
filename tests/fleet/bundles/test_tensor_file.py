"""A safetensors file that is read by range."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fleet.bundles import tensor_file
from fleet.bundles.tensor_file import TensorFile

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", 64)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(7, 33), (5,), (), (0, 4)])
def test_each_tensor_has_the_bits_that_were_saved(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = {"a": torch.randn(3).to(dtype), "b": torch.randn(shape).to(dtype)}
    save_file(tensors, tmp_path / "t")
    with TensorFile(tmp_path / "t") as file:
        assert file.entries["b"].shape == shape
        file.check("b")
        assert torch.equal(torch.from_numpy(file.read("b")).view(dtype), tensors["b"])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused(
    dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    tensor = torch.full((9, 9), torch.finfo(dtype).max, dtype=dtype)
    save_file({"most": tensor.clone()}, tmp_path / "most")
    with TensorFile(tmp_path / "most") as file:
        file.check("most")
    tensor[8, 7] = value
    save_file({"bad": tensor}, tmp_path / "bad")
    for read in (TensorFile.check, TensorFile.read):
        with (
            TensorFile(tmp_path / "bad") as file,
            pytest.raises(ValueError, match="bad: bad has values that are infinite"),
        ):
            read(file, "bad")


def write(path: Path, entry: dict[str, object], num_bytes: int) -> Path:
    header = msgspec.json.encode({"w": entry})
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(num_bytes))
    return path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "F64"}, "w has the type F64, expected one of F32, BF16, F16"),
        ({"dtype": "F8_E4M3"}, "w has the type F8_E4M3"),
        ({"data_offsets": (0, 24)}, "w lies at bytes 0 to 24 of 16, expected 16 bytes"),
        ({"data_offsets": (8, 24)}, "w lies at bytes 8 to 24 of 16"),
        ({"data_offsets": (-8, 8)}, "w lies at bytes -8 to 8"),
        ({"shape": (2, 3)}, "expected 24 bytes within the file"),
        ({"shape": "2"}, "is no safetensors file"),
    ],
)
def test_a_header_of_other_tensors_is_refused(
    changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    entry: dict[str, object] = {"dtype": "F32", "shape": (2, 2), "data_offsets": (0, 16)}
    with TensorFile(write(tmp_path / "good", entry, 16)) as file:
        file.check("w")
    with pytest.raises(ValueError, match=reason) as error:
        TensorFile(write(tmp_path / "bad", entry | changes, 16))
    assert "\n" not in str(error.value)


def test_a_file_that_becomes_shorter_is_refused(tmp_path: Path) -> None:
    size = 1 << 20  # more than the file's buffer
    entry: dict[str, object] = {"dtype": "F32", "shape": (size,), "data_offsets": (0, 4 * size)}
    path = write(tmp_path / "w", entry, 4 * size)
    with TensorFile(path) as file:
        os.truncate(path, size)
        with pytest.raises(ValueError, match="w ends early"):
            file.read("w")


def test_a_tensor_is_no_view_of_the_file(tmp_path: Path) -> None:
    """The pages of a mapped file would count as the process's memory for as long as it runs."""
    save_file({"w": torch.ones(4, 4)}, tmp_path / "w")
    with TensorFile(tmp_path / "w") as file:
        values = file.read("w")
    assert values.base is None
    assert values.flags.owndata
    assert np.array_equal(values.view(np.float32), np.ones((4, 4)))
