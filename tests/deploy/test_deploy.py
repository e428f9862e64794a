"""deploy/ fits the programs: commands, options, ports, images, metrics and times.

No container is built or started here, and no cluster is used.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import typer.main
from prometheus_client import CollectorRegistry, Metric, ProcessCollector

import cloud_broker_worker.worker.cli
import fleet.cli
from cloud_broker_worker.worker import worker
from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.metrics import WorkerMonitor
from fleet.bundles.manifest import Bundle
from fleet.registry.store import Registry
from fleet.server.collector import Collector
from fleet.server.home import DEFAULT_SERVICE_PORT, FleetHome
from fleet.server.metrics import FleetMonitor
from fleet.transport.in_memory import InMemoryBroker
from tests.deploy.files import (
    DEPLOY,
    ROOT,
    YAML_FILES,
    Run,
    compose,
    containers,
    dockerfile,
    documents,
    environment,
    image_name,
    manifests,
    runs,
    seconds,
    workloads,
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCALING = (ROOT / "docs/scaling.md").read_text().replace("\\\n", " ")
PROGRAMS = {
    ("fleet",): fleet.cli.app,
    ("python", "-m", "cloud_broker_worker"): cloud_broker_worker.worker.cli.app,
}
REQUIRED = {  # in addition to apiVersion, kind and metadata.name
    "Namespace": ("v1", ()),
    "PersistentVolumeClaim": ("v1", ("accessModes", "resources")),
    "Service": ("v1", ("selector", "ports")),
    "Deployment": ("apps/v1", ("selector", "template")),
    "StatefulSet": ("apps/v1", ("serviceName", "selector", "template")),
    "PodDisruptionBudget": ("policy/v1", ("selector",)),
    "NetworkPolicy": ("networking.k8s.io/v1", ("podSelector", "policyTypes")),
    "ScaledObject": ("keda.sh/v1alpha1", ("scaleTargetRef", "triggers")),
    "ServiceMonitor": ("monitoring.coreos.com/v1", ("selector", "endpoints")),
}


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


# Programs.


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_yaml_file_is_one(path: Path) -> None:
    assert all(isinstance(document, dict) for document in documents(path))


@pytest.mark.parametrize("run", list(runs()), ids=lambda run: run.where)
def test_every_command_is_one_of_ours_with_its_options(run: Run) -> None:
    program = typer.main.get_command(PROGRAMS[tuple(dockerfile()[run.image].entrypoint)])
    name, *arguments = run.arguments
    command = program.commands[name]  # type: ignore[attr-defined]
    command.make_context(name, arguments)  # raises for unknown options


def test_an_option_that_does_not_exist_would_be_found() -> None:
    worker = typer.main.get_command(cloud_broker_worker.worker.cli.app)
    command = worker.commands["run"]  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="No such option: --frobnicate"):
        command.make_context("run", ["/identity", "--frobnicate"])


def test_the_images_hold_what_the_project_is_built_of_and_extras_that_it_has() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from|deploy/)(.*) \S+$", text, re.MULTILINE)
        for word in line.split()
    }
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
        "targets"
    ]["wheel"]
    assert copied == {
        *packages["packages"],
        "pyproject.toml",
        PROJECT["readme"],
        *PROJECT["license-files"],
    }
    extras = {
        extra for found in re.findall(r"\.whl\)\[([\w,]+)\]", text) for extra in found.split(",")
    }
    assert extras == {"server", "postgres", "worker"}
    assert extras <= set(PROJECT["optional-dependencies"])


def test_the_state_is_in_the_folder_that_is_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    folder = str(FleetHome.default_folder())
    assert f"VOLUME {folder}" in dockerfile()["server"].lines
    assert f"fleet:{folder}" in compose()["services"]["server"]["volumes"]
    servers = [
        container
        for workload in workloads()
        for container in containers(workload)
        if container["name"] == "server"
    ]
    mounts = [mount for container in servers for mount in container["volumeMounts"]]
    assert {"name": "fleet", "mountPath": folder} in mounts


COMMANDS = re.findall(
    r"^ *(?:docker compose run --rm init|(?:operator )?fleet) ([^#>\n]*)", SCALING, re.MULTILINE
)


@pytest.mark.parametrize("line", [line for line in COMMANDS if not line.startswith("bench")])
def test_the_page_names_commands_that_exist(line: str) -> None:
    words = shlex.split(line.replace("$i", "1")) or compose()["services"]["init"]["command"]
    name, *arguments = words
    command = typer.main.get_command(fleet.cli.app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, arguments)


# Images, ports, times.


def test_images_are_targets_of_the_dockerfile_at_the_projects_version() -> None:
    references = {service["image"] for service in compose()["services"].values()}
    ours = {reference for reference in references if reference.startswith("cecollm-fleet/")}
    assert ours == {f"cecollm-fleet/{name}:{PROJECT['version']}" for name in dockerfile()}
    assert all(re.search(r":v?\d", reference) for reference in references), "each has a version"
    for service in compose()["services"].values():
        if "build" in service:
            assert service["build"]["target"] == image_name(service["image"])
    (kustomization,) = documents(DEPLOY / "kubernetes/kustomization.yaml")
    tags = {image["name"]: image["newTag"] for image in kustomization["images"]}
    used = {container["image"] for workload in workloads() for container in containers(workload)}
    assert tags == dict.fromkeys(used, PROJECT["version"])


def test_devices_reach_the_service_where_it_listens() -> None:
    inside = [document for document in manifests() if document["metadata"]["name"] == "server"]
    (service,) = [document for document in inside if document["kind"] == "Service"]
    (server,) = [document for document in inside if document["kind"] == "Deployment"]
    assert {"name": "service", "port": DEFAULT_SERVICE_PORT} in service["spec"]["ports"]
    (container,) = (each for each in containers(server) if each["name"] == "server")
    assert {"name": "service", "containerPort": DEFAULT_SERVICE_PORT} in container["ports"]
    assert option(container["args"], "--listen") == "0.0.0.0"
    assert (
        f"{DEFAULT_SERVICE_PORT}:{DEFAULT_SERVICE_PORT}" in compose()["services"]["server"]["ports"]
    )


def test_every_scraper_uses_the_port_of_the_metrics() -> None:
    (port,) = {
        option(run.arguments, "--metrics-port")
        for run in runs()
        if "--metrics-port" in run.arguments
    }
    for image in dockerfile().values():
        assert any(line.startswith("EXPOSE") and line.endswith(port) for line in image.lines)
    checks = [
        service["healthcheck"]["test"]
        for name, service in compose()["services"].items()
        if "worker" in name
    ]
    assert all(f":{port}/healthz" in check[-1] for check in checks)
    (prometheus,) = documents(DEPLOY / "compose/prometheus.yaml")
    targets = {
        t
        for job in prometheus["scrape_configs"]
        for static in job["static_configs"]
        for t in static["targets"]
    }
    ours = {
        name for name, s in compose()["services"].items() if s["image"].startswith("cecollm-fleet/")
    } - {"init"}
    assert targets == {f"{name}:{port}" for name in ours}
    for manifest in manifests():
        if manifest["kind"] == "Service":
            assert [
                str(p["port"]) for p in manifest["spec"]["ports"] if p["name"] == "metrics"
            ] == [port]
    for container in probed():
        assert {"name": "metrics", "containerPort": int(port)} in container["ports"]


def probed() -> list[dict[str, Any]]:
    """Return the containers that serve."""
    return [
        container
        for workload in workloads()
        for container in workload["spec"]["template"]["spec"]["containers"]
        if "command" not in container  # else it is a shell
    ]


def test_liveness_asks_whether_it_lives_and_readiness_whether_it_serves() -> None:
    for container in probed():
        assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])


def test_a_worker_is_given_the_time_that_it_drains() -> None:
    needed = {}
    for run in runs():
        if "--drain-timeout" in run.arguments:
            needed[run.where] = (
                float(option(run.arguments, "--drain-timeout")) + worker.STOP_TIMEOUT_S
            )
    given: dict[str, float] = {
        f"compose {name}": seconds(service["stop_grace_period"])
        for name, service in compose()["services"].items()
        if "stop_grace_period" in service
    }
    for workload in workloads():
        if grace := workload["spec"]["template"]["spec"].get("terminationGracePeriodSeconds"):
            given[f"kubernetes {workload['metadata']['name']} worker"] = grace
    assert needed.keys() == given.keys()
    assert all(given[where] > needed[where] for where in needed)


# Kubernetes objects.


@pytest.mark.parametrize(
    "manifest", manifests(), ids=lambda m: f"{m['kind']}-{m['metadata']['name']}"
)
def test_an_object_has_what_its_kind_requires(manifest: dict[str, Any]) -> None:
    version, fields = REQUIRED[manifest["kind"]]
    assert manifest["apiVersion"] == version
    assert manifest.keys() <= {"apiVersion", "kind", "metadata", "spec"}
    assert set(fields) <= set(manifest.get("spec", {}))


def test_selectors_find_pods_and_mounts_find_volumes() -> None:
    pods = {workload["metadata"]["name"]: workload["spec"]["template"] for workload in workloads()}
    labels = [pod["metadata"]["labels"] for pod in pods.values()]
    for manifest in manifests():
        selector = manifest.get("spec", {}).get("selector", {})
        wanted = selector.get("matchLabels", selector if manifest["kind"] == "Service" else {})
        assert not wanted or wanted in labels
    for workload in workloads():
        volumes = {volume["name"] for volume in workload["spec"]["template"]["spec"]["volumes"]}
        mounted = {
            mount["name"]
            for container in containers(workload)
            for mount in container["volumeMounts"]
        }
        assert mounted == volumes


def test_names_that_objects_refer_to_are_there() -> None:
    names = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests()}
    for workload in workloads():
        for volume in workload["spec"]["template"]["spec"]["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in names
        if workload["kind"] == "StatefulSet":
            assert ("Service", workload["spec"]["serviceName"]) in names
    (scaled,) = (manifest["spec"] for manifest in manifests() if manifest["kind"] == "ScaledObject")
    assert (scaled["scaleTargetRef"]["kind"], scaled["scaleTargetRef"]["name"]) in names


# Rights.


def test_our_containers_have_no_capability_and_a_root_that_they_cannot_write() -> None:
    for name, service in compose()["services"].items():
        assert "no-new-privileges:true" in service["security_opt"], name
        if service["image"].startswith("cecollm-fleet/"):
            assert service["cap_drop"] == ["ALL"], name
            assert service["read_only"], name
            assert service["tmpfs"] == ["/tmp"], name


def test_our_pods_keep_the_pod_security_standard_restricted() -> None:
    for workload in workloads():
        pod = workload["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in containers(workload):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]
    (namespace,) = (each for each in manifests() if each["kind"] == "Namespace")
    labels = namespace["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_network_admits_devices_and_scrapers_alone() -> None:
    policies = {
        each["metadata"]["name"]: each["spec"]
        for each in manifests()
        if each["kind"] == "NetworkPolicy"
    }
    assert policies["default"]["podSelector"] == {}
    assert policies["default"]["policyTypes"] == ["Ingress", "Egress"]
    admitted = {
        (name, port["port"])
        for name, spec in policies.items()
        for rule in spec.get("ingress", ())
        for port in rule["ports"]
    }
    assert admitted == {("default", 9100), ("server", DEFAULT_SERVICE_PORT)}
    (scraper,) = policies["default"]["ingress"]
    assert scraper["from"], "metrics are not for everyone"


def test_no_password_is_an_argument() -> None:
    arguments = [
        argument
        for service in compose()["services"].values()
        for argument in service.get("command", ())
    ]
    arguments += [
        argument
        for workload in workloads()
        for container in containers(workload)
        for argument in container.get("args", ())
    ]
    assert [each for each in arguments if "PASS" in each or "REGISTRY" in each] == []


# Metrics.


@pytest.fixture
def exposed(tiny_bundle: Bundle, tmp_path: Path) -> set[str]:
    """Return the names of all samples of the two endpoints."""
    broker = InMemoryBroker()
    serving = worker.Worker(broker.connect("w1"), tiny_bundle, WorkerConfig(num_threads=1))
    with (
        Registry.open(tmp_path / "registry.sqlite") as registry,
        broker.connect("collector") as link,
    ):
        monitors = (
            WorkerMonitor(serving),
            FleetMonitor(registry, Collector(link, registry), link, None),
        )
        families = [family for monitor in monitors for family in monitor.collect()]
    return {name for family in [*families, *process_metrics()] for name in sample_names(family)}


def process_metrics() -> Iterable[Metric]:
    return ProcessCollector(registry=CollectorRegistry()).collect()


def sample_names(family: Metric) -> set[str]:
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(
        family.type, ("",)
    )
    return {family.name + suffix for suffix in suffixes}


def queried(queries: Iterable[str]) -> set[str]:
    return set(re.findall(r"\b(?:fleet|gen_ai|process)_\w+", " ".join(queries)))


def test_the_dashboard_shows_metrics_that_exist_and_leaves_none_of_ours_out(
    exposed: set[str],
) -> None:
    dashboard = json.loads((DEPLOY / "grafana/fleet.json").read_text())
    shown = queried(
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])
    )
    assert shown <= exposed
    own = [name for name in exposed if name.startswith(("fleet_", "gen_ai_"))]
    ours = {name.removesuffix("_bucket") for name in own}
    bare = {name.removesuffix("_bucket") for name in shown}
    assert {name for name in ours - bare if not name.endswith(("_sum", "_count"))} == set()


def test_workers_are_scaled_by_metrics_that_exist(exposed: set[str]) -> None:
    (scaled,) = (manifest["spec"] for manifest in manifests() if manifest["kind"] == "ScaledObject")
    used = queried(trigger["metadata"]["query"] for trigger in scaled["triggers"])
    assert used
    assert used <= exposed


# Alerting rules.

(ALERTS,) = documents(DEPLOY / "compose/alerts.yaml")
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
DURATION = re.compile(r"[1-9]\d*[smhd]")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alerting_rule_is_complete_and_its_metrics_exist(
    rule: dict[str, Any], exposed: set[str]
) -> None:
    assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
    assert DURATION.fullmatch(rule["for"])
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"].keys() == {"summary", "description"}
    assert all(text.endswith(".") for text in rule["annotations"].values())
    assert rule["expr"].count("(") == rule["expr"].count(")")
    used = queried([rule["expr"]])
    assert used
    assert used <= exposed


def test_alerting_rules_have_unique_names() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)


def test_a_label_in_a_text_is_one_that_its_expression_keeps() -> None:
    for rule in RULES:
        kept = {"instance"} if "by (" not in rule["expr"] else set()
        kept |= {
            name.strip()
            for names in re.findall(r"by \(([^)]*)\)", rule["expr"])
            for name in names.split(",")
        }
        used = re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values()))
        assert set(used) <= kept, rule["alert"]


def test_the_prometheus_of_compose_reads_the_alerting_rules() -> None:
    (prometheus,) = documents(DEPLOY / "compose/prometheus.yaml")
    volumes = compose()["services"]["prometheus"]["volumes"]
    assert prometheus["rule_files"] == ["alerts.yaml"]
    assert "./alerts.yaml:/etc/prometheus/alerts.yaml:ro" in volumes
