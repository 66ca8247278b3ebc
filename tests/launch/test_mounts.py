"""What of the host a container gets to see: what the recipe names, where it stands; and what never."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tunedock.errors import RecipeError
from tunedock.launch.mounts import SPARE_HOME, Bind, Caches, binds_of, refuse
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run, RunState


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("home", "data", "models/m", "runs/r1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data/rows.jsonl").write_text("{}\n")
    return tmp_path / "home"


def shown(
    home: Path, stage: str = "train", network: str = "none", environment: Any = None, **changes: Any
) -> list[Bind]:
    root = home.parent
    values = {"model": f"{root}/models/m", "data": {"train": f"{root}/data/rows.jsonl"}, **changes}
    return binds_of(
        Recipe.model_validate(values),
        stage,
        root / "runs/r1",
        caches=Caches.of(environment or {}, str(home)),
        environment=environment or {},
        network=network,
    )


def by_target(binds: list[Bind]) -> dict[str, tuple[str, bool]]:
    return {bind.target: (bind.source, bind.read_only) for bind in binds}


def test_only_what_the_recipe_names_is_shown_and_only_the_run_and_the_caches_can_be_written(home: Path) -> None:
    root = home.parent
    found = by_target(shown(home))
    assert found == {
        f"{root}/data/rows.jsonl": (f"{root}/data/rows.jsonl", True),
        f"{root}/models/m": (f"{root}/models/m", True),
        f"{root}/runs/r1": (f"{root}/runs/r1", False),
        f"{home}/.cache/tunedock": (f"{home}/.cache/tunedock", False),
        f"{home}/.cache/tunedock/kernels": (f"{home}/.cache/tunedock-in-containers/kernels", False),
        f"{home}/.cache/tunedock-in-containers": (f"{home}/.cache/tunedock-in-containers", False),
    }
    assert all(Path(source).exists() for source, _ in found.values())


def test_data_in_an_image_are_shown_as_the_content_that_the_run_began_with(home: Path) -> None:
    root, said, known = home.parent, "ab" * 32, "cd" * 32
    data = {"train": "image://data:3", "test": {"path": "image://data:4", "revision": f"sha256:{said}"}}
    state = RunState("r1", 0.0, "sft", "m", "full", "0", lineage={"data_images": {"image://data:3": f"sha256:{known}"}})
    Run(root / "runs/r1").write_state(state)
    for user in ("caller", "1000:1000"):
        found = by_target(shown(home, data=data, launch={"on": "docker", "container": {"user": user}}))
        for name in (said, known):
            assert found[f"{home}/.cache/tunedock/images/{name}"] == (f"{home}/.cache/tunedock/images/{name}", True)
    (root / "runs/r1/run.json").unlink()
    before = by_target(shown(home, data=data))
    assert f"{home}/.cache/tunedock/images/{known}" not in before  # not known yet, and nothing is asked


def test_what_a_container_compiles_is_not_what_a_run_outside_loads(home: Path) -> None:
    kernels = by_target(shown(home))[f"{home}/.cache/tunedock/kernels"][0]
    assert not Path(kernels).is_relative_to(home / ".cache/tunedock")


def test_the_hub_cache_is_there_where_something_comes_from_the_hub(home: Path, tmp_path: Path) -> None:
    own = {"HF_HUB_CACHE": f"{tmp_path}/hub"}
    assert f"{tmp_path}/hub" not in by_target(shown(home, environment=own))
    assert by_target(shown(home, network="bridge", model="some/model", environment=own))[f"{tmp_path}/hub"][1] is False
    offline = by_target(shown(home, model="some/model", environment=own, offline=True))
    assert offline[f"{tmp_path}/hub"][1] is True


def test_the_hubs_token_is_shown_only_where_it_is_needed(home: Path) -> None:
    token = home / ".cache/huggingface/token"
    token.parent.mkdir(parents=True)
    token.write_text("hf_secret")
    assert str(token) not in by_target(shown(home))
    assert by_target(shown(home, network="bridge", model="some/model"))[str(token)] == (str(token), True)
    given = {"HF_TOKEN": "hf_other"}
    assert str(token) not in by_target(shown(home, network="bridge", model="some/model", environment=given))


def test_links_out_of_a_folder_lead_somewhere(home: Path) -> None:
    root = home.parent
    blob = root / "blobs/abc"
    blob.parent.mkdir()
    blob.write_text("weights")
    (root / "models/m/model.safetensors").symlink_to("../../blobs/abc")
    (root / "models/m/inside.json").symlink_to("config.json")
    (root / "models/m/gone").symlink_to("nowhere")
    found = by_target(shown(home))
    assert found[str(blob)] == (str(blob), True)
    assert f"{root}/models/m/config.json" not in found


def test_a_folder_in_one_that_is_shown_is_not_shown_twice(home: Path) -> None:
    root = home.parent
    data = {"train": [f"{root}/data/*.jsonl", f"{root}/data/rows.jsonl"]}
    found = by_target(shown(home, data=data))
    assert f"{root}/data" in found
    assert f"{root}/data/rows.jsonl" not in found


def test_data_in_the_run_stay_read_only(home: Path) -> None:
    rows = home.parent / "runs/r1/rows.jsonl"
    rows.write_text("{}\n")
    assert by_target(shown(home, data={"train": str(rows)}))[str(rows)] == (str(rows), True)


def test_more_is_shown_where_the_recipe_says_so(home: Path) -> None:
    mounts = [f"{home.parent}/data", {"path": f"{home.parent}/models", "read_only": False}]
    found = by_target(shown(home, launch={"container": {"mounts": mounts}}))
    assert (found[f"{home.parent}/data"][1], found[f"{home.parent}/models"][1]) == (True, False)


def test_a_trackers_file_can_be_written_and_its_path_is_written_in_full(home: Path, tmp_path: Path) -> None:
    train = {"report_to": "mlflow"}
    uri = f"sqlite:///{tmp_path}/flow/mlflow.db"
    found = by_target(shown(home, train=train, track={"mlflow": {"tracking_uri": uri}}))
    assert found[f"{tmp_path}/flow"] == (f"{tmp_path}/flow", False)
    with pytest.raises(RecipeError, match="from the working directory") as raised:
        shown(home, train=train, track={"mlflow": {"tracking_uri": "sqlite:///mlflow.db"}})
    assert f"sqlite:///{Path.cwd()}/mlflow.db" in str(raised.value.hint)


@pytest.mark.parametrize(
    "path", ["/", "/etc", "/etc/passwd", "/proc/1", "/sys", "/dev/shm", "/usr", "/var/run/docker.sock", "/tmp", "/home"]
)
def test_the_machines_own_is_never_shown(path: str) -> None:
    with pytest.raises(RecipeError) as raised:
        refuse(path, "data.train.0.path")
    assert raised.value.where == "data.train.0.path"
    assert raised.value.hint


def test_nor_by_a_link_nor_the_callers_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "innocent").symlink_to("/etc")
    with pytest.raises(RecipeError, match="/etc"):
        refuse(str(tmp_path / "innocent"), "model.path")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RecipeError, match="the whole of"):
        refuse(str(tmp_path), "model.path")
    refuse(str(tmp_path / "project"), "model.path")


def test_a_link_in_a_model_that_leads_to_the_machines_own_is_refused(home: Path) -> None:
    (home.parent / "models/m/config.json").symlink_to("/etc/hostname")
    with pytest.raises(RecipeError, match="/etc"):
        shown(home)


def test_a_caller_without_a_home_gets_one(tmp_path: Path) -> None:
    assert Caches.of({}, "/").home == SPARE_HOME
    assert Caches.of({}, "/nonexistent").home == SPARE_HOME
    assert Caches.of({}, str(tmp_path)).home == str(tmp_path)


def test_where_the_hub_keeps_models_is_as_its_own_variables_say(tmp_path: Path) -> None:
    assert Caches.of({"HF_HOME": "/hf"}, str(tmp_path)).hub == Path("/hf/hub")
    assert Caches.of({"XDG_CACHE_HOME": "/c"}, str(tmp_path)).token == Path("/c/huggingface/token")
    assert os.fspath(Caches.of({"HF_HUB_CACHE": "/h"}, str(tmp_path)).hub) == "/h"
