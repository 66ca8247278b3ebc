"""The compose file of a run: golden, of the Compose Specification, and what must not be in it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from test_container_spec import MACHINE, RUN, made

from tunedock import __version__
from tunedock.launch.compose_file import SERVICES, Beside, as_yaml, compose_file, services_beside
from tunedock.launch.compose_services import PROMETHEUS

GOLDEN = Path(__file__).parents[1] / "golden" / "compose"
SCHEMA = Path("/usr/lib/python3/dist-packages/compose/config/compose_spec.json")
"""That of docker-compose 1.29, where Debian's package is."""

SETTINGS = Path(__file__).parents[2] / "src/tunedock/launch/monitoring"
EVERYTHING = Beside(
    tuple(SERVICES), "tunedock-train:VERSION", str(RUN), f"{RUN}/compose", "1000:1000", {}, ("tini", "--")
)
NOTHING = replace(EVERYTHING, profiles=())


def node(number: int, spec: dict[str, Any]) -> dict[str, Any]:
    part = [*spec["Cmd"], "--node", str(number), "--meet", "node-0:29500"]
    return {**spec, "Cmd": part, "Env": [*spec["Env"], "HF_TOKEN"]}


def nodes(count: int, launch: dict[str, Any], machine: Any = MACHINE) -> list[dict[str, Any]]:
    return [node(number, made({"container": launch}, machine)) for number in range(count)]


