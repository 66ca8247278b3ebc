"""What is submitted to the engine, by recipe and machine: golden files, and what must not be in any of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunedock import __version__
from tunedock.launch.container import Image, Machine, container_name, container_spec, with_variables
from tunedock.launch.job import JobSpec
from tunedock.launch.mounts import Bind, Caches
from tunedock.launch.needs import network_of
from tunedock.recipe.schema import Recipe

GOLDEN = Path(__file__).parents[1] / "golden" / "containers"
HOME = "/home/ann"
CACHES = Caches(
    home=HOME,
    data=Path(f"{HOME}/.cache/tunedock"),
    compiled=Path(f"{HOME}/.cache/tunedock-in-containers"),
    hub=Path(f"{HOME}/.cache/huggingface/hub"),
    modelscope=Path(f"{HOME}/.cache/modelscope"),
    token=Path(f"{HOME}/.cache/huggingface/token"),
)
MACHINE = Machine(
    uid=1000,
    gid=1000,
    groups=(44, 2000),
    user="ann",
    caches=CACHES,
    hostname="node-a",
    source="/home/ann/tunedock/src/tunedock",
    environment={
        "PATH": "/bin",
        "NCCL_DEBUG": "WARN",
        "HF_TOKEN": "hf_secret",
        "RANK": "3",
        "TORCHELASTIC_RUN_ID": "x",
    },
)
RUN = Path("/home/ann/runs/r1")
BINDS = [
    Bind("/data/rows.jsonl", "/data/rows.jsonl"),
    Bind(str(RUN), str(RUN), read_only=False),
]
NODES = {"nodes": 2, "rendezvous": "10.0.0.1:29500", "node_rank": 0}

OURS = Image("sha256:1f9c", ("tini", "--"))

CASES: dict[str, tuple[dict[str, Any], Machine]] = {
    "cpu": ({"container": {"cpus": 3.5, "memory": "8g", "ulimits": {"nofile": 65536}}}, MACHINE),
    "cuda-all": ({"container": {"gpus": "all", "memory": "64g"}}, replace(MACHINE, gpus=("all",))),
    "cuda-count": ({"container": {"gpus": 2}}, replace(MACHINE, gpus=("1", "3"))),
    "cuda-ids-mps": ({"container": {"gpus": [0], "mps": 50}}, replace(MACHINE, gpus=("0",))),
    "host-infiniband": (NODES, replace(MACHINE, gpus=tuple("01234567"), infiniband=True)),
    "runsc": ({"container": {"runtime": "runsc", "network": "none"}}, MACHINE),
    "rocm": ({"container": {"devices": ["/dev/kfd", "/dev/dri"], "env": ["HSA_OVERRIDE_GFX_VERSION=10.3.0"]}}, MACHINE),
    "root-of-a-rootless-engine": ({}, replace(MACHINE, rootless=True)),
    "own-source": ({"container": {"source": True, "read_only": False, "user": "0:0"}}, MACHINE),
}


def recipe(launch: dict[str, Any], **more: Any) -> Recipe:
    values = {"model": "/models/m", "data": {"train": "/data/rows.jsonl"}, "launch": {"on": "docker", **launch}, **more}
    return Recipe.model_validate(values)


def made(launch: dict[str, Any], machine: Machine, stage: str = "train", image: Image = OURS) -> dict[str, Any]:
    given = recipe(launch)
    network, _ = network_of(given, stage, machine.environment)
    return container_spec(JobSpec(stage, RUN), given, image, machine, network=network, binds=BINDS)


@pytest.mark.parametrize("name", CASES)
def test_the_container_is_as_in_its_golden_file(name: str, request: pytest.FixtureRequest) -> None:
    text = json.dumps(made(*CASES[name]), indent=2, sort_keys=True).replace(f'"{__version__}"', '"VERSION"') + "\n"
    file = GOLDEN / f"{name}.json"
    if request.config.getoption("--rewrite-golden"):
        file.write_text(text)
    assert text == file.read_text(), "python -m pytest --rewrite-golden writes it anew; say why in the commit"


def test_there_is_no_golden_file_too_many() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(CASES)


def test_an_image_without_an_init_gets_the_engines_and_one_that_sets_more_keeps_what_it_begins_with() -> None:
    bare = made({}, MACHINE, image=Image("sha256:2", ("/entry.sh",)))
    assert (bare["Entrypoint"], bare["HostConfig"]["Init"]) == ([], True)
    begins = ("/usr/bin/tini", "--", "/bin/bash", "-c", 'source /set_env.sh && exec "$0" "$@"')
    ours = made({}, MACHINE, image=Image("sha256:3", begins))
    assert (ours["Entrypoint"], ours["HostConfig"]["Init"]) == (list(begins), False)


def test_a_chat_takes_input_and_no_other_stage_does() -> None:
    keys = ("OpenStdin", "StdinOnce", "AttachStdin")
    assert all(made({}, MACHINE, "chat")[key] for key in keys)
    assert not any(made({}, MACHINE, stage)[key] for key in keys for stage in ("train", "eval", "export"))


def test_secrets_are_added_to_the_environment_and_stand_nowhere_else() -> None:
    spec = made({}, MACHINE)
    assert "hf_secret" not in json.dumps(spec)
    given = with_variables(spec, {"HF_TOKEN": "hf_secret"})
    assert given["Env"][-1] == "HF_TOKEN=hf_secret"
    assert json.dumps({**given, "Env": None}) == json.dumps({**spec, "Env": None})


def test_a_worker_has_as_many_threads_as_processors_unless_the_caller_says_otherwise() -> None:
    threads = [text for text in made({"container": {"cpus": 2.5}}, MACHINE)["Env"] if "OMP" in text]
    assert threads == ["OMP_NUM_THREADS=2"]
    own = replace(MACHINE, environment={"OMP_NUM_THREADS": "7"})
    assert "OMP_NUM_THREADS=7" in made({"container": {"cpus": 2.5}}, own)["Env"]


def test_names_are_readable_and_never_the_same() -> None:
    job = JobSpec("train", Path("/runs/20250131 mein/Lauf"))
    names = {container_name(job) for _ in range(20)}
    assert len(names) == 20
    assert all(name.startswith("tunedock-train-Lauf-") for name in names)
    assert "/" not in container_name(JobSpec("eval", Path("/a/测试 x")))
