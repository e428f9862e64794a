"""Rotary settings of a model under the names of transformers 4, which transformers 5 reads, too.

transformers 5 keeps and writes them in a dictionary, `rope_parameters`, that transformers 4 ignores
without a word: the model would rotate by other angles.
"""

from __future__ import annotations

from typing import Any, Final

from fleet.bundles.decoder_variants import FULL, LOCAL
from fleet.errors import ExportError

PARAMETERS: Final = "rope_parameters"
NAMES: Final = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
OUTSIDE_SCALING: Final = ("rope_theta", "partial_rotary_factor")
LENGTH: Final = "original_max_position_embeddings"


def rotary_settings(config: Any) -> dict[str, Any]:
    """Return the rotary settings of a transformers configuration, by the names of version 4.

    Raises:
        ExportError: version 4 has no name for one of them.
    """
    parameters = getattr(config, PARAMETERS, None)
    if not parameters:
        return {name: getattr(config, name) for name in NAMES if hasattr(config, name)}
    full = parameters.get(FULL) or parameters.get(LOCAL) or parameters
    settings = {name: full[name] for name in OUTSIDE_SCALING if name in full}
    settings["rope_scaling"] = rope_scaling(full, settings)
    local = parameters.get(LOCAL)
    if local and config.model_type == "gemma3_text":
        settings["rope_local_base_freq"] = local["rope_theta"]
        if local.get("rope_type", "default") != "default":
            raise ExportError(
                f"rope scaling {local['rope_type']!r} of layers with a window cannot be exported: "
                "expected 'default'"
            )
    return settings


def rope_scaling(parameters: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the scaling among `parameters` of version 5, None for the default one.

    The length for which a model with ``longrope`` was trained is one of the `settings`.
    """
    scaling = {name: value for name, value in parameters.items() if name not in OUTSIDE_SCALING}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind == "longrope":  # Phi-3 accepts this name for the type, and no more than three
        scaling["type"] = scaling.pop("rope_type", kind)
        if LENGTH in scaling:
            settings[LENGTH] = scaling.pop(LENGTH)
    else:
        scaling.pop("type", None)
    return scaling


def adopt_rotary_settings(config: Any) -> Any:
    """Give a configuration that transformers 5 wrote the names that transformers 4 reads.

    In transformers 5, `config` has them no more, and is returned as it is.
    """
    if hasattr(config, "rope_theta") and hasattr(config, PARAMETERS):
        for name, value in rotary_settings(config).items():
            setattr(config, name, value)
        delattr(config, PARAMETERS)
    return config


def portable_settings(config: Any) -> dict[str, Any]:
    """Return what is to be written of a configuration, for both versions of transformers."""
    settings: dict[str, Any] = config.to_diff_dict()
    del settings["transformers_version"]
    if settings.pop(PARAMETERS, None):
        settings |= rotary_settings(config)
    return settings
