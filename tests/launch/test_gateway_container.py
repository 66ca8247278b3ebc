"""A gateway in a container: its body and its compose file, golden; what it is shown; and real ones that answer and end in order."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from ruamel.yaml import YAML
from typer.testing import CliRunner

from engine_bed import Engine, HostSettings, image_build
from tunedock import __version__
from tunedock.cli.app import app
from tunedock.errors import RecipeError
from tunedock.launch.compose_file import yaml_text
from tunedock.launch.container import Image
from tunedock.launch.gateway import Caller, binds_of, gateway_body, inside, refuse_inside, variables_of
from tunedock.launch.gateway_file import Beside, gateway_file
from tunedock.launch.mounts import Bind, Caches
from tunedock.pipeline.serving_words import words_of
from tunedock.recipe.serving import Backend, EngineContainer, Jwt, ServeOrder, Start

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden" / "gateway"
SCHEMA = Path("/usr/lib/python3/dist-packages/compose/config/compose_spec.json")

HOME = "/home/ann"
CALLER = Caller(
    1000, 100, Caches.of({}, HOME), {"OMP_NUM_THREADS": "4", "HF_TOKEN": "hf_secret", "PGPASSFILE": "/home/ann/.pgpass"}
)
BOX = Start(program="vllm", container=EngineContainer(image="i", launcher=["x"]))
IMAGE = Image("sha256:abc", ("tini", "--"))
FOLDER = Backend(name="support", kind="folder", place="/exports/support", adapters={"fr": "/adapters/fr"})
PLAIN = ServeOrder(backends=[FOLDER], store="/srv/keys/access.db")
FULL = PLAIN.model_copy(update={
    "host": "10.0.0.4", "port": 443,
    "tls_cert": "/tls/c.pem", "tls_key": "/tls/k.pem", "grace_s": 60.0, "store": "postgresql://tunedock@postgres/tunedock",
    "jwt": Jwt(audience="a", issuer="i", secret_env="JWT_SECRET"), "access_log": "/var/log/tunedock/a.jsonl", "max_running": 32,
    "backends": [FOLDER, Backend(name="big", kind="vllm", place="http://gpu-1:8000/v1", key_env="BIG_KEY")],
})  # fmt: skip
BINDS = [
    Bind.at_its_place("/exports/support"),
    Bind.at_its_place("/adapters/fr"),
    Bind.at_its_place("/srv/keys", read_only=False),
]


def body(order: ServeOrder, gpus: tuple[str, ...] = ()) -> dict[str, Any]:
    return gateway_body(order, words_of(inside(order)), IMAGE, BINDS, CALLER, gpus)


def file_of(order: ServeOrder, *profiles: str, **more: Any) -> dict[str, Any]:
    beside = Beside("/home/ann/gateway", profiles, variables_of(order))
    return gateway_file(body(order, **more), beside, image="tunedock-serve:cpu", tls=order.tls_cert is not None)


BODIES = {"plain": body(PLAIN), "full": body(FULL, ("0", "1"))}
FILES = {
    "plain": file_of(PLAIN),
    "full": file_of(FULL, "postgresql", "monitoring", gpus=("0", "1")),
    "monitoring": file_of(PLAIN, "monitoring"),
}


@pytest.mark.parametrize("name", BODIES)
def test_the_body_is_as_in_its_golden_file(name: str, request: pytest.FixtureRequest) -> None:
    golden(f"{name}.json", json.dumps(BODIES[name], indent=2) + "\n", request)


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_as_in_its_golden_file(name: str, request: pytest.FixtureRequest) -> None:
    golden(f"{name}.yaml", yaml_text(FILES[name]), request)


def golden(name: str, text: str, request: pytest.FixtureRequest) -> None:
    text = text.replace(__version__, "VERSION")
    if request.config.getoption("--rewrite-golden"):
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text(), (
        "python -m pytest --rewrite-golden writes it anew; say why in the commit"
    )


def test_there_is_no_golden_file_too_many() -> None:
    assert {file.name for file in GOLDEN.iterdir()} == {*(f"{n}.json" for n in BODIES), *(f"{n}.yaml" for n in FILES)}


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_of_the_specification_and_compose_reads_it(name: str, tmp_path: Path) -> None:
    if shutil.which("docker-compose") is None or not SCHEMA.is_file():
        pytest.skip("docker-compose 1.29 is not installed here")
    from jsonschema import Draft7Validator

    assert [error.message for error in Draft7Validator(json.loads(SCHEMA.read_text())).iter_errors(FILES[name])] == []
    (tmp_path / "compose.yaml").write_text(yaml_text(FILES[name]))
    done = subprocess.run(
        ["docker-compose", "--file", str(tmp_path / "compose.yaml"), "--profile", "monitoring", "config"],
        env={"PATH": "/usr/bin:/bin", "JWT_SECRET": "from-the-shell"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    read = YAML(typ="safe").load(done.stdout)["services"]
    assert read.keys() == FILES[name]["services"].keys()
    if name == "full":
        assert read["gateway"]["environment"]["JWT_SECRET"] == "from-the-shell"


@pytest.mark.parametrize("name", FILES)
def test_of_every_file(name: str) -> None:
    """No secret's value; what asks nobody who one is, on loopback; the gateway without rights, and given its time."""
    text = yaml_text(FILES[name])
    assert "hf_secret" not in text
    services = FILES[name]["services"]
    for other in services.keys() - {"gateway"}:
        assert all(port.startswith("127.0.0.1:") for port in services[other].get("ports", ()))
    gateway = services["gateway"]
    assert gateway["read_only"] and gateway["cap_drop"] == ["ALL"] and "/ready" in gateway["healthcheck"]["test"][-1]
    assert int(gateway["stop_grace_period"].removesuffix("s")) > (60 if name == "full" else 30)
    written = [volume["source"] for volume in gateway["volumes"] if not volume.get("read_only")]
    assert written == ["/srv/keys"]


