"""The files of deploy/ against their schemas, and against each other."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from monitoring.dashboards import DASHBOARDS
from monitoring.grafana import Panel, fill_in
from observatory import dashboard_queries

from vllm_expert_prefetch.config import config_from_additional

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OPERATOR_SCHEMAS = json.loads((Path(__file__).parent / "operator_schemas.json").read_text())
KUBERNETES_VERSION = "1.30"


def documents(path: Path) -> list[dict]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def everything() -> list[Path]:
    return sorted(path for path in DEPLOY.rglob("*") if path.suffix in (".yml", ".yaml", ".json"))


def test_generated_files_are_what_the_code_makes():
    done = subprocess.run([sys.executable, str(DEPLOY / "generate.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"python deploy/generate.py brings them up to date:\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("path", everything(), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_no_key_is_there_twice(path):
    """YAML lets the last one win in silence."""

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader, node):
        keys = [loader.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{path.name}: {keys}"
        return {
            key: loader.construct_object(value, deep=True)
            for key, value in zip(keys, [v for _, v in node.value], strict=True)
        }

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    Strict.add_constructor("!reset", lambda loader, node: None)
    list(yaml.load_all(path.read_text(), Strict))


@pytest.mark.parametrize("path", sorted(KUBERNETES.glob("*.yaml")), ids=lambda path: path.name)
def test_kubernetes_accepts_the_manifest(path):
    for document in documents(path):
        if document["kind"] != "Kustomization":
            validate(document)


def validate(document: dict) -> None:
    if document["kind"] in OPERATOR_SCHEMAS:
        jsonschema.validate(document, OPERATOR_SCHEMAS[document["kind"]])
    else:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize(
    ("file", "break_it"),
    [
        ("deployment.yaml", lambda d: d["spec"]["template"]["spec"]["containers"][0].update(imagee="x")),
        ("service.yaml", lambda d: d["spec"]["ports"][0].update(port="http")),
        ("servicemonitor.yaml", lambda d: d["spec"]["endpoints"][0].update(intervall="5s")),
        ("servicemonitor.yaml", lambda d: d["spec"].pop("selector")),
        ("prometheusrule.yaml", lambda d: d["spec"]["groups"][0]["rules"][0].pop("expr")),
        ("prometheusrule.yaml", lambda d: d["spec"]["groups"][0].update(interval="soon")),
    ],
)
def test_a_broken_manifest_would_be_noticed(file, break_it):
    (document,) = documents(KUBERNETES / file)
    break_it(document)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(document)


def test_the_kustomization_names_every_manifest():
    (kustomization,) = documents(KUBERNETES / "kustomization.yaml")
    files = {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files


def test_service_monitor_and_pods_find_each_other():
    (deployment,), (service,), (monitor,) = (
        documents(KUBERNETES / f"{name}.yaml") for name in ("deployment", "service", "servicemonitor")
    )
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= {
        port["name"] for port in service["spec"]["ports"]
    }
    assert service["metadata"]["name"] == prometheus_job(), "the job label that an alert selects by"


def prometheus_job() -> str:
    (config,) = documents(DEPLOY / "prometheus" / "prometheus.yml")
    (job,) = config["scrape_configs"]
    return job["job_name"]


@pytest.mark.parametrize("name", ["docker-compose.yml", "docker-compose.cpu.yml"])
def test_compose_accepts_the_file(name, tmp_path):
    path = DEPLOY / name
    if "!reset" in path.read_text():  # a tag of compose's own, which says that the value is taken away
        path = tmp_path / name
        path.write_text((DEPLOY / name).read_text().replace("!reset null", "{}"))
    assert check_compose(path).returncode == 0, check_compose(path).stdout


def test_a_broken_compose_file_would_be_noticed(tmp_path):
    (content,) = documents(DEPLOY / "docker-compose.yml")
    content["services"]["vllm"]["ulimit"] = {"memlock": -1}
    path = tmp_path / "docker-compose.yml"
    path.write_text(yaml.safe_dump(content))
    assert check_compose(path).returncode != 0


def check_compose(path: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_compose_mounts_what_is_there():
    (compose,) = documents(DEPLOY / "docker-compose.yml")
    on_cpu = yaml.safe_load((DEPLOY / "docker-compose.cpu.yml").read_text().replace("!reset null", "{}"))
    for service in (*compose["services"].values(), *on_cpu["services"].values()):
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"]
    asked = re.findall(r"MODEL=(/\S+) docker compose .*docker-compose.cpu.yml", (DEPLOY / "README.md").read_text())
    assert asked == [volume.split(":")[1] for volume in on_cpu["services"]["vllm"]["volumes"]]
    assert (DEPLOY / compose["services"]["vllm"]["build"]["context"] / "deploy" / "Dockerfile").exists()
    assert compose["services"]["vllm"]["ulimits"]["memlock"] == -1


def test_prometheus_and_grafana_find_each_other_in_compose():
    (compose,) = documents(DEPLOY / "docker-compose.yml")
    (config,) = documents(DEPLOY / "prometheus" / "prometheus.yml")
    (target,) = config["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target.split(":")[0] in compose["services"]
    (sources,) = documents(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml")
    host = re.fullmatch(r"http://(\w+):9090", sources["datasources"][0]["url"])
    assert host
    assert host[1] in compose["services"]
    (providers,) = documents(DEPLOY / "grafana" / "provisioning" / "dashboards" / "expert-prefetch.yml")
    mounts = [volume.split(":")[1] for volume in compose["services"]["grafana"]["volumes"]]
    assert providers["providers"][0]["options"]["path"] in mounts


def settings_of(arguments: list[str]) -> object:
    """The plugin's configuration that a command line asks for."""
    start = "--additional-config.expert_prefetch."
    values = {
        a.removeprefix(start): yaml.safe_load(b) if b != "on" else b
        for a, b in itertools.pairwise(arguments)
        if a.startswith(start)
    }
    assert arguments[arguments.index("--plugin") + 1] == "expert_prefetch"
    return config_from_additional({"expert_prefetch": values})


