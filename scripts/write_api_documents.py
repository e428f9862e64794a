"""Write docs/openapi.json, operator-api.json (HTTP) and asyncapi.json (MQTT) from the code's types.

Run it in .venv after a change of a request, a response, a message or a right.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

import fleet.http_api.chat_completions as chat
import fleet.http_api.ollama_answers as ollama
import fleet.http_api.ollama_fields as ollama_fields
import fleet.http_api.responses as responses
import fleet.http_api.text_completions as texts
from fleet.http_api import model_lists
from fleet.http_api.answer_writer import EVENT_STREAM, JSON_LINES
from fleet.http_api.conversation import ApiMessage
from fleet.http_api.problems import OllamaErrorBody, OpenAiErrorBody
from fleet.operator_api.catalogue import OPERATIONS
from fleet.operator_api.operation import PREFIX, Operation
from fleet.operator_api.prompt_operation import PROMPT_DEVICE
from fleet.protocol import messages, topics
from fleet.protocol.access import OWN_NAME, RULES, TARGET, Action, Role
from fleet.protocol.desired_config import DesiredConfig
from fleet.protocol.prompt import JsonObject, PromptRequest, Reply
from fleet.protocol.report import (
    DeviceLoad,
    DeviceStatus,
    GenerationReport,
    ReportReceipt,
    WorkerStatus,
)
from fleet.protocol.types import Id
from fleet.server.console.api_errors import STATUS, ApiProblem, ApiProblemBody
from fleet.version import __version__

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
SCHEMAS: Final = "#/components/schemas/{name}"
JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
TEXT: Final = "text/plain"
LICENSE: Final = {"name": "MIT", "url": "https://spdx.org/licenses/MIT.html"}
Schema = dict[str, Any]


def main() -> None:
    """Write the files."""
    for name, document in documents().items():
        (DOCS / name).write_text(as_text(document), encoding="utf-8")


def documents() -> dict[str, dict[str, Any]]:
    """Return the documents by the names of their files."""
    return {
        "openapi.json": openapi_document(),
        "operator-api.json": operator_api_document(),
        "asyncapi.json": asyncapi_document(),
    }


def as_text(document: dict[str, Any]) -> str:
    """Return a document as the text of its file."""
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def info(title: str, description: str) -> dict[str, Any]:
    """Return the part about the document itself."""
    return {
        "title": title,
        "version": __version__,
        "description": description,
        "license": LICENSE,
    }


def nodes(value: Any) -> Iterator[Schema]:
    """Yield each object in a value of JSON, the outermost first."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, dict | list | tuple):
            yield from nodes(each)


def component_schemas(types: Iterable[Any]) -> dict[str, Schema]:
    """Return the schemas of types, and of those inside them, by name."""
    _, components = msgspec.json.schema_components(list(types), ref_template=SCHEMAS)
    use_ecma_patterns(components)
    return dict(sorted(components.items()))


def use_ecma_patterns(schemas: Schema) -> None:
    """Write regular expressions as ECMA-262 does, which has no ``\\A`` and ``\\Z``."""
    for schema in nodes(schemas):
        if isinstance(pattern := schema.get("pattern"), str):
            schema["pattern"] = pattern.replace(r"\A", "^").replace(r"\Z", "$")


def schema_of(kind: Any) -> Schema:
    """Return a reference to the schema of a type."""
    return {"$ref": SCHEMAS.format(name=kind.__name__)}


# HTTP


class Answer(NamedTuple):
    """A path that answers: its request, its whole response, and a part of its stream.

    `refused` are the fields without a meaning, with the values that change nothing.
    """

    summary: str
    body: Any
    whole: Any
    part: Any
    refused: dict[str, tuple[Any, ...]]


