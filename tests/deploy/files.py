"""The files of deploy/, parsed as by the tools that use them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

ROOT: Final = Path(__file__).parents[2]
DEPLOY: Final = ROOT / "deploy"
YAML_FILES: Final = sorted(DEPLOY.rglob("*.yaml"))


class Image(NamedTuple):
    """A target of the Dockerfile with an entry point; `words` are its instructions by name."""

    entrypoint: list[str]
    command: list[str]
    lines: list[str]


class Run(NamedTuple):
    """One start of a container of this project, with its image and arguments."""

    where: str
    image: str
    arguments: list[str]


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def dockerfile() -> dict[str, Image]:
    """Return the Dockerfile's stages that have an entry point."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    stages = re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL)
    images = {}
    for name, body in stages:
        words = dict(
            line.split(maxsplit=1)
            for line in body.splitlines()
            if line and not line.startswith("#")
        )
        if "ENTRYPOINT" in words:
            images[name] = Image(
                json.loads(words["ENTRYPOINT"]), json.loads(words["CMD"]), body.splitlines()
            )
    return images


def environment() -> dict[str, str]:
    """Return the Dockerfile's variables."""
    lines = re.findall(
        r"^ENV (.*)$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE
    )
    return dict(word.split("=", 1) for line in lines for word in shlex.split(line))


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = documents(DEPLOY / "compose/compose.yaml")[0]
    return loaded


def manifests() -> list[dict[str, Any]]:
    """Return every Kubernetes object that the kustomization names."""
    folder = DEPLOY / "kubernetes"
    (kustomization,) = documents(folder / "kustomization.yaml")
    return [
        document for name in kustomization["resources"] for document in documents(folder / name)
    ]


def workloads() -> Iterator[dict[str, Any]]:
    return (
        manifest for manifest in manifests() if manifest["kind"] in ("Deployment", "StatefulSet")
    )


def containers(workload: dict[str, Any]) -> list[dict[str, Any]]:
    pod = workload["spec"]["template"]["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]


def runs() -> Iterator[Run]:
    """Return every start of our own programs, with a value for each variable."""
    for name, image in dockerfile().items():
        yield Run(f"Dockerfile {name}", name, image.command)
    for name, service in compose()["services"].items():
        if service["image"].startswith("cecollm-fleet/"):
            yield Run(f"compose {name}", image_name(service["image"]), filled(service["command"]))
    for workload in workloads():
        for container in containers(workload):
            if "command" not in container:  # else it is a shell, not our program
                where = f"kubernetes {workload['metadata']['name']} {container['name']}"
                yield Run(where, image_name(container["image"]), filled(container["args"]))


def image_name(reference: str) -> str:
    return reference.removeprefix("cecollm-fleet/").partition(":")[0]


def filled(arguments: list[str]) -> list[str]:
    return [re.sub(r"\$\{\w+[^}]*\}|\$\(\w+\)", "value", argument) for argument in arguments]


def seconds(span: str) -> int:
    """Parse Compose's ``45s``."""
    return int(span.removesuffix("s"))
