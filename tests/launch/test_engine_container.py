"""An engine in a container: what the container engine is sent, and one that is started, killed and ended through a gateway."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from engine_bed import Engine
from tunedock.errors import RecipeError
from tunedock.image.engine import connected
from tunedock.launch.container import Image
from tunedock.launch.engine_container import NETWORK, Asked, binds_of, engine_body, parse
from tunedock.launch.mounts import Bind

GOLDEN = Path(__file__).parents[1] / "golden" / "engine-containers"
PROGRAM = ("vllm", "serve", "/models/base", "--host", "0.0.0.0", "--port", "8001")
ASKED = Asked("vllm/vllm-openai:v0.33.0", "support", 8001, PROGRAM, ("/models/base",), ("/tmp/e1",), ("VLLM_API_KEY",))
BINDS = [Bind.at_its_place("/models/base"), Bind.at_its_place("/tmp/e1", read_only=False)]

CASES = {
    "gpus": (Asked(**{**{name: getattr(ASKED, name) for name in Asked.__slots__}, "gpus": ("0", "1")}), ("vllm", "serve")),
    "cpu": (ASKED, ()),
    "hub-and-init": (
        Asked(**{**{name: getattr(ASKED, name) for name in Asked.__slots__}, "outward": True}), ("/usr/bin/tini", "--"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_body_is_as_in_its_golden_file(name: str, request: pytest.FixtureRequest) -> None:
    asked, entrypoint = CASES[name]
    body = engine_body(asked, Image("sha256:abc", entrypoint), BINDS, uid=1000, gid=100)
    body["Labels"].pop("tunedock.version")
    text = json.dumps(body, indent=2) + "\n"
    file = GOLDEN / f"{name}.json"
    if request.config.getoption("--rewrite-golden"):
        file.write_text(text)
    assert text == file.read_text(), "python -m pytest --rewrite-golden writes it anew; say why in the commit"


@pytest.mark.parametrize("name", CASES)
def test_of_every_body(name: str) -> None:
    """On loopback alone, without rights, without a value of a variable."""
    asked, entrypoint = CASES[name]
    body = engine_body(asked, Image("sha256:abc", entrypoint), BINDS, uid=1000, gid=100)
    host = body["HostConfig"]
    assert [each["HostIp"] for each in host["PortBindings"]["8001/tcp"]] == ["127.0.0.1"]
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and "no-new-privileges" in host["SecurityOpt"]
    assert host["NetworkMode"] == ("bridge" if asked.outward else NETWORK)
    assert [mount["ReadOnly"] for mount in host["Mounts"]] == [True, False]
    assert not any("VLLM_API_KEY" in entry for entry in body["Env"])
    assert [*body["Entrypoint"], *body["Cmd"]][-5:] == list(PROGRAM[-5:])


def test_a_command_line_is_read_back() -> None:
    given = [
        "--image",
        "i",
        "--name",
        "-n",
        "--port",
        "8001",
        "--read",
        "/a b",
        "--write",
        "/w",
        "--env",
        "K",
        "--gpu",
        "0",
    ]
    assert parse([*given[:2], "--name=-n", *given[4:], "--outward", "--", "vllm", "--port", "--", "x"]) == Asked(
        "i", "-n", 8001, ("vllm", "--port", "--", "x"), ("/a b",), ("/w",), ("K",), ("0",), True
    )


def test_what_is_never_shown(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no container gets to see"):
        binds_of(Asked("i", "n", 1, (), reads=("/etc",)))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/w").write_text("w")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/weights").symlink_to("../blobs/w")
    binds = binds_of(Asked("i", "n", 1, (), reads=(str(tmp_path / "snapshot"),)))
    assert [bind.source for bind in binds] == [str(tmp_path / "snapshot"), str(tmp_path / "blobs/w")]


# -- through a gateway -------------------------------------------------------------------------------------------------

SERVER = '''#!/usr/bin/python3
"""Stands for vLLM: its command line, its key, OpenAI's answers, streamed slowly."""
import http.server, json, os, sys, time

