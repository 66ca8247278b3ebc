"""`tunedock image` as far as no engine is needed: Dockerfiles shown, written and checked, and what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]


def test_the_dockerfile_is_shown(tunedock: Command) -> None:
    code, out, _err = tunedock("image", "build", "cpu", "--print")
    assert code == 0
    assert out.startswith("# tunedock, train on cpu")
    code, out, _err = tunedock("image", "build", "cuda", "--role", "serve", "--engine", "vllm", "--print")
    assert "/opt/engine" in out


def test_a_context_is_written_for_a_builder_of_ones_own(tunedock: Command, tmp_path: Path) -> None:
    code, out, _err = tunedock("image", "build", "cpu", "--context", str(tmp_path / "c"))
    assert code == 0
    assert f"docker build {tmp_path}/c" in out
    assert (tmp_path / "c/code/tunedock/__init__.py").exists()


def test_ours_are_clean_and_anothers_is_told_why_not(tunedock: Command, tmp_path: Path) -> None:
    code, out, _err = tunedock("image", "lint")
    assert (code, "nothing to say" in out) == (0, True)
    (tmp_path / "Dockerfile").write_text("FROM debian\nCOPY . /x\nCMD python x.py\n")
    code, out, err = tunedock("image", "lint", str(tmp_path / "Dockerfile"))
    assert code == 6
    assert "tini" in out
    assert "DL3006" in out
    assert "rule(s) broken" in err
    code, out, _err = tunedock("image", "lint", str(tmp_path / "Dockerfile"), "--json")
    told = json.loads(out)
    assert (code, told["error"]["kind"]) == (6, "CheckError")
    assert {problem["rule"] for problem in told["files"][str(tmp_path / "Dockerfile")]} >= {"user", "health", "context"}


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (("tpu",), "target"),
        (("cpu", "--role", "deploy"), "--role"),
        (("cpu", "--role", "serve", "--engine", "vllm"), "--engine"),
        (("cpu", "--offline"), "--offline"),
        (("cpu", "--platform", "linux/s390x"), "--platform"),
        (("cpu", "--model", "."), "--model"),
        (("cpu", "--extra", "nothing"), "--extra"),
        (("cpu", "--builder", "kaniko"), "--builder"),
        (("edge", "--role", "serve", "--extra", "mlflow"), "--extra mlflow"),
    ],
)
def test_what_cannot_be_is_named(tunedock: Command, arguments: tuple[str, ...], where: str) -> None:
    code, out, _err = tunedock("image", "build", *arguments, "--json")
    error = json.loads(out)["error"]
    assert (code, error["where"]) == (2, where)
    assert error["hint"]


def test_without_an_engine(tunedock: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    for command in (("list",), ("inspect", "x")):
        code, out, _err = tunedock("image", *command, "--json")
        assert code == 12
        assert "none.sock" in json.loads(out)["error"]["where"]
