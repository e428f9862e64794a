"""The models of a program, as OpenAI's and Ollama's APIs list them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from fleet.http_api.backend import ApiModel
from fleet.http_api.ollama_fields import ollama_time

OWNER = "cecollm-fleet"


class OpenAiModel(Struct, frozen=True, kw_only=True):
    """A model of OpenAI's API; `fleet` has the facts of the bundle."""

    id: str
    created: int
    fleet: ApiModel
    object: Literal["model"] = "model"
    owned_by: str = OWNER


class OpenAiModelList(Struct, frozen=True, kw_only=True):
    """The response of `GET /v1/models`."""

    data: tuple[OpenAiModel, ...]
    object: Literal["list"] = "list"


class OllamaDetails(Struct, frozen=True, kw_only=True):
    """The kind of a model."""

    family: str
    families: tuple[str, ...]
    quantization_level: str
    parameter_size: str = ""
    format: str = "onnx"
    parent_model: str = ""


class OllamaModel(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A model of `GET /api/tags`; `GET /api/ps` has the last three fields, too."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails
    expires_at: str | None = None
    size_vram: int | None = None
    context_length: int | None = None


class OllamaModelList(Struct, frozen=True):
    """The response of `GET /api/tags` and `GET /api/ps`."""

    models: tuple[OllamaModel, ...]


class OllamaShowBody(Struct, kw_only=True):
    """The body of `POST /api/show`; `name` is an older name of `model`."""

    model: str = ""
    name: str = ""
    verbose: bool = False


class OllamaShow(Struct, frozen=True, kw_only=True):
    """The response of `POST /api/show`."""

    modified_at: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: tuple[str, ...]
    template: str = ""
    modelfile: str = ""
    parameters: str = ""
    license: str = ""


class OllamaVersion(Struct, frozen=True):
    """The response of `GET /api/version`: the version of this software."""

    version: str


def openai_model(model: ApiModel) -> OpenAiModel:
    """Return a model as OpenAI's API has it."""
    return OpenAiModel(id=model.name, created=int(model.created_at), fleet=model)


def openai_models(models: Sequence[ApiModel]) -> OpenAiModelList:
    """Return the response of `GET /v1/models`."""
    return OpenAiModelList(data=tuple(openai_model(model) for model in models))


def ollama_models(models: Sequence[ApiModel]) -> OllamaModelList:
    """Return the response of `GET /api/tags`."""
    return OllamaModelList(tuple(_ollama_model(model) for model in models))


def loaded_models(models: Sequence[ApiModel], until: float) -> OllamaModelList:
    """Return the response of `GET /api/ps`; the models stay loaded until a time and beyond."""
    return OllamaModelList(
        tuple(
            msgspec.structs.replace(
                _ollama_model(model),
                expires_at=ollama_time(until),
                size_vram=0,
                context_length=model.max_positions,
            )
            for model in models
        )
    )


def ollama_show(model: ApiModel) -> OllamaShow:
    """Return the response of `POST /api/show`."""
    family = _family(model)
    return OllamaShow(
        modified_at=ollama_time(model.created_at),
        details=_details(model),
        model_info={
            "general.architecture": family,
            "general.basename": model.name,
            f"{family}.context_length": model.max_positions,
        },
        capabilities=("completion",),
    )


def _ollama_model(model: ApiModel) -> OllamaModel:
    return OllamaModel(
        name=model.name,
        model=model.name,
        modified_at=ollama_time(model.created_at),
        size=model.num_bytes,
        digest=model.bundle_id,
        details=_details(model),
    )


def _details(model: ApiModel) -> OllamaDetails:
    return OllamaDetails(
        family=_family(model),
        families=(_family(model),),
        quantization_level=model.quantization,
    )


def _family(model: ApiModel) -> str:
    """Return the family of a model, as Ollama names it: ``llama`` for ``LlamaForCausalLM``."""
    return model.architecture.removesuffix("ForCausalLM").lower()