def test_what_it_is_shown(tmp_path: Path) -> None:
    """Models and secrets, not to be written; the folders of the store and of the log, which are made."""
    model = tmp_path / "m"
    model.mkdir()
    (model / "model.gguf").write_bytes(b"GGUF")
    order = ServeOrder(
        backends=[Backend(name="m", kind="gguf", place=str(model / "model.gguf"))], store=str(tmp_path / "keys/access.db"),
        access_log=str(tmp_path / "log/a.jsonl"), tls_cert=str(tmp_path / "tls/c.pem"),
        jwt=Jwt(audience="a", issuer="i", secret_file=str(tmp_path / "jwt"), jwks="https://x/keys"),
    )  # fmt: skip
    shown = {bind.source: bind.read_only for bind in binds_of(order, replace(CALLER, environment={}))}
    wanted = {"m": True, "tls/c.pem": True, "jwt": True, "keys": False, "log": False}
    assert shown == {str(tmp_path / name): read_only for name, read_only in wanted.items()}
    assert (tmp_path / "keys").is_dir() and (tmp_path / "log").is_dir()
    with pytest.raises(RecipeError, match="no container gets to see"):
        binds_of(order.model_copy(update={"store": "/etc/access.db"}), CALLER)
    with pytest.raises(RecipeError, match="where a container can write"):
        binds_of(order.model_copy(update={"store": None}), CALLER)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"open": True}, "anybody could call"),
        ({"port": 0}, "has a number"),
        ({"backends": [Backend(name="m", kind="version", place="models:/m@production")]}, "what a registry names changes"),
        ({"backends": [Backend(name="m", kind="openai", place="http://localhost:1/v1")]}, "is in the container"),
        ({"backends": [Backend(name="m", kind="openai", place="http://127.0.0.9:1/v1")]}, "is in the container"),
        (
            {"backends": [FOLDER.model_copy(update={"start": BOX})]},
            "starts no other container",
        ),
    ],
)  # fmt: skip
def test_what_a_container_cannot_serve(change: Mapping[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        refuse_inside(PLAIN.model_copy(update=change))
    assert says in caught.value.message and caught.value.hint


def test_what_is_for_compose_alone(tmp_path: Path) -> None:
    for words in (
        ["--write"],
        ["--on", "docker", "--profile", "monitoring"],
        ["--on", "compose", "--service-image", "x=y"],
    ):
        done = CliRunner().invoke(app, ["serve", "http://gpu-1:8000/v1", *words])
        assert isinstance(done.exception, RecipeError) and done.exception.hint


# -- real ones ---------------------------------------------------------------------------------------------------------

MESSAGES: Any = [{"role": "user", "content": "My kettle is broken. It is order 4071."}]


def tunedock(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "tunedock", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def until(true: Callable[[], bool], said: Callable[[], str], limit_s: float = 180.0) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            if true():
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline, said()
        time.sleep(0.3)


@pytest.fixture(scope="module")
def serve_image(engine: Engine, base_image: str, host_settings: HostSettings) -> str:
    built = image_build(
        engine, host_settings, "cpu", "--role", "serve", "--base", base_image, "--tag", "tunedock-serve:cpu"
    )
    assert built.returncode == 0, built.stderr[-4000:]
    return "tunedock-serve:cpu"


def busy(url: str, key: str) -> Any:
    """A long answer that has begun."""
    client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    stream = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=150, stream=True, temperature=1.5
    )
    next(iter(stream))
    return stream


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_gateway_in_a_container_answers_and_ends_in_order(
    engine_here: Engine, serve_image: str, tmp_path: Path
) -> None:
    (tmp_path / "keys").mkdir()
    key = json.loads(tunedock(tmp_path, "token", "issue", "ada", "--store", "keys/access.db", "--json"))["key"]
    command = ["serve", f"demo={ROOT}/examples/demo/base", "--on", "docker", "--image", serve_image, "--port", "18431"]
    said = tmp_path / "said"
    with said.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tunedock", *command, "--store", "keys/access.db"],
            cwd=tmp_path,
            stdout=out,
            stderr=out,
        )
    try:
        url = "http://127.0.0.1:18431"
        until(lambda: process.poll() is not None or httpx.get(f"{url}/ready").status_code == 200, said.read_text)
        assert process.poll() is None, said.read_text()
        client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        assert client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=4).usage is not None
        assert httpx.get(f"{url}/v1/models").status_code == 401
        stream = busy(url, key)
        process.send_signal(signal.SIGTERM)
        reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
        assert reasons[-1] in ("stop", "length")
        assert process.wait(60) in (0, 143)
    finally:
        process.kill()
    assert "serving demo" in said.read_text() and key not in said.read_text()
    assert (
        subprocess.run(
            ["docker", "ps", "-aq", "--filter", "label=tunedock.stage=serve"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        == ""
    )


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_gateway_by_compose(engine_here: Engine, serve_image: str, tmp_path: Path) -> None:
    if shutil.which("docker-compose") is None:
        pytest.skip("docker-compose is not installed here")
    (tmp_path / "keys").mkdir()
    key = json.loads(tunedock(tmp_path, "token", "issue", "ada", "--store", "keys/access.db", "--json"))["key"]
    file = tunedock(
        tmp_path, "serve", f"demo={ROOT}/examples/demo/base", "--on", "compose", "--image", serve_image, "--port", "18432",
        "--store", "keys/access.db", "--profile", "monitoring", "--write",
    ).strip()  # fmt: skip
    compose = ["docker-compose", "--file", file]
    assert (Path(file).parent / "monitoring/prometheus.yml").is_file()
    try:
        subprocess.run(
            [*compose, "up", "--detach", "gateway"], check=True, capture_output=True, timeout=200, cwd=Path(file).parent
        )
        url = "http://127.0.0.1:18432"

        def logs() -> str:
            return subprocess.run(
                [*compose, "logs"], capture_output=True, text=True, timeout=60, cwd=Path(file).parent
            ).stdout

        until(lambda: httpx.get(f"{url}/ready").status_code == 200, logs)
        stream = busy(url, key)
        stopping = subprocess.Popen([*compose, "stop"], stderr=subprocess.DEVNULL, cwd=Path(file).parent)
        reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
        assert reasons[-1] in ("stop", "length") and stopping.wait(90) == 0
    finally:
        subprocess.run([*compose, "down"], capture_output=True, timeout=120, cwd=Path(file).parent)
