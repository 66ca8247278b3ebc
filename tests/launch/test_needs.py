"""What a stage needs of the network, and which variables go with it: by the recipe, and nothing more."""

from __future__ import annotations

from typing import Any

import pytest

from tunedock.errors import RecipeError
from tunedock.launch.needs import PLAIN, local_store, needs, network_of, variables
from tunedock.recipe.schema import Recipe

LOCAL: dict[str, Any] = {"model": "/models/m", "data": {"train": "/data/rows.jsonl"}, "train": {"report_to": "none"}}
JUDGE = {"kind": "judge", "base_url": "https://judge.example/v1", "model": "big", "api_key_env": "JUDGE_KEY"}
ENGINE = {"kind": "openai", "base_url": "http://localhost:8000/v1", "model": "m", "api_key_env": "ENGINE_KEY"}


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({**LOCAL, **changes})


def tracked(name: str, **settings: Any) -> dict[str, Any]:
    return {"train": {"report_to": name}, "track": {name: settings}}


def grpo(**changes: Any) -> dict[str, Any]:
    return {"objective": {"kind": "grpo", "rewards": ["exact_match"], **changes}}


CASES: list[tuple[dict[str, Any], str, set[str]]] = [
    # what the recipe says -> the network, and the secrets that are asked for
    ({}, "none", set()),
    ({"model": "some/model"}, "bridge", {"HF_TOKEN"}),
    ({"model": "some/model", "offline": True}, "none", set()),
    ({"model": "some/model", "hub": "modelscope"}, "bridge", {"MODELSCOPE_API_TOKEN"}),
    ({"data": {"train": "owner/rows"}}, "bridge", {"HF_TOKEN"}),
    ({"data": {"train": "gcs://bucket/rows.jsonl"}}, "bridge", {"GOOGLE_APPLICATION_CREDENTIALS"}),
    ({"data": {"train": "https://data.example/rows.jsonl"}}, "bridge", set()),
    (tracked("wandb"), "bridge", {"WANDB_API_KEY", "WANDB_BASE_URL"}),
    (tracked("wandb", mode="offline"), "none", set()),
    (tracked("swanlab"), "bridge", {"SWANLAB_API_KEY", "SWANLAB_API_HOST"}),
    (tracked("mlflow", tracking_uri="sqlite:////runs/mlflow.db"), "none", set()),
    (grpo(rewards=[JUDGE]), "bridge", {"JUDGE_KEY"}),
    (grpo(engine=ENGINE), "host", {"ENGINE_KEY"}),
    (grpo(rewards=[{"kind": "model", "path": "some/judge"}]), "bridge", {"HF_TOKEN"}),
    ({"launch": {"nodes": 2, "rendezvous": "10.0.0.1:29500"}}, "host", set()),
]


@pytest.mark.parametrize(("changes", "network", "secrets"), CASES)
def test_the_network_and_the_secrets_are_those_the_recipe_needs(
    changes: dict[str, Any], network: str, secrets: set[str]
) -> None:
    given = recipe(**changes)
    assert network_of(given, "train", {})[0] == network
    assert {name for need in needs(given, "train") for name in need.secrets} == secrets


def test_the_server_of_mlflow_is_reached_with_its_own_secrets() -> None:
    given = recipe(**tracked("mlflow", tracking_uri="http://127.0.0.1:5000"))
    network, why = network_of(given, "train", {})
    assert (network, why) == ("host", "the run is told to mlflow")
    assert "MLFLOW_TRACKING_PASSWORD" in variables(given, "train", network)
    assert not needs(given, "chat")


def test_no_secret_is_passed_that_nothing_needs() -> None:
    assert variables(recipe(), "train", "none") == ()
    names = variables(recipe(model="some/model"), "train", "bridge")
    assert not {"WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "MODELSCOPE_API_TOKEN"} & set(names)
    assert {"HF_TOKEN", "https_proxy", "SSL_CERT_FILE"} <= set(names)


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "PATH", "RANK"]
)
def test_what_is_always_passed_on_holds_no_secret(name: str) -> None:
    assert not PLAIN.fullmatch(name)
    assert PLAIN.fullmatch("NCCL_DEBUG")


def test_a_variable_that_the_recipe_names_is_passed_by_its_name() -> None:
    given = recipe(launch={"container": {"env": ["MY_TOKEN", "A=b"]}})
    assert variables(given, "train", "none") == ("MY_TOKEN",)


def test_a_network_that_is_off_and_needed_is_an_error_that_says_for_what() -> None:
    given = recipe(model="some/model", launch={"container": {"network": "none"}})
    with pytest.raises(RecipeError, match="`some/model` comes from the hub") as raised:
        network_of(given, "train", {})
    assert raised.value.where == "launch.container.network"


def test_a_proxy_of_this_machine_needs_its_network() -> None:
    given = recipe(model="some/model")
    assert network_of(given, "train", {"https_proxy": "http://127.0.0.1:3128"})[0] == "host"
    assert network_of(recipe(), "train", {"https_proxy": "http://127.0.0.1:3128"})[0] == "none"
    assert network_of(given, "train", {"no_proxy": "localhost"})[0] == "bridge"


def test_tasks_of_an_evaluation_come_from_the_hub() -> None:
    given = recipe(eval={"tasks": ["gsm8k"]})
    assert network_of(given, "eval", {}) == ("bridge", "`gsm8k` comes from the hub")
    assert network_of(given, "train", {})[0] == "none"


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:////a/b.db", "/a/b.db"),
        ("file:///a/b", "/a/b"),
        ("/a/b", "/a/b"),
        ("mlruns", "mlruns"),
        ("http://x", None),
    ],
)
def test_a_store_on_disk_is_told_from_a_server(uri: str, path: str | None) -> None:
    assert local_store(uri) == path
