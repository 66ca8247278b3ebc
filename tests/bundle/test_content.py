"""What of a recipe and a run goes into a bundle, and that the recipe finds it where it lands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from bundle_bed import quiet
from tunedock.bundle.content import Content, compose, of_recipe, of_run
from tunedock.bundle.create import Wanted, create
from tunedock.bundle.load import load
from tunedock.errors import DataError, ModelError, RecipeError, RunError
from tunedock.recipe.load import load as load_recipe
from tunedock.recipe.resolve import Resolved, resolve
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run, RunState

DEMO = Path(__file__).parents[2] / "examples/demo"
ROW = '{"prompt": "a", "completion": "b"}\n'


def resolved(folder: Path, text: str) -> Resolved:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(text)
    return resolve(load_recipe([folder / "recipe.yaml"], []))


def installed(content: Content, folder: Path) -> tuple[Path, Recipe]:
    """The content bundled, moved to another place and loaded there; the folder, and its recipe as it is read there."""
    create(Wanted("b", content), folder / "bundle", quiet)
    load(folder / "bundle", folder / "there", quiet)
    shutil.rmtree(folder / "here")
    return folder / "there", resolve(load_recipe([folder / "there/recipe.yaml"], [])).recipe


def test_everything_a_recipe_reads_comes_along(tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(DEMO / "base", here / "base")
    (here / "data/more").mkdir(parents=True)
    for name in ("a.jsonl", "more/b.jsonl", "more/c.jsonl", "more/left.txt"):
        (here / "data" / name).write_text(ROW)
    (here / "template.jinja").write_text("{{ messages }}")
    text = (
        "model: {path: base, chat_template: template.jinja}\n"
        "data: {train: [data/a.jsonl, 'data/m*/*.jsonl', data/more], validation: [data/a.jsonl], cache_dir: cache}\n"
        "launch: {container: {mounts: [data]}}\n"
    )
    content = of_recipe(resolved(here, text))
    there, recipe = installed(content, tmp_path)
    assert recipe.model.path == str(there / "model")
    assert (there / "model/model.safetensors").is_file()
    assert [source.path for source in recipe.data.train] == [
        str(there / "inputs/data-train-0/a.jsonl"),
        str(there / "inputs/data-train-1/m*/*.jsonl"),
        str(there / "inputs/data-train-2"),
    ]
    assert sorted(path.name for path in (there / "inputs/data-train-1").rglob("*.*")) == ["b.jsonl", "c.jsonl"]
    assert recipe.model.chat_template == str(there / "inputs/model-chat_template/template.jinja")
    assert recipe.offline
    assert recipe.data.cache_dir is None
    assert recipe.launch.container.mounts == []
    assert content.left_out == ["launch.container.mounts"]


def test_the_recipe_means_the_same_there(tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(DEMO, here)
    before = resolved(here, (DEMO / "recipe.yaml").read_text())
    _there, after = installed(of_recipe(before), tmp_path)
    skipped = {
        "model": {"path"},
        "data": {"train", "validation", "test", "cache_dir"},
        "train": {"output_dir"},
        "offline": True,
    }
    assert after.model_dump(exclude=skipped) == before.recipe.model_dump(exclude=skipped)  # type: ignore[arg-type]


def test_the_compose_file_trains_in_its_container_whatever_the_recipe_asks(tmp_path: Path) -> None:
    """In there is no engine."""
    here = tmp_path / "here"
    shutil.copytree(DEMO, here)
    launch = "\nlaunch: {on: compose, nodes: 2, image: some/image, container: {gpus: 2}, compose: {profiles: [monitoring]}}\n"
    content = of_recipe(resolved(here, (DEMO / "recipe.yaml").read_text() + launch))
    installed(content, tmp_path)
    service = YAML(typ="safe").load(compose("some/image"))["services"]["train"]
    program, stage, recipe, *overrides = service["command"]
    assert (program, stage) == ("tunedock", "train")
    launched = resolve(load_recipe([tmp_path / "there" / recipe], overrides)).recipe.launch
    assert (launched.on, launched.nodes) == ("local", 1)


def test_without_model_and_data(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(ROW)
    content = of_recipe(resolved(tmp_path, "model: Qwen/Qwen3-8B\ndata: {train: a.jsonl}\n"), data=False, model=False)
    assert not content.files
    text = content.texts["content/recipe.yaml"].decode()
    assert "path: Qwen/Qwen3-8B" in text


def test_weights_that_are_not_read_stay(tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin", "config.json", ".git/config"):
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_text("x")
    content = Content()
    content.add_tree("content/model", tmp_path / "m", model=True)
    assert sorted(content.files) == ["content/model/config.json", "content/model/model.safetensors"]
    assert content.left_out == [str(tmp_path / "m/pytorch_model.bin")]


def test_a_model_of_a_hub_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a.jsonl").write_text(ROW)
    recipe = resolved(tmp_path / "here", "model: owner/name\ndata: {train: a.jsonl}\n")
    with pytest.raises(ModelError, match="not in this machine's cache") as caught:
        of_recipe(recipe)
    assert caught.value.hint == "`hf download owner/name` fetches it"
    commit = "0" * 40
    blobs = tmp_path / "cache/models--owner--name"
    (blobs / "blobs").mkdir(parents=True)
    (blobs / "blobs/1").write_text("{}")
    (blobs / "snapshots" / commit).mkdir(parents=True)
    (blobs / "snapshots" / commit / "config.json").symlink_to("../../blobs/1")
    (blobs / "refs").mkdir()
    (blobs / "refs/main").write_text(commit)
    there, found = installed(of_recipe(recipe), tmp_path)
    assert found.model.path == str(there / "model")
    assert not (there / "model/config.json").is_symlink()


@pytest.mark.parametrize("path", ["https://host.example/a.jsonl", "s3://bucket/a.jsonl", "owner/rows"])
def test_data_of_a_network_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match="without") as caught:
        of_recipe(resolved(tmp_path, f"model: {DEMO / 'base'}\ndata: {{train: '{path}'}}\n"))
    assert caught.value.where == f"data.train.0.path: {path}"


def test_folders_that_are_no_plain_ones(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(RecipeError, match="empty"):
        Content().add_tree("content/m", tmp_path / "m")
    (tmp_path / "m/link").symlink_to(tmp_path)
    with pytest.raises(RecipeError, match="link to a folder"):
        Content().add_tree("content/m", tmp_path / "m")
    (tmp_path / "m/link").unlink()
    (tmp_path / "m/link").symlink_to(tmp_path / "none")
    with pytest.raises(RecipeError, match="link to nothing"):
        Content().add_tree("content/m", tmp_path / "m")


def test_a_run_and_what_it_made(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "demo")
    recipe = resolved(tmp_path / "demo", (DEMO / "recipe.yaml").read_text())
    state = RunState("r", 0.0, "sft", "m", "lora", recipe.hash)
    run = Run.create(tmp_path / "runs/r", recipe_yaml=recipe.to_yaml(), resolved=recipe.to_json(), state=state)
    with pytest.raises(RunError, match="no result yet"):
        of_run(run)
    run.model.mkdir()
    (run.model / "adapter_config.json").write_text(json.dumps({}))
    content = of_run(run, data=False)
    assert "content/adapter/adapter_config.json" in content.files
    assert "content/model/model.safetensors" in content.files
    assert not any("data-train" in path for path in content.files)
