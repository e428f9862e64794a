"""docs/openapi.json, operator-api.json and asyncapi.json: made from the types, and complete.

tests/api/test_clients.py holds the first one against the specification of OpenAPI. There is no
package of Python with the schema of AsyncAPI, so a test here holds the form of the second one.
"""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from fleet.http_api.application import http_application
from fleet.operator_api.catalogue import OPERATIONS
from fleet.operator_api.operation import PREFIX as PREFIX_OF_OPERATORS
from fleet.operator_api.prompt_operation import PROMPT_DEVICE
from fleet.protocol.access import RULES
from fleet.protocol.prompt import PromptRequest, Reply, TokenLogprob, TopLogprob
from fleet.protocol.topics import PREFIX
from tests.fleet.http_api.test_writers import USAGE

jsonschema = pytest.importorskip("jsonschema")

ROOT: Final = Path(__file__).parents[2]
SCRIPT: Final = runpy.run_path(str(ROOT / "scripts/write_api_documents.py"), run_name="script")
MADE: Final[dict[str, dict[str, Any]]] = SCRIPT["documents"]()
OPENAPI: Final = MADE["openapi.json"]
OPERATOR_API: Final = MADE["operator-api.json"]
ASYNCAPI: Final = MADE["asyncapi.json"]
PROTOCOL: Final = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MADE)
def test_a_document_is_the_one_that_the_types_make(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    is_same = text == SCRIPT["as_text"](MADE[name])
    assert is_same, "run scripts/write_api_documents.py"


def test_every_route_of_the_http_api_is_described() -> None:
    routes = http_application(backend=None).router.routes()  # type: ignore[arg-type]
    served = {(route.method, route.resource.canonical) for route in routes if route.resource}
    described = {
        (method.upper(), path) for path, item in OPENAPI["paths"].items() for method in item
    }
    assert {each for each in served if each[0] != "HEAD"} == described


def test_every_operation_of_operators_is_described() -> None:
    described = {
        (method.upper(), path) for path, item in OPERATOR_API["paths"].items() for method in item
    }
    operations = (*OPERATIONS, PROMPT_DEVICE)
    assert {(each.method, PREFIX_OF_OPERATORS + each.path) for each in operations} == described


def test_every_topic_of_the_protocol_is_described() -> None:
    listed = re.findall(r"^\| `((?:d|w|e|fleet|open)/[^`]*)` \|", PROTOCOL, re.MULTILINE)
    topics = {f"{PREFIX}/{topic}" for topic in listed}
    addresses = {each["address"] for each in ASYNCAPI["channels"].values()}
    assert {re.sub(r"{(\w+)}", r"<\1>", address) for address in addresses} == topics


def test_every_right_is_an_operation() -> None:
    num_rights = sum(len(rules) for table in RULES.values() for rules in table.values())
    assert len(ASYNCAPI["operations"]) == num_rights


def test_quality_of_service_and_retention_are_those_of_the_protocol() -> None:
    rows = re.findall(r"^\| `([^`]*/[^`]*)` \| ([01]) \| (yes|no)", PROTOCOL, re.MULTILINE)
    written = {topic: (int(qos), retained == "yes") for topic, qos, retained in rows}
    made = {}
    for operation in ASYNCAPI["operations"].values():
        channel = resolved(ASYNCAPI, operation["channel"]["$ref"])
        topic = re.sub(r"{(\w+)}", r"<\1>", channel["address"]).removeprefix(f"{PREFIX}/")
        if operation["action"] == "send":
            binding = operation["bindings"]["mqtt"]
            made[topic] = (binding["qos"], binding["retain"])
    assert made == written


def resolved(document: dict[str, Any], reference: str) -> Any:
    """Return the part of a document that a reference leads to."""
    value: Any = document
    for step in reference.removeprefix("#/").split("/"):
        value = value[step.replace("~1", "/").replace("~0", "~")]
    return value


def references(value: Any) -> Iterator[str]:
    """Yield the references in a value of JSON, also those of a discriminator."""
    values = value.values() if isinstance(value, dict) else value
    for each in values:
        if isinstance(each, dict | list | tuple):
            yield from references(each)
        elif isinstance(each, str) and each.startswith("#/"):
            yield each


@pytest.mark.parametrize("name", MADE)
def test_every_reference_leads_to_a_part_of_its_document(name: str) -> None:
    document = MADE[name]
    assert all(resolved(document, each) for each in set(references(document)))


def test_the_document_of_mqtt_has_the_form_of_asyncapi() -> None:
    """The objects of AsyncAPI 3.0 with the fields that they require and those that they allow."""
    assert ASYNCAPI["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= ASYNCAPI["info"].keys()
    for channel in ASYNCAPI["channels"].values():
        assert channel.keys() == {"address", "description", "parameters", "messages"}
        assert re.findall(r"{(\w+)}", channel["address"]) == list(channel["parameters"])
        for message in channel["messages"].values():
            assert message.keys() == {"contentType", "payload"}
    for operation in ASYNCAPI["operations"].values():
        required = {"action", "channel", "summary", "tags", "bindings"}
        assert required <= operation.keys() <= required | {"reply"}
        assert operation["action"] in ("send", "receive")
        for reference in (operation["channel"], operation.get("reply", operation)["channel"]):
            assert reference["$ref"].removeprefix("#/channels/") in ASYNCAPI["channels"]
    for server in ASYNCAPI["servers"].values():
        assert {"host", "protocol"} <= server.keys()


@pytest.mark.parametrize(
    ("document", "validator"),
    [
        (OPENAPI, jsonschema.Draft202012Validator),
        (OPERATOR_API, jsonschema.Draft202012Validator),
        (ASYNCAPI, jsonschema.Draft7Validator),
    ],
    ids=["OpenAPI", "operators", "AsyncAPI"],
)
def test_every_schema_is_one(document: dict[str, Any], validator: Any) -> None:
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        validator.check_schema(schema)
    patterns = re.findall(r'"pattern": "[^"]*', json.dumps(schemas))
    assert not [each for each in patterns if r"\\A" in each or r"\\Z" in each]


def validator_of(name: str) -> Any:
    """Return a validator of one schema of the protocol."""
    schemas = ASYNCAPI["components"]
    return jsonschema.Draft7Validator(
        {"$ref": f"#/components/schemas/{name}", "components": schemas}
    )


def test_messages_of_the_code_match_their_schemas() -> None:
    top = (TopLogprob("a", 1, -0.5),)
    reply = Reply(seq=1, text="a", logprobs=(TokenLogprob("a", 1, -0.5, top),), usage=USAGE)
    validator_of("Reply").validate(json.loads(msgspec.json.encode(reply)))
    request = PromptRequest(prompt="hi", logit_bias={"7": -1.0}, top_p=0.5)
    validator_of("PromptRequest").validate(json.loads(msgspec.json.encode(request)))


@pytest.mark.parametrize(
    "fields", [{"prompt": "hi", "temperature": 6}, {"prompt": 1}, {"promt": "hi"}]
)
def test_a_wrong_request_does_not_match_the_schema(fields: dict[str, Any]) -> None:
    assert not validator_of("PromptRequest").is_valid(fields)