given = sys.argv[1:]
port, model = int(given[given.index("--port") + 1]), given[given.index("--served-model-name") + 1]
assert given[0] == "serve" and os.path.isfile(given[1] + "/config.json"), given
for path in ("/usr/x", given[1] + "/x"):
    try:
        open(path, "w")
        sys.exit("it can write to " + path)
    except OSError:
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        for piece in body:
            self.wfile.write(piece)
            self.wfile.flush()

    def allowed(self):
        if self.headers.get("Authorization") == "Bearer " + os.environ["VLLM_API_KEY"]:
            return True
        self.answer(401, [b"{}"])

    def do_GET(self):
        if self.allowed():
            self.answer(200, [json.dumps({"data": [{"id": model}]}).encode()])

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.allowed():
            assert asked["model"] == model
            self.answer(200, self.events(asked.get("max_tokens", 4)), "text/event-stream")

    def events(self, count):
        for number in range(count):
            time.sleep(0.02)
            yield self.event({"content": f"{number} "}, None)
        yield self.event({}, "length")
        yield b"data: [DONE]\\n\\n"

    def event(self, delta, end):
        return b"data: %s\\n\\n" % json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": end}]}).encode()

    def log_message(self, *_): ...


print("INFO serving", model, "as", os.getuid(), flush=True)
http.server.ThreadingHTTPServer(("0.0.0.0", port), Handler).serve_forever()
'''


def until(true: Callable[[], bool], said: Path, limit_s: float = 90.0) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.1)


@pytest.mark.long
def test_an_engine_in_a_container_behind_a_gateway(engine_here: Engine, base_image: str, tmp_path: Path) -> None:
    """Started, asked, killed in mid-stream, started again, ended with the gateway: also where that is killed."""
    (tmp_path / "image").mkdir()
    (tmp_path / "image/vllm").write_text(SERVER)
    (tmp_path / "image/Dockerfile").write_text(
        f"FROM {base_image}\nCOPY vllm /usr/local/bin/vllm\n".replace("--chmod=755 ", "")
    )
    (tmp_path / "image/vllm").chmod(0o755)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    said = tmp_path / "said.txt"
    arguments = [f"m={model}", "--engine", "vllm", "--engine-image", "stand-in:1", "--open", "--port", "0"]
    command = [sys.executable, "-m", "tunedock", "serve", *arguments]
    with connected() as client:
        client.images.build(path=str(tmp_path / "image"), tag="stand-in:1")

        def ours() -> list[Any]:
            return client.containers.list(all=True, filters={"label": "tunedock.stage=engine"})

        with said.open("w") as out:
            process = subprocess.Popen(command, stderr=out, stdout=out)
        try:
            until(lambda: "serving m at" in said.read_text() or process.poll() is not None, said)
            url = said.read_text().split("serving m at ")[1].split()[0]
            asks = OpenAI(base_url=url, api_key="none", max_retries=0)
            ask: Any = {"model": "m", "messages": [{"role": "user", "content": "count"}]}
            assert asks.chat.completions.create(**ask, max_tokens=3).choices[0].message.content == "0 1 2 "
            [container] = ours()
            [binding] = next(iter(container.ports.values()))
            assert binding["HostIp"] == "127.0.0.1"
            assert httpx.get(f"http://127.0.0.1:{binding['HostPort']}/v1/models").status_code == 401
            network = client.networks.get(NETWORK).attrs["Options"]
            assert network["com.docker.network.bridge.enable_ip_masquerade"] == "false"
            key = next(entry for entry in container.attrs["Config"]["Env"] if entry.startswith("VLLM_API_KEY=")).split(
                "="
            )[1]
            assert key not in str(container.attrs["Config"]["Cmd"]) and key not in said.read_text()
            with httpx.stream(
                "POST", f"{url}/chat/completions", json={**ask, "max_tokens": 400, "stream": True}
            ) as answer:
                lines = (line for line in answer.iter_lines() if line)
                next(lines)
                container.kill()
                last = list(lines)[-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
            until(lambda: said.read_text().count("is up after") == 2, said)
            assert asks.chat.completions.create(**ask, max_tokens=2).choices[0].message.content == "0 1 "
            assert [each.id for each in ours()] != [container.id] and len(ours()) == 1
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (0, 143)
            until(lambda: ours() == [], said, 20)
        finally:
            process.kill()
        with said.open("w") as out:
            process = subprocess.Popen(command, stderr=out, stdout=out, start_new_session=True)
        until(lambda: "serving m at" in said.read_text() or process.poll() is not None, said)
        os.kill(next(iter(_children(process.pid))), signal.SIGKILL)
        until(lambda: ours() == [], said, 40)
        process.wait(30)


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
