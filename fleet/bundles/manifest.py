"""A bundle: a model's files for both sides, with a manifest whose hash is the bundle's id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import replace

from fleet.errors import BundleError, ConfigError
from fleet.exits.calibration import Calibration
from fleet.protocol.types import Threshold
from fleet.utils.atomic_files import write_file
from fleet.utils.paths import describe_absence
from fleet.utils.text_files import read_json

SCHEMA_VERSION: Final = 4
READABLE_SCHEMAS: Final = (3, 4)
MANIFEST_FILE: Final = "manifest.json"
MAKE_BUNDLE: Final = f"make one of schema {SCHEMA_VERSION} with 'python -m onnx_export --out DIR'"
FILE_PATH: Final = r"\A(edge|cloud|tokenizer)/[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\Z"
Side = Literal["edge", "cloud", "tokenizer"]
SIDES: Final[tuple[Side, ...]] = get_args(Side)
EDGE_SIDES: Final[tuple[Side, ...]] = ("edge", "tokenizer")  # of a device
PromptFormat = Literal["chat", "raw"]
PROMPT_FORMATS: Final[tuple[PromptFormat, ...]] = get_args(PromptFormat)
TOKENIZER: Final = "tokenizer/tokenizer.json"
CHAT_TEMPLATE: Final = "tokenizer/chat_template.jinja"
TOOL_TEMPLATE: Final = "tokenizer/tool_use_template.jinja"


class ModelInfo(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sizes of the whole model, and the cap of its logits if it has one (Gemma 2)."""

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    logit_cap: float | UnsetType = UNSET


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a bundle, by its path in the folder."""

    path: Annotated[str, Meta(pattern=FILE_PATH)]
    num_bytes: int
    sha256: str


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of a bundle and its origin.

    Layer ranges are half-open: an exit at 8 means that the layers [0, 8) have run. `split_layer` is
    the split of a device that has no other setting. The cloud's half holds the layers from
    `upload_layer` on. `uploads` has all layers after which a device may upload, from `upload_layer`
    on, where there are several. A file without them has the id that it had before they existed.
    """

    schema_version: int
    model: ModelInfo
    exits: tuple[int, ...]
    split_layer: int
    upload_layer: int
    quantization: str
    top_k: int
    thresholds: tuple[Threshold, ...]
    parity: dict[str, float]
    tools: dict[str, str]
    files: tuple[FileEntry, ...]
    exit_head: str = "shared"
    heads_sha256: str = ""
    calibration: Calibration | None = None
    instruction_set: str = "any"
    uploads: Annotated[tuple[int, ...], Meta(min_length=1)] | UnsetType = UNSET

    @property
    def bundle_id(self) -> str:
        """The first 32 hex digits of the SHA-256 of the canonical JSON.

        A device and a worker cooperate only if theirs are equal. The figures of `parity` and the
        versions of `tools` do not count, so the same files have one id on every machine. In schema
        3 they do.
        """
        content = self if self.schema_version == 3 else replace(self, parity={}, tools={})
        return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()[:32]

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """The half-open layer ranges of the edge blocks, e.g. ((0, 8), (8, 15))."""
        return tuple(zip((0, *self.exits[:-1]), self.exits, strict=True))

    @property
    def prompt_format(self) -> PromptFormat:
        """``chat`` if the bundle has a chat template; ``raw`` if its model continues a text."""
        return "chat" if self.has_file(CHAT_TEMPLATE) else "raw"

    @property
    def tokenizer_sha256(self) -> str:
        """The SHA-256 of the tokenizer, by which bundles with the same token ids are known."""
        digests = {entry.path: entry.sha256 for entry in self.files}
        return digests.get(TOKENIZER, "")

    def has_file(self, name: str) -> bool:
        """Return whether the bundle has a file of this name, e.g. ``edge/block_0.onnx``."""
        return any(entry.path == name for entry in self.files)

    @property
    def upload_layers(self) -> tuple[int, ...]:
        """The layers after which a device may upload its hidden states."""
        return (self.upload_layer,) if self.uploads is UNSET else self.uploads

    @property
    def splits(self) -> tuple[int, ...]:
        """The numbers of layers that a device may hold: exits from the first upload layer on."""
        return tuple(layer for layer in self.exits if layer >= self.upload_layer)

    @property
    def is_device_only(self) -> bool:
        """Whether the bundle has no half for the cloud."""
        return self.upload_layer == self.model.num_layers

    def upload_layer_of(self, split: int) -> int:
        """Return the layer after which a device that holds `split` layers uploads."""
        return max(layer for layer in self.upload_layers if layer <= split)

    def split_of(self, setting: int | Literal["auto"]) -> int:
        """Return the split that a device's setting selects.

        Raises:
            ConfigError: this bundle cannot be split there.
        """
        split = self.split_layer if setting == "auto" else setting
        if split not in self.splits:
            raise ConfigError(
                f"split {split}: expected 'auto' or one of {', '.join(map(str, self.splits))}, "
                f"the splits of bundle {self.bundle_id}; correct it, or leave it out"
            )
        return split


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the bundle in `folder`; its files are not read.

    Raises:
        BundleError: there is no manifest, or it has another schema.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest: Manifest = read_json(path, Manifest, MAKE_BUNDLE)
    except ConfigError as error:
        raise BundleError(f"no usable bundle in {folder}: {error}") from None
    if manifest.schema_version not in READABLE_SCHEMAS:
        raise BundleError(
            f"{path}: expected schema {SCHEMA_VERSION}, got {manifest.schema_version}; "
            "export the bundle again"
        )
    return manifest


class Bundle:
    """A bundle's folder and manifest, with files that agree with the manifest."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def load(cls, folder: Path, sides: Iterable[Side] = SIDES) -> Bundle:
        """Read the manifest and check size and SHA-256 of every file of `sides`.

        Raises:
            BundleError: no manifest, another schema, or a file that is missing or altered.
        """
        manifest = read_manifest(folder)
        folders = set(sides)
        for entry in manifest.files:
            if entry.path.split("/")[0] in folders:
                check_file(folder, entry)
        return cls(folder, manifest)

    def path(self, name: str) -> Path:
        """Return the path of a file by its name in the manifest, e.g. ``edge/block_0.onnx``.

        Raises:
            BundleError: the manifest has no such file.
        """
        if not self.manifest.has_file(name):
            raise BundleError(
                f"bundle {self.manifest.bundle_id} has no file {name}; export the bundle again"
            )
        return self.folder / name


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(folder: Path, entry: FileEntry) -> None:
    """Check the size and SHA-256 of a file.

    Raises:
        BundleError: the file is missing, or differs from `entry`.
    """
    path = folder / entry.path
    if not path.is_file():
        raise BundleError(
            f"bundle file {path} {describe_absence(path)}; export or copy the bundle again"
        )
    if path.stat().st_size != entry.num_bytes or hash_file(path) != entry.sha256:
        raise BundleError(
            f"bundle file {path} was altered: expected {entry.num_bytes} bytes "
            f"with sha256 {entry.sha256[:16]}..., got {path.stat().st_size} bytes; "
            "export or copy the bundle again"
        )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest as indented JSON, complete or not at all."""
    content = msgspec.json.encode(manifest, order="sorted")
    formatted = msgspec.json.format(content, indent=2) + b"\n"
    write_file(folder / MANIFEST_FILE, formatted, mode=0o644)