def test_every_command_line_asks_for_settings_that_exist():
    (compose,) = documents(DEPLOY / "docker-compose.yml")
    (deployment,) = documents(KUBERNETES / "deployment.yaml")
    (ray,) = documents(DEPLOY / "ray-serve" / "serve.yaml")
    assert settings_of(compose["services"]["vllm"]["command"])
    assert settings_of(deployment["spec"]["template"]["spec"]["containers"][0]["args"])
    assert settings_of(ray["applications"][0]["args"]["arguments"])


def test_ray_serve_accepts_the_file():
    schema = pytest.importorskip("ray.serve.schema", reason="ray is not installed")
    (config,) = documents(DEPLOY / "ray-serve" / "serve.yaml")
    assert schema.ServeDeploySchema.parse_obj(config).applications[0].deployments[0].num_replicas == 2


def test_the_dockerfile_has_every_stage_that_the_deployments_name():
    text = (DEPLOY / "Dockerfile").read_text()
    stages = set(re.findall(r"^FROM .* AS (\w+)$", text, re.MULTILINE))
    assert stages == {"gpu", "cpu"}
    for name in ("docker-compose.yml", "docker-compose.cpu.yml"):
        platform = re.search(r"PLATFORM: (\w+)", (DEPLOY / name).read_text())
        assert platform
        assert platform[1] in stages
    for source in re.findall(r"/src/(\S+\.py)", text):
        assert (ROOT / source).exists()


def without_none(value):
    """As Grafana's own model writes it: it leaves out what is empty by default."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def lost(ours, theirs, path="") -> list[str]:
    """Where `theirs` has not what `ours` has."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            where
            for key, value in ours.items()
            for where in (lost(value, theirs[key], f"{path}.{key}") if key in theirs else [f"{path}.{key}"])
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            where for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) for where in lost(a, b, f"{path}[{i}]")
        ]
    return [] if ours == theirs else [f"{path}: {ours!r} became {theirs!r}"]


def through_grafanas_model(dashboard: dict) -> dict:
    cog = pytest.importorskip("grafana_foundation_sdk.cog.encoder", reason="grafana-foundation-sdk is not installed")
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    return json.loads(cog.JSONEncoder().encode(Dashboard.from_json(dashboard)))


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_grafanas_own_model_keeps_every_field(dashboard):
    """What its model does not know, it drops: a misspelt field would be lost."""
    ours = without_none(dashboard.as_json())
    assert lost(ours, without_none(through_grafanas_model(dashboard.as_json()))) == []


def test_a_misspelt_field_would_be_noticed():
    dashboard = DASHBOARDS[0].as_json()
    dashboard["panels"][0]["gridPoss"] = dashboard["panels"][0].pop("gridPos")
    dashboard["refreshh"] = "5s"
    found = lost(without_none(dashboard), without_none(through_grafanas_model(dashboard)))
    assert any("gridPoss" in where for where in found)
    assert any("refreshh" in where for where in found)


def every_panel() -> list[Panel]:
    return [panel for dashboard in DASHBOARDS for panel in dashboard.panels if panel.kind != "row"]


@pytest.mark.parametrize("panel", every_panel(), ids=lambda panel: panel.title)
def test_every_panel_says_what_it_shows_in_which_unit(panel):
    assert len(panel.description) > 15
    assert panel.description.endswith(".")
    assert panel.unit
    assert panel.targets


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_panels_do_not_overlap_and_stay_on_the_grid(dashboard):
    taken = set()
    for panel in dashboard.as_json()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken
        taken |= cells
    ids = [panel["id"] for panel in dashboard.as_json()["panels"]]
    assert len(set(ids)) == len(ids)


def test_dashboards_choose_model_instance_and_rank():
    for dashboard in DASHBOARDS[:3]:
        assert [variable["name"] for variable in dashboard.variables] == ["datasource", "model", "instance", "rank"]
    assert [variable["name"] for variable in DASHBOARDS[3].variables] == ["datasource", "a", "b"]


def test_every_variable_in_a_query_is_declared():
    for query in dashboard_queries("somewhere:1"):
        assert "$" not in query.expression
    with pytest.raises(KeyError):
        fill_in("up{instance=~'$nobody'}", {}, "1m")
