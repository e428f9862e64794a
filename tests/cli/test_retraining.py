"""The commands of docs/retraining.md, in order, on the tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import msgspec
import pytest

from fleet.bundles.manifest import Bundle
from onnx_export.heads import load_heads
from tests.tiny import make_tiny_checkpoint

PAGE = Path(__file__).parents[2] / "docs/retraining.md"
WORDS = (
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "sun",
    "moon",
    "sea",
    "tree",
    "bird",
    "stone",
)


SMALLER = """
fleet() {
    case "$1 $2" in
    "heads profile" | "heads train")
        command fleet "$@" --batch 24 --max-new-tokens 24 --processes 1 ;;
    *) command fleet "$@" ;;
    esac
}
"""
"""The tiny model answers fewer prompts at once, in shorter answers, than a real model."""


def prompts(first: int, count: int) -> str:
    """Return lines of words, all different."""
    lines = []
    for i in range(first, first + count):
        lines.append(
            " ".join(WORDS[i // len(WORDS) ** place % len(WORDS)] for place in range(3)) + f" {i}"
        )
    return "\n".join(lines) + "\n"


@pytest.mark.timeout(560)
def test_every_command_of_the_page_runs_on_the_tiny_model(
    tmp_path: Path,
) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model", end_scale=0.3)
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    (tmp_path / "training.txt").write_text(prompts(0, 40))
    (tmp_path / "calibration.txt").write_text(prompts(100, 60))
    (tmp_path / "test.txt").write_text(prompts(200, 4))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "MODEL": str(checkpoint),
        "EXITS": "1,3",
        "TOKENS": "1200",
        "PROFILE_TOKENS": "500",
        "TARGET": "0.8",
    }
    result = subprocess.run(
        ["bash", "-euxc", SMALLER + "".join(blocks)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:] + result.stdout[-2000:]
    bundle = Bundle.load(tmp_path / "bundle")
    assert bundle.manifest.calibration is not None
    assert bundle.manifest.calibration.num_answers == 60
    kept = msgspec.json.decode((tmp_path / "calibration.json").read_bytes())
    assert tuple(kept["thresholds"]) == bundle.manifest.thresholds
    for name in ("curve.svg", "profile.svg"):
        assert ET.parse(tmp_path / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert "exit:" in result.stdout or "cloud" in result.stdout
    from transformers import AutoModelForCausalLM

    heads = load_heads(
        tmp_path / "heads.safetensors",
        (1, 3),
        AutoModelForCausalLM.from_pretrained(checkpoint),
    )
    assert heads.kind == bundle.manifest.exit_head == "linear"
