"""An order as words: what the command makes of them is the order again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tunedock.cli.app import app
from tunedock.pipeline import serving
from tunedock.pipeline.serving_words import words_of
from tunedock.recipe.serving import ServeOrder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    return tmp_path


def order_of_words(words: list[str], monkeypatch: pytest.MonkeyPatch) -> ServeOrder:
    taken: list[ServeOrder] = []
    monkeypatch.setattr(serving, "serve_models", lambda order, **_: taken.append(order))
    done = CliRunner().invoke(app, ["serve", *words])
    assert done.exit_code == 0, done.output
    return taken[0]


CASES: dict[str, list[str]] = {
    "plain": ["HERE/hf"],
    "all": [
        *("a=HERE/hf", "HERE/small.gguf", "--host", "0.0.0.0", "--port", "9", "--store", "HERE/k/access.db", "--grace", "4.5"),
        *("--max-length", "512", "--max-requests", "4", "--dtype", "float32", "--access-log", "HERE/log", "--audit", "HERE/audit"),
        *("--jwt-audience", "a b", "--jwt-issuer", "i", "--jwt-secret-env", "S", "--jwks", "https://x/keys", "--keep-warm", "3"),
        *("--tls-cert", "HERE/c.pem", "--tls-key", "HERE/k.pem", "--adapter", "fr=HERE/fr", "--registry", "HERE/r.db"),
        *("--log-bodies", "--cors-origin", "https://a.example", "--cors-origin", "https://b.example", "--max-waiting", "7"),
        *("--max-body", "4096", "--timeout", "61.5"),
    ],
    "program": [
        *("HERE/hf", "--engine", "vllm", "--tensor-parallel-size", "4", "--engine-arg", "enforce-eager", "--engine-wait", "60"),
        *("--engine-arg=--kv-cache-dtype=fp8", "--engine-logs", "HERE/logs", "big=sglang+http://gpu:1/v1"),
    ],
    "far": ["http://gpu:8000/v1", "vllm+https://x.example/a/v1", "--engine-model", "m", "--engine-key-env", "KEY"],
    "odd": ["--open", "--", "-x=HERE/hf"],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_read_again_it_is_the_same(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    first: Any = order_of_words([word.replace("HERE", str(place)) for word in CASES[name]], monkeypatch)
    unsaid = {key for key, field in ServeOrder.model_fields.items() if getattr(first, key) == field.default}
    assert name != "all" or unsaid == {"open"}, "what a gateway can be told belongs into words_of, and into this case"
    words = words_of(first)
    assert order_of_words(words, monkeypatch) == first
