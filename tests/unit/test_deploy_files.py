"""Images, compose and Kubernetes files: they can be read, and agree with each other and with kvtier."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvtier.config import Settings
from kvtier.doctor import VLLM_RANGE
from kvtier.listen_address import ListenAddress

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
GIB = 1 << 30
VLLM_PORT = 8000


class ComposeLoader(yaml.SafeLoader):
    """Knows compose's own tag for what a file takes back of the one before."""


ComposeLoader.add_constructor("!reset", lambda _loader, _node: None)


def load(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), ComposeLoader)


def documents(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The objects of a manifest by kind and name."""
    found = [doc for doc in yaml.safe_load_all(path.read_text(encoding="utf-8")) if doc]
    return {(doc["kind"], doc["metadata"]["name"]): doc for doc in found}


COMPOSE = load(DEPLOY / "docker-compose.yml")
COMPOSE_CPU = load(DEPLOY / "docker-compose.cpu.yml")
ENGINE = documents(KUBERNETES / "engine" / "kvtier.yaml")
CONTROL = documents(KUBERNETES / "control" / "control.yaml")
POD = ENGINE["Deployment", "vllm"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
PROMETHEUS = load(DEPLOY / "prometheus" / "prometheus.yml")


def size_bytes(text: str) -> int:
    """Read a size of compose (`36gb`) or Kubernetes (`66Gi`), or the default of `${NAME:-36gb}`."""
    default = re.fullmatch(r"\$\{\w+:-(.*)\}", text)
    number, unit = re.fullmatch(r"(\d+)\s*(gb|Gi)", default[1] if default else text).groups()  # type: ignore[union-attr]
    return int(number) * {"gb": GIB, "Gi": GIB}[unit]


def dockerfile(name: str) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile and their arguments."""
    text = (DEPLOY / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def test_every_yaml_and_json_file_can_be_read() -> None:
    for path in DEPLOY.rglob("*.y*ml"):
        assert list(yaml.load_all(path.read_text(encoding="utf-8"), ComposeLoader)), path
    for path in DEPLOY.rglob("*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_an_image_copies_only_what_is_there_and_not_ignored(name: str) -> None:
    ignored = (DEPLOY / f"{name}.dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    copied = [
        source
        for instruction, text in dockerfile(name)
        if instruction == "COPY"
        for source in [word for word in text.split() if not word.startswith("--")][:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_an_image_has_what_building_kvtier_reads(name: str) -> None:
    copied = " ".join(text for instruction, text in dockerfile(name) if instruction == "COPY")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for needed in ("pyproject.toml", "kvtier", *re.findall(r"(?:README|LICENSE)[.\w]*", project)):
        assert needed in copied


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_an_image_serves_as_a_user_whose_id_kubernetes_knows(name: str) -> None:
    instructions = dict(dockerfile(name))
    assert json.loads(instructions["ENTRYPOINT"])[-2:] == ["kvtier", "serve"]
    assert int(instructions["USER"]) == POD["securityContext"]["runAsUser"]
    assert int(instructions["EXPOSE"]) == VLLM_PORT
    assert any(f"--uid {instructions['USER']}" in text for _, text in dockerfile(name))


def test_the_image_is_of_a_vllm_that_kvtier_works_with() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    found = re.search(r"vllm-openai:v(\d+)\.(\d+)", text)
    assert found
    low, high = VLLM_RANGE
    assert low <= (int(found[1]), int(found[2])) <= high


# -- compose ---------------------------------------------------------------------------------------


def test_compose_builds_from_files_and_mounts_paths_that_exist() -> None:
    build = COMPOSE["services"]["vllm"]["build"]
    context = (DEPLOY / build["context"]).resolve()
    assert context == ROOT
    for compose in (COMPOSE, COMPOSE_CPU):
        assert (context / compose["services"]["vllm"]["build"]["dockerfile"]).is_file()
    volumes = [v for service in COMPOSE["services"].values() for v in service["volumes"]]
    for source, _, _ in (volume.partition(":") for volume in volumes):
        assert (
            (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
        )


def test_compose_serves_where_prometheus_and_the_health_check_look() -> None:
    vllm = COMPOSE["services"]["vllm"]
    for compose in (COMPOSE, COMPOSE_CPU):
        command = compose["services"]["vllm"]["command"]
        assert command[command.index("--port") + 1] == str(VLLM_PORT)
    assert f":{VLLM_PORT}/health" in vllm["healthcheck"]["test"][-1]
    job = PROMETHEUS["scrape_configs"][0]
    assert job["static_configs"] == [{"targets": [f"vllm:{VLLM_PORT}"]}]
    assert "kvtier" in job["job_name"]


def test_compose_publishes_to_this_host_only_and_never_the_control_port() -> None:
    control = ListenAddress.parse(Settings().control_listen or "").port
    for service in COMPOSE["services"].values():
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:")
            assert not port.endswith(f":{control}")


def test_composes_shared_memory_holds_the_cpu_tier_and_may_be_locked() -> None:
    for compose in (COMPOSE, COMPOSE_CPU):
        vllm = compose["services"]["vllm"]
        dram_gb = float(vllm["environment"]["KVTIER_DRAM_GB"].rpartition(":-")[2].rstrip("}"))
        assert size_bytes(vllm["shm_size"]) >= (dram_gb + 1) * GIB
    assert COMPOSE["services"]["vllm"]["ulimits"]["memlock"] == -1
    assert COMPOSE_CPU["services"]["vllm"]["deploy"] is None


def test_composes_environment_is_settings() -> None:
    names = {name for c in (COMPOSE, COMPOSE_CPU) for name in c["services"]["vllm"]["environment"]}
    ours = {n.removeprefix("KVTIER_").lower() for n in names if n.startswith("KVTIER_")}
    assert ours
    assert ours <= set(Settings.model_fields)


def test_grafana_is_provisioned_with_what_is_mounted() -> None:
    mounts = {
        target.removesuffix(":ro"): source
        for source, _, target in (
            volume.partition(":") for volume in COMPOSE["services"]["grafana"]["volumes"]
        )
    }
    provisioning = DEPLOY / mounts["/etc/grafana/provisioning"]
    provider = load(provisioning / "dashboards" / "kvtier.yml")["providers"][0]
    dashboards = [target for target in mounts if target.startswith(provider["options"]["path"])]
    assert [mounts[target] for target in dashboards] == ["./grafana/dashboard.json"]
    source = load(provisioning / "datasources" / "prometheus.yml")["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    assert "127.0.0.1:9090:9090" in COMPOSE["services"]["prometheus"]["ports"]


# -- Kubernetes ------------------------------------------------------------------------------------


def settings_of(config_map: dict[str, Any], tmp_path: Path) -> Settings:
    """What kvtier makes of a ConfigMap, where its files are mounted."""
    variable = next(v for v in CONTAINER["env"] if v["name"] == "KVTIER_CONFIG_FILE")
    name = Path(variable["value"]).name
    (tmp_path / name).write_text(config_map["data"][name], encoding="utf-8")
    return Settings.load({}, {"KVTIER_CONFIG_FILE": str(tmp_path / name)})


def test_settings_of_both_overlays_are_accepted_and_differ_in_the_control_port_only(
    tmp_path: Path,
) -> None:
    base = settings_of(ENGINE["ConfigMap", "kvtier-settings"], tmp_path)
    patch = documents(KUBERNETES / "control" / "settings.yaml")["ConfigMap", "kvtier-settings"]
    opened = settings_of(patch, tmp_path)
    differing = {
        name for name in Settings.model_fields if getattr(base, name) != getattr(opened, name)
    }
    assert differing == {
        "control_listen",
        "control_tls_cert",
        "control_tls_key",
        "control_tokens_file",
    }
    assert ListenAddress.parse(base.control_listen or "").is_loopback


def test_kvtier_is_given_no_variables_of_kubernetes_own() -> None:
    """A service named kvtier-... would set KVTIER_..._SERVICE_HOST, an unknown setting."""
    assert POD["enableServiceLinks"] is False
    with pytest.raises(Exception, match="KVTIER_CONTROL_SERVICE_HOST"):
        Settings.load({}, {"KVTIER_CONTROL_SERVICE_HOST": "10.0.0.1"})


def test_kubernetes_sizes_fit_into_each_other(tmp_path: Path) -> None:
    settings = settings_of(ENGINE["ConfigMap", "kvtier-settings"], tmp_path)
    assert settings.dram_gb is not None
    shm = next(v for v in POD["volumes"] if v["name"] == "shm")["emptyDir"]
    assert shm["medium"] == "Memory"
    limit = size_bytes(CONTAINER["resources"]["limits"]["memory"])
    assert settings.dram_gb * GIB < size_bytes(shm["sizeLimit"]) < limit
    assert (
        CONTAINER["resources"]["requests"]["memory"] == (CONTAINER["resources"]["limits"]["memory"])
    )
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert mounts["shm"] == "/dev/shm"
    assert mounts.keys() == {volume["name"] for volume in POD["volumes"]}


def test_kubernetes_serves_on_the_port_that_service_and_probes_ask() -> None:
    arguments = CONTAINER["args"]
    assert arguments[arguments.index("--port") + 1] == str(VLLM_PORT)
    assert {port["name"]: port["containerPort"] for port in CONTAINER["ports"]} == {
        "http": VLLM_PORT
    }
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[probe]["httpGet"] == {"path": "/health", "port": "http"}
    service = ENGINE["Service", "vllm"]["spec"]
    assert service["ports"][0]["targetPort"] == "http"
    labels = ENGINE["Deployment", "vllm"]["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()


def test_the_service_monitor_finds_the_engines_service_and_names_the_job_kvtier() -> None:
    monitor = documents(KUBERNETES / "engine" / "monitoring.yaml")["ServiceMonitor", "kvtier"][
        "spec"
    ]
    service = ENGINE["Service", "vllm"]
    labels = service["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert "kvtier" in labels[monitor["jobLabel"]]
    ports = {port["name"] for port in service["spec"]["ports"]}
    assert {endpoint["port"] for endpoint in monitor["endpoints"]} <= ports
    # The control port's service must not be taken for an engine's.
    other = CONTROL["Service", "kvtier-control"]["metadata"]["labels"]
    assert not monitor["selector"]["matchLabels"].items() <= other.items()


def test_the_control_port_is_open_only_with_tls_and_tokens(tmp_path: Path) -> None:
    patch = documents(KUBERNETES / "control" / "settings.yaml")["ConfigMap", "kvtier-settings"]
    settings = settings_of(patch, tmp_path)
    port = ListenAddress.parse(settings.control_listen or "").port
    pod = documents(KUBERNETES / "control" / "deployment.yaml")["Deployment", "vllm"]["spec"][
        "template"
    ]["spec"]
    assert pod["containers"][0]["ports"] == [{"name": "control", "containerPort": port}]
    service = CONTROL["Service", "kvtier-control"]["spec"]["ports"][0]
    assert (service["port"], service["targetPort"]) == (port, "control")
    policy = CONTROL["NetworkPolicy", "kvtier-control"]["spec"]["ingress"]
    restricted = {rule["ports"][0]["port"]: "from" in rule for rule in policy}
    assert restricted == {VLLM_PORT: False, port: True}
    mounts = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
    for path in (settings.control_tls_cert, settings.control_tls_key, settings.control_tokens_file):
        assert str(path.parent) in mounts  # type: ignore[union-attr]
    for volume in pod["volumes"]:
        # Closed to others, or kvtier refuses the file.
        assert volume["secret"]["defaultMode"] == 0o440


def test_the_pod_may_do_no_more_than_it_needs() -> None:
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["automountServiceAccountToken"] is False
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    # What kvtier, vLLM and their libraries write to.
    assert {"/tmp", "/dev/shm", "/home/kvtier"} <= mounts


@pytest.mark.parametrize("folder", ["engine", "control"])
def test_kustomizations_name_files_that_exist(folder: str) -> None:
    path = KUBERNETES / folder
    kustomization = load(path / "kustomization.yaml")
    patches = [patch["path"] for patch in kustomization.get("patches", [])]
    for name in (*kustomization["resources"], *patches):
        assert (path / name).exists(), name
        # kustomize takes what contains it for a cycle.
        assert (path / name).resolve() not in path.resolve().parents


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on the PATH")
def test_kubectl_makes_the_same_engine_of_both() -> None:
    made = {}
    for folder in ("engine", "control"):
        done = subprocess.run(
            ["kubectl", "kustomize", KUBERNETES / folder],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = list(yaml.safe_load_all(done.stdout))
        made[folder] = {(one["kind"], one["metadata"]["name"]): one for one in found}
    assert made["engine"].keys() == ENGINE.keys() | {("ServiceMonitor", "kvtier")}
    added = made["control"].keys() - made["engine"].keys()
    assert added == {("Service", "kvtier-control"), ("NetworkPolicy", "kvtier-control")}
    changed = {key for key, one in made["engine"].items() if one != made["control"][key]}
    assert changed == {("ConfigMap", "kvtier-settings"), ("Deployment", "vllm")}
    # What the patch does not name stays.
    pod = made["control"]["Deployment", "vllm"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == CONTAINER["image"]
    assert container["resources"] == CONTAINER["resources"]
    assert [port["name"] for port in container["ports"]] == ["control", "http"]