OPENAI_ANSWERS: Final = {
    "/v1/chat/completions": Answer(
        "Continue a conversation",
        chat.ChatCompletionBody,
        chat.ChatCompletion,
        chat.ChatCompletionChunk,
        chat.NEUTRAL,
    ),
    "/v1/completions": Answer(
        "Continue a text",
        texts.TextCompletionBody,
        texts.TextCompletion,
        texts.TextCompletion,
        texts.NEUTRAL,
    ),
    "/v1/responses": Answer(
        "Respond to an input",
        responses.ResponseBody,
        responses.ResponseObject,
        None,
        responses.NEUTRAL,
    ),
}
OLLAMA_ANSWERS: Final = {
    "/api/chat": Answer(
        "Chat",
        ollama.OllamaChatBody,
        ollama.OllamaChatLine,
        ollama.OllamaChatLine,
        ollama_fields.NEUTRAL,
    ),
    "/api/generate": Answer(
        "Generate",
        ollama.OllamaGenerateBody,
        ollama.OllamaGenerateLine,
        ollama.OllamaGenerateLine,
        ollama_fields.NEUTRAL | ollama.NEUTRAL,
    ),
}
READS: Final = {
    "/v1/models": ("List the models", model_lists.OpenAiModelList),
    "/v1/models/{name}": ("Show one model", model_lists.OpenAiModel),
    "/api/tags": ("List the models of Ollama", model_lists.OllamaModelList),
    "/api/ps": ("List the loaded models", model_lists.OllamaModelList),
    "/api/version": ("Show the version", model_lists.OllamaVersion),
}
TYPED_FIELDS: Final = {
    (chat.ChatCompletionBody, "messages"): {"type": "array", "items": schema_of(ApiMessage)},
    (ollama.OllamaChatBody, "messages"): {"type": "array", "items": schema_of(ApiMessage)},
    (ollama.OllamaChatBody, "options"): schema_of(ollama_fields.OllamaOptions),
    (ollama.OllamaGenerateBody, "options"): schema_of(ollama_fields.OllamaOptions),
}
"""Fields that the code reads as plain JSON first, with the types that it converts them to."""

EVENT: Final = {
    "type": "object",
    "description": "An event of a response; its fields depend on its type.",
    "properties": {"type": {"type": "string"}, "sequence_number": {"type": "integer"}},
    "required": ["type", "sequence_number"],
}
DOCUMENT_OF_HTTP: Final = info(
    "CE-CoLLM Fleet: HTTP API of a device and of a fleet",
    "The paths of OpenAI's and of Ollama's API. docs/api.md describes them. Made by "
    "scripts/write_api_documents.py.",
)


def openapi_document() -> dict[str, Any]:
    """Return the description of the HTTP API in the form of OpenAPI 3.1."""
    answers = OPENAI_ANSWERS | OLLAMA_ANSWERS
    paths = {path: {"post": answer_operation(path, each)} for path, each in answers.items()}
    paths |= {path: {"get": read_operation(path, *each)} for path, each in READS.items()}
    paths["/api/show"] = {"post": show_operation()}
    paths["/"] = {"get": root_operation()}
    return {
        "openapi": "3.1.0",
        "info": DOCUMENT_OF_HTTP,
        "servers": [{"url": "http://127.0.0.1:11434", "description": "As `--api` sets it."}],
        "security": [{"key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": http_schemas(),
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Not needed where a device listens on a loopback address.",
                }
            },
        },
    }


def http_schemas() -> dict[str, Schema]:
    """Return the schemas of all bodies."""
    answers = [*OPENAI_ANSWERS.values(), *OLLAMA_ANSWERS.values()]
    kinds = {each for answer in answers for each in (answer.body, answer.whole, answer.part)}
    kinds |= {kind for _, kind in READS.values()}
    kinds |= {ApiMessage, ollama_fields.OllamaOptions, OpenAiErrorBody, OllamaErrorBody}
    kinds |= {model_lists.OllamaShowBody, model_lists.OllamaShow}
    schemas = component_schemas(sorted(kinds - {None}, key=lambda kind: kind.__name__))
    for answer in answers:
        allow_only(schemas[answer.body.__name__], answer.refused)
    allow_only(schemas[ollama_fields.OllamaOptions.__name__], ollama_fields.NEUTRAL_OPTIONS)
    for (kind, field), schema in TYPED_FIELDS.items():
        schemas[kind.__name__]["properties"][field] = schema
    return schemas


def allow_only(schema: Schema, refused: dict[str, tuple[Any, ...]]) -> None:
    """Let fields without a meaning have only the values that change nothing."""
    for name, values in refused.items():
        schema["properties"][name] = {
            "enum": [None, *values],
            "default": None,
            "description": "Not supported.",
        }


def operation(path: str, method: str, summary: str, result: dict[str, Any]) -> dict[str, Any]:
    """Return an operation without a body."""
    words = path.strip("/").replace("{", "").replace("}", "").replace(".", "_")
    error = OllamaErrorBody if path.startswith("/api/") else OpenAiErrorBody
    failure = {
        "description": "An error; docs/api.md has the statuses.",
        "headers": {
            "Retry-After": {
                "description": "Seconds until the request may be repeated; with 429 and 503.",
                "schema": {"type": "integer"},
            }
        },
        "content": {JSON: {"schema": schema_of(error)}},
    }
    return {
        "operationId": "_".join([method, *words.split("/")]).strip("_"),
        "summary": summary,
        "tags": ["Ollama" if path.startswith("/api/") else "OpenAI"],
        "responses": {"200": result, "default": failure},
    }


