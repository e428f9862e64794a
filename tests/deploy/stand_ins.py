"""Stand-ins for docker, kubectl and sudo: ``python -m tests.deploy.stand_ins NAME ARGUMENTS``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from tests.deploy.recipe import STATE, State, compose_container, pod_containers


def docker(state: State, arguments: list[str]) -> int:
    match arguments:
        case ["compose", "build", *_]:
            return 0
        case ["compose", "run", "--rm", service, *words]:
            return compose_container(state, service, words).run()
    raise AssertionError(f"docker {arguments}: no such call in the recipe")


def kubectl(state: State, arguments: list[str]) -> int:
    match [each for each in arguments if each not in ("-n", "cecollm-fleet")]:
        case ["apply", "-f" | "-k", path]:
            return 0 if Path(path).exists() else 1
        case ["create", "secret", "generic", name, *values]:
            _create_secret(state.secrets / name, values)
            return 0
        case ["wait", "pod", "--selector", "app=server", "--for=condition=Initialized", _]:
            pod = pod_containers(state, "server", "server")
            return pod["init"].run()
        case ["exec", "deployment/server", "--container", name, "--", *command]:
            return pod_containers(state, "server", "server")[name].run(command)
    raise AssertionError(f"kubectl {arguments}: no such call in the recipe")


def _create_secret(folder: Path, values: list[str]) -> None:
    folder.mkdir(parents=True)
    for value in values:
        kind, key, content = value.split("=", 2)
        is_file = kind == "--from-file"
        (folder / key).write_text(
            Path(content).read_text(encoding="utf-8") if is_file else content, encoding="utf-8"
        )


def main() -> int:
    name, *arguments = sys.argv[1:]
    state = msgspec.json.decode(os.environ[STATE], type=State)
    if name == "sudo":  # only a change of owner, to the user of the images
        assert arguments[:2] == ["chown", "10001"]
        return 0
    return docker(state, arguments) if name == "docker" else kubectl(state, arguments)


if __name__ == "__main__":
    sys.exit(main())
