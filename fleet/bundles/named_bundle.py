"""Bundles as Python programs name them: by a folder, or as the default one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from fleet.bundles.manifest import SIDES, Bundle, Side
from fleet.errors import BundleError
from fleet.utils.paths import absolute_path

DEFAULT: Final = "default"


def load_named_bundle(
    bundle: Bundle | Path | str,
    default_folder: Callable[[], Path],
    sides: Iterable[Side] = SIDES,
) -> Bundle:
    """Return a bundle, with checked files of `sides`; `default_folder` gives the default one's.

    Raises:
        BundleError: there is none, or it is damaged.
    """
    if isinstance(bundle, Bundle):
        return bundle
    folder = default_folder() if bundle == DEFAULT else absolute_path(Path(bundle))
    if not folder.is_dir():
        raise BundleError(
            f"expected 'default' or the folder of a bundle, got {str(bundle)!r}, which is no "
            "folder; 'fleet export' makes a bundle"
        )
    return Bundle.load(folder, sides)