LIMITS = {"cpus": 2, "memory": "8g", "ulimits": {"nofile": 65536}}
CASES = {
    "one-node": compose_file(nodes(1, LIMITS), NOTHING, restarts=0),
    "two-nodes-and-all-beside": compose_file(nodes(2, LIMITS), EVERYTHING, restarts=3),
    "cards": compose_file(
        [node(0, made({"container": {"gpus": 2}}, replace(MACHINE, gpus=("1", "3")))),
         node(1, made({"container": {"gpus": "all"}}, replace(MACHINE, gpus=("all",))))],
        NOTHING, restarts=3,
    ),
    "host-network": compose_file(nodes(2, {"network": "host"}), replace(EVERYTHING, meets=False), restarts=3),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_as_in_its_golden_file(name: str, request: pytest.FixtureRequest) -> None:
    text = as_yaml(CASES[name], f"{RUN}/compose.yaml").replace(__version__, "VERSION")
    file = GOLDEN / f"{name}.yaml"
    if request.config.getoption("--rewrite-golden"):
        file.write_text(text)
    assert text == file.read_text()
    assert YAML(typ="safe").load(text) == json.loads(json.dumps(CASES[name]).replace(__version__, "VERSION"))
    assert "hf_secret" not in text


@pytest.mark.parametrize("name", CASES)
def test_it_is_of_the_specification(name: str) -> None:
    if not SCHEMA.is_file():
        pytest.skip("docker-compose, whose schema this is, is not installed here")
    from jsonschema import Draft7Validator

    assert [error.message for error in Draft7Validator(json.loads(SCHEMA.read_text())).iter_errors(CASES[name])] == []


@pytest.mark.parametrize("name", CASES)
def test_compose_itself_reads_it(tmp_path: Path, name: str) -> None:
    """With a dollar sign in a path, a secret from the shell, and every profile."""
    if shutil.which("docker-compose") is None:
        pytest.skip("docker-compose is not installed here")
    file = tmp_path / "compose.yaml"
    file.write_text(as_yaml(CASES[name], str(file)))
    profiles = [word for profile in SERVICES for word in ("--profile", profile)]
    done = subprocess.run(
        ["docker-compose", "--file", str(file), *profiles, "config"],
        env={"PATH": "/usr/bin:/bin", "HF_TOKEN": "from-the-shell"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read = YAML(typ="safe").load(done.stdout)["services"]
    assert read["node-0"]["environment"]["HF_TOKEN"] == "from-the-shell"
    assert read.keys() == CASES[name]["services"].keys()


def test_a_dollar_sign_stays_one() -> None:
    spec = made({"container": {"env": ["PRICE=5$HOME"]}}, MACHINE)
    spec["HostConfig"]["Mounts"][0] |= {"Source": "/data/$ales", "Target": "/data/$ales"}
    service = compose_file([node(0, spec)], NOTHING, restarts=0)["services"]["node-0"]
    assert service["environment"]["PRICE"] == "5$$HOME"
    assert service["volumes"][0]["source"] == service["volumes"][0]["target"] == "/data/$$ales"


@pytest.mark.parametrize(
    "path",
    [
        "/data/$HOME/${HOME}",
        "/data/a b",
        "/data/x\nservices: {evil: {image: x}}",
        "/data/\"'#: \\",
        "/data/\u00fc\u6a21",
    ],
)
def test_whatever_a_path_holds_compose_reads_it_back(tmp_path: Path, path: str) -> None:
    if shutil.which("docker-compose") is None:
        pytest.skip("docker-compose is not installed here")
    given = ["NO=x", "y=1", "on=2", "A=${HOME} $B `id` \"' # : \\ \u00fc"]
    spec = made({"container": {"env": given}}, MACHINE)
    spec |= {"WorkingDir": path, "Cmd": [*spec["Cmd"], path], "Labels": {"tunedock.run": path}}
    document = compose_file([node(0, spec)], replace(EVERYTHING, run=path, files=path), restarts=0)
    file = tmp_path / "compose.yaml"
    file.write_text(as_yaml(document, f"{path}/compose.yaml"))
    command = ["docker-compose", "--file", str(file), "--profile", "tensorboard", "config"]
    done = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "HOME": "/root"}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    read = YAML(typ="safe").load(done.stdout)["services"]
    service = read["node-0"]
    doubled = path.replace("$", "$$")  # what `config` prints is a file of its own
    assert service["working_dir"] == service["labels"]["tunedock.run"] == doubled
    assert doubled in service["command"]
    assert {f"{name}={value}" for name, value in service["environment"].items()} >= {
        entry.replace("$", "$$") for entry in given
    }
    assert f"{doubled}/tensorboard" in read["tensorboard"]["command"]
    assert "evil" not in read


def test_a_network_leads_out_only_where_the_recipe_needs_it() -> None:
    alone = compose_file(nodes(2, {}), NOTHING, restarts=0)
    assert alone["networks"] == {"training": {"driver": "bridge", "internal": True}}
    out = compose_file(nodes(2, {"network": "bridge"}), NOTHING, restarts=0)
    assert out["networks"]["training"]["internal"] is False
    named = compose_file(nodes(1, {"network": "lab"}), NOTHING, restarts=0)
    assert named["networks"] == {"training": {"external": True, "name": "lab"}}
    assert "networks" not in compose_file(nodes(1, {"network": "host"}), NOTHING, restarts=0)


def test_what_is_beside_answers_this_machine_alone() -> None:
    services = CASES["two-nodes-and-all-beside"]["services"]
    ports = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert ports.keys() == {"tensorboard", "mlflow", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for given in ports.values() for port in given)
    assert {name for name, service in services.items() if "profiles" in service} == set(services_beside(SERVICES))


def test_a_mirrors_image_takes_the_place_of_the_public_one() -> None:
    mirrored = replace(EVERYTHING, images={"prometheus": "registry.example/prometheus:v3"})
    services = compose_file(nodes(1, {}), mirrored, restarts=0)["services"]
    assert services["prometheus"]["image"] == "registry.example/prometheus:v3"
    assert CASES["two-nodes-and-all-beside"]["services"]["prometheus"]["image"] == PROMETHEUS


def test_the_settings_that_are_mounted_are_there() -> None:
    services = CASES["two-nodes-and-all-beside"]["services"]
    mounted = [
        mount["source"].removeprefix(f"{RUN}/compose/")
        for service in services.values()
        for mount in service.get("volumes", ())
        if str(mount["source"]).startswith(f"{RUN}/compose/")
    ]
    assert len(mounted) == 6
    assert all((SETTINGS / name).is_file() for name in mounted)


def test_the_dashboard_asks_for_metrics_that_are_told() -> None:
    from tunedock.run import exporter

    board = json.loads((SETTINGS / "grafana/training.json").read_text())
    asked = {word for panel in board["panels"] for target in panel["targets"] for word in names_in(target["expr"])}
    asked |= names_in((SETTINGS / "alerts.yml").read_text())
    assert len(board["panels"]) == len({panel["id"] for panel in board["panels"]}) == 11
    assert asked <= set(names_in(exporter.__doc__ or "")), asked


def names_in(text: str) -> set[str]:
    return set(re.findall(r"tunedock_run_[a-z_]+", text))
