"""Records of every exit's prediction at each position of the full model's own answers."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fleet.errors import ConfigError

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Records:
    """n positions, e exits, shallow ones first.

    `answer` int64 [n]: index of the answer of a position. `confidence` float64 [n, e] in [0, 1];
    `agrees` bool [n, e]: whether the exit's best token is the full model's.
    """

    exits: tuple[int, ...]
    answer: Ints
    confidence: Floats
    agrees: Bools

    def __post_init__(self) -> None:
        shape = (len(self.answer), len(self.exits))
        if self.confidence.shape != shape or self.agrees.shape != shape:
            raise ConfigError(
                f"records of exits {self.exits}: expected arrays {shape}, "
                f"got {self.confidence.shape}"
            )
        if not np.all((self.confidence >= 0) & (self.confidence <= 1)):
            raise ConfigError(
                "records hold a confidence that is not from 0 to 1; the heads may be broken"
            )

    def __len__(self) -> int:
        """Return the number of positions."""
        return len(self.answer)

    @property
    def num_answers(self) -> int:
        return len(np.unique(self.answer))

    def agreement(self) -> dict[int, float]:
        """Return the share of positions where an exit's best token is the full model's, by exit."""
        return dict(zip(self.exits, self.agrees.mean(0).tolist(), strict=True))

    def only(self, exits: Sequence[int]) -> Records:
        """Return the same positions with some of the exits."""
        columns = [self.exits.index(layer) for layer in exits]
        confidence = self.confidence[:, columns]
        return Records(tuple(exits), self.answer, confidence, self.agrees[:, columns])

    def select(self, answers: Ints) -> Records:
        """Return the positions of some answers."""
        rows = np.isin(self.answer, answers)
        return Records(self.exits, self.answer[rows], self.confidence[rows], self.agrees[rows])

    def split(self, share: float, seed: int = 0) -> tuple[Records, Records]:
        """Split whole answers at random: about `share` of them, and the rest."""
        answers = np.random.default_rng(seed).permutation(np.unique(self.answer))
        first = round(share * len(answers))
        return self.select(answers[:first]), self.select(answers[first:])


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Records with their inputs, so that they are not used for another bundle or other prompts.

    `parts_sha256`: hash of the bundle's files, which its thresholds do not change. `num_prompts`:
    number of prompts that were used of those in the files.
    """

    records: Records
    parts_sha256: str
    prompts_sha256: tuple[str, ...]
    num_prompts: int
    max_new_tokens: int


def save_recording(recording: Recording, path: Path) -> None:
    """Write a NumPy .npz file, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    records = recording.records
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(
                file,
                exits=np.array(records.exits),
                answer=records.answer,
                confidence=records.confidence,
                agrees=records.agrees,
                parts_sha256=np.array(recording.parts_sha256),
                prompts_sha256=np.array(recording.prompts_sha256, np.str_),
                num_prompts=np.array(recording.num_prompts),
                max_new_tokens=np.array(recording.max_new_tokens),
            )
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(
            f"cannot write the records {path}: {error.strerror}; choose another --records"
        ) from error


def load_recording(path: Path) -> Recording:
    """Read a file of :func:`save_recording`.

    Raises:
        ConfigError: the file is not one.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            exits = tuple(int(layer) for layer in file["exits"])
            return Recording(
                records=Records(exits, file["answer"], file["confidence"], file["agrees"]),
                parts_sha256=str(file["parts_sha256"]),
                prompts_sha256=tuple(map(str, file["prompts_sha256"])),
                num_prompts=int(file["num_prompts"]),
                max_new_tokens=int(file["max_new_tokens"]),
            )
    except (OSError, ValueError, TypeError, LookupError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"cannot read the records {path}: {error}; remove the file and record again"
        ) from None