def with_body(described: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Return an operation with the type of its body."""
    body = {"required": True, "content": {JSON: {"schema": schema_of(kind)}}}
    return described | {"requestBody": body}


def answer_operation(path: str, answer: Answer) -> dict[str, Any]:
    """Return the operation of a path that answers, as one object or as a stream."""
    is_ollama = path in OLLAMA_ANSWERS
    part = schema_of(answer.part) if answer.part else EVENT
    result = {
        "description": "The answer: one object, or with `stream` a line or an event for each "
        "token. The schema of a stream is that of one line, or of the data of one event.",
        "content": {
            JSON: {"schema": schema_of(answer.whole)},
            JSON_LINES if is_ollama else EVENT_STREAM: {"schema": part},
        },
    }
    return with_body(operation(path, "post", answer.summary, result), answer.body)


def read_operation(path: str, summary: str, kind: Any) -> dict[str, Any]:
    """Return the operation of a path that only shows something."""
    result = {"description": summary, "content": {JSON: {"schema": schema_of(kind)}}}
    described = operation(path, "get", summary, result)
    if "{name}" in path:
        described["parameters"] = [
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return described


def show_operation() -> dict[str, Any]:
    """Return the operation that shows one model of Ollama."""
    content = {JSON: {"schema": schema_of(model_lists.OllamaShow)}}
    result = {"description": "The model", "content": content}
    described = operation("/api/show", "post", "Show one model of Ollama", result)
    return with_body(described, model_lists.OllamaShowBody)


def root_operation() -> dict[str, Any]:
    """Return the operation by which clients look whether a server is there."""
    content = {TEXT: {"schema": {"type": "string"}}}
    result = {"description": "One line of text", "content": content}
    return operation("/", "get", "Look whether the server is there", result)


# The API of operators


DOCUMENT_OF_OPERATORS: Final = info(
    "CE-CoLLM Fleet: API of operators",
    "What an operator can read and change, as `fleet --server URL` and the console do. Each "
    "operation needs a role, and an admin has the rights of an operator, an operator those of a "
    "viewer. Lists have pages: `next_page` is the `after` of the next request. Made by "
    "scripts/write_api_documents.py.",
)


def operator_api_document() -> dict[str, Any]:
    """Return the description of the API of operators in the form of OpenAPI 3.1."""
    kinds = {each.request for each in OPERATIONS} | {each.response for each in OPERATIONS}
    kinds |= {ApiProblemBody, ApiProblem, PromptRequest, Reply}
    schemas = component_schemas(sorted(kinds, key=lambda kind: kind.__name__))
    paths: dict[str, dict[str, Any]] = {}
    for each in OPERATIONS:
        item = paths.setdefault(PREFIX + each.path, {})
        item[each.method.lower()] = operator_operation(each, schemas[each.request.__name__])
    paths[PREFIX + PROMPT_DEVICE.path] = {"post": prompt_operation()}
    requests = {each.request.__name__ for each in OPERATIONS}
    return {
        "openapi": "3.1.0",
        "info": DOCUMENT_OF_OPERATORS,
        "servers": [{"url": "https://127.0.0.1:8444", "description": "As `--console` sets it."}],
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": {name: each for name, each in schemas.items() if name not in requests},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def prompt_operation() -> dict[str, Any]:
    """Return the operation whose response is a stream."""
    events = {
        "type": "string",
        "description": "Events `reply`, whose data is a `Reply` with its `trace`, and at most one "
        "event `problem`, whose data is an `ApiProblem`. Lines with a colon first mean nothing.",
    }
    problem = {"description": "An error.", "content": {JSON: {"schema": schema_of(ApiProblemBody)}}}
    return {
        "operationId": "post_devices_device_prompts",
        "summary": PROMPT_DEVICE.summary,
        "description": f"Needs the role {PROMPT_DEVICE.role}. Closing the connection ends the "
        "answer. Neither the prompt nor the answer is stored at the server.",
        "tags": ["devices"],
        "parameters": [
            {"name": "device", "in": "path", "required": True, "schema": {"type": "string"}}
        ],
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": schema_of(PROMPT_DEVICE.request)}},
        },
        "responses": {
            "200": {"description": "The stream.", "content": {EVENT_STREAM: {"schema": events}}},
            "default": problem,
        },
    }


def operator_operation(described: Operation[Any, Any], request: Schema) -> dict[str, Any]:
    """Return an operation; `request` is the schema of all its fields."""
    statuses = sorted({status for status in STATUS.values() if status >= 400})
    listed = ", ".join(map(str, statuses))
    failure = {
        "description": f"An error: {listed}, or 500.",
        "content": {JSON: {"schema": schema_of(ApiProblemBody)}},
    }
    content = {JSON: {"schema": schema_of(described.response)}}
    words = re.findall(r"\w+", described.path.replace("-", "_"))
    result: dict[str, Any] = {
        "operationId": "_".join([described.method.lower(), *words]),
        "summary": described.summary,
        "description": f"Needs the role {described.role}.",
        "tags": [words[0]],
        "parameters": [*operator_parameters(described, request)],
        "responses": {
            "200": {"description": "The response.", "content": content},
            "default": failure,
        },
    }
    if described.has_body:
        body = operator_body(described, request)
        result["requestBody"] = {"required": True, "content": {JSON: {"schema": body}}}
    return result


def operator_parameters(
    described: Operation[Any, Any], request: Schema
) -> Iterator[dict[str, Any]]:
    """Yield the fields of the path and of the query."""
    required = request.get("required", [])
    for name, schema in request["properties"].items():
        is_path = name in described.path_fields
        if is_path or not described.has_body:
            yield {
                "name": name,
                "in": "path" if is_path else "query",
                "required": is_path or name in required,
                "schema": schema,
            }


def operator_body(described: Operation[Any, Any], request: Schema) -> Schema:
    """Return the schema of a request without the fields of its path."""
    path = described.path_fields
    fields = {name: each for name, each in request["properties"].items() if name not in path}
    required = [name for name in request.get("required", []) if name not in path]
    return request | {"properties": fields, "required": required}


# MQTT


class Channel(NamedTuple):
    """A kind of topic: the function that builds it, its messages, and how they are published."""

    build: Callable[..., str]
    kinds: tuple[tuple[Any, str], ...]
    qos: int = 1
    is_retained: bool = False


def revoked() -> str:
    """The topic of the denylist."""
    return topics.REVOKED


PARTS: Final = {
    "device": "Name of a device.",
    "app": "Name of an app, or of a server under its own name.",
    "request": "Id of a request, which the app chooses.",
    "channel": "Name of a channel, which the app chooses.",
    "worker": "Name of a worker.",
    "session": "Name of a session, a new one for every answer.",
}
CHANNELS: Final = {
    "deviceStatus": Channel(topics.device_status, ((DeviceStatus, JSON),), is_retained=True),
    "deviceStats": Channel(topics.device_stats, ((GenerationReport, MSGPACK),), qos=0),
    "deviceLoad": Channel(topics.device_load, ((DeviceLoad, JSON),), qos=0),
    "deviceReported": Channel(topics.device_reported, ((ReportReceipt, MSGPACK),), qos=0),
    "devicePrompt": Channel(topics.device_prompt, ((PromptRequest, JSON), (str, TEXT))),
    "deviceReply": Channel(topics.device_reply, ((Reply, JSON),)),
    "deviceCancel": Channel(topics.device_cancel, ((None, TEXT),)),
    "deviceConfig": Channel(topics.device_config, ((DesiredConfig, JSON),), is_retained=True),
    "appEvent": Channel(topics.app_event, ((JsonObject, JSON), (str, TEXT))),
    "revoked": Channel(revoked, ((list[Id], JSON),), is_retained=True),
    "openSession": Channel(topics.open_session, ((messages.Open, MSGPACK),)),
    "toWorker": Channel(
        topics.to_worker, tuple((kind, MSGPACK) for kind in messages.ToWorker.__args__), qos=0
    ),
    "toDevice": Channel(
        topics.to_device, tuple((kind, MSGPACK) for kind in messages.ToDevice.__args__), qos=0
    ),
    "workerStatus": Channel(topics.worker_status, ((WorkerStatus, JSON),), is_retained=True),
}
MESSAGE_NAMES: Final[dict[Any, str]] = {
    str: "text",
    None: "anything",
    JsonObject: "object",
    list[Id]: "names",
}
ACTIONS: Final = {Action.PUBLISH: "send", Action.SUBSCRIBE: "receive"}
DOCUMENT_OF_MQTT: Final = info(
    "CE-CoLLM Fleet: MQTT protocol",
    "The topics and messages of apps, devices, workers and servers. docs/protocol.md describes "
    "them. Each operation is a right of one role, which its tag names. Made by "
    "scripts/write_api_documents.py.",
)


def asyncapi_document() -> dict[str, Any]:
    """Return the description of the protocol in the form of AsyncAPI 3.0."""
    return {
        "asyncapi": "3.0.0",
        "info": DOCUMENT_OF_MQTT,
        "defaultContentType": JSON,
        "servers": {
            "broker": {
                "host": "127.0.0.1:8883",
                "protocol": "secure-mqtt",
                "protocolVersion": "3.1.1",
                "description": "The fleet's broker, with TLS.",
                "security": [{"$ref": "#/components/securitySchemes/certificate"}],
            }
        },
        "channels": {name: channel_object(each) for name, each in CHANNELS.items()},
        "operations": dict(operations()),
        "components": {
            "schemas": message_schemas(),
            "securitySchemes": {
                "certificate": {
                    "type": "X509",
                    "description": "The certificate of an identity; its name is the user name.",
                }
            },
        },
    }


def address(channel: Channel) -> tuple[str, list[str]]:
    """Return the topic of a channel with its parameters in braces, and their names."""
    names = list(inspect.signature(channel.build).parameters)
    return channel.build(*(f"{{{name}}}" for name in names)), names


def channel_object(channel: Channel) -> dict[str, Any]:
    """Return a channel with its messages."""
    topic, names = address(channel)
    return {
        "address": topic,
        "description": (channel.build.__doc__ or "").strip(),
        "parameters": {name: {"description": PARTS[name]} for name in names},
        "messages": {
            message_name(kind): {
                "contentType": content_type,
                "payload": payload_of(kind),
            }
            for kind, content_type in channel.kinds
        },
    }


def message_name(kind: Any) -> str:
    """Return the name of a message in its channel."""
    return MESSAGE_NAMES.get(kind) or str(kind.__name__)


def payload_of(kind: Any) -> Schema:
    """Return the schema of a payload; a cancellation may have any."""
    if kind is None:
        return {}
    return schema_of(kind) if isinstance(kind, type) and kind is not str else inline_schema(kind)


def inline_schema(kind: Any) -> Schema:
    """Return the schema of a type that is no struct."""
    schema = msgspec.json.schema(kind)
    use_ecma_patterns(schema)
    return schema


def message_schemas() -> dict[str, Schema]:
    """Return the schemas of all payloads that are structs."""
    kinds = [kind for channel in CHANNELS.values() for kind, _ in channel.kinds]
    structs = {kind for kind in kinds if isinstance(kind, type) and kind is not str}
    schemas = component_schemas(sorted(structs, key=lambda kind: kind.__name__))
    draft_7(schemas)
    return schemas


def draft_7(schemas: Schema) -> None:
    """Write tuples as draft 7 of JSON Schema does, which is AsyncAPI's own."""
    for schema in nodes(schemas):
        if "prefixItems" in schema:
            schema["items"] = schema.pop("prefixItems")


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield an operation for each right of each role, by its name."""
    for role, table in RULES.items():
        for action, rules in table.items():
            for rule in rules:
                name, channel = channel_of(rule)
                key = f"{role}{action.title()}{name[0].upper()}{name[1:]}"
                yield key, operation_object(role, action, rule, name, channel)


def channel_of(rule: str) -> tuple[str, Channel]:
    """Return the channel of a right and its name."""
    shape = rule.replace(OWN_NAME, topics.ANY).replace(TARGET, topics.ANY)
    for name, channel in CHANNELS.items():
        num_names = len(inspect.signature(channel.build).parameters)
        if channel.build(*[topics.ANY] * num_names) == shape:
            return name, channel
    raise LookupError(f"add the topic {shape} to CHANNELS")


def operation_object(
    role: Role, action: Action, rule: str, name: str, channel: Channel
) -> dict[str, Any]:
    """Return the operation of a role on a channel."""
    binding: dict[str, Any] = {"qos": channel.qos, "bindingVersion": "0.2.0"}
    if action is Action.PUBLISH:
        binding["retain"] = channel.is_retained
    limited = rule.replace(OWN_NAME, "<own name>").replace(TARGET, "<granted name>")
    described: dict[str, Any] = {
        "action": ACTIONS[action],
        "channel": {"$ref": f"#/channels/{name}"},
        "summary": f"{role.with_article.capitalize()} may {action} on {limited}.",
        "tags": [{"name": str(role)}],
        "bindings": {"mqtt": binding},
    }
    if channel.build is topics.device_prompt:
        described["reply"] = {"channel": {"$ref": "#/channels/deviceReply"}}
    return described


if __name__ == "__main__":
    main()
