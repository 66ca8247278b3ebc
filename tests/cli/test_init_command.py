"""`tunedock init`: the project it makes is real: its recipe trains, its commands exist, its files parse."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import typer
import yaml

from families import save_tiny
from inline_worker import InlineLauncher
from tunedock import __version__
from tunedock.cli import init
from tunedock.cli.app import app
from tunedock.cli.init import FILES, StartObjective

ROOT = Path(__file__).parents[2]
OBJECTIVES = [objective.value for objective in StartObjective]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("qwen3", tmp_path_factory.mktemp("tiny") / "model")


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def parse(line: str) -> None:
    """Raises when the command line as written is not one of tunedock's."""
    name, *words = shlex.split(line, comments=True)
    assert name == "tunedock", line
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("tunedock", words)


def test_it_makes_every_file_and_says_so(tunedock, here):
    code, out, err = tunedock("init", "mine")
    assert (code, err) == (0, "")
    assert written(here / "mine") == sorted(FILES)
    assert out.splitlines()[:-1] == [f"mine/{name}" for name in FILES]
    assert out.splitlines()[-1].startswith("next: cd mine && ")
    for command in out.splitlines()[-1].split(" && ")[1:]:
        parse(command)
    code, out, _ = tunedock("init", "deep/er", "--objective", "dpo", "--json")
    assert code == 0
    assert json.loads(out) == {
        "directory": str(here / "deep" / "er"), "objective": "dpo", "model": "Qwen/Qwen3-0.6B", "files": list(FILES),
    }  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_word_of_a_template_is_filled_in(tunedock, here, objective):
    assert tunedock("init", "p", "--objective", objective)[0] == 0
    for name in FILES:
        text = (here / "p" / name).read_text(encoding="utf-8")
        assert not re.search(r"@[A-Z]+@", text), name
        assert text.endswith("\n")
        assert max(map(len, text.splitlines())) <= 132 or name.endswith((".jsonl", ".md")), name
    assert f"tunedock=={__version__}\n" in (here / "p" / "requirements.txt").read_text()


def test_a_folder_in_use_is_refused_by_what_it_holds(tunedock, here):
    (here / "p" / ".git").mkdir(parents=True)
    assert tunedock("init", "p")[0] == 0
    before = {name: (here / "p" / name).read_bytes() for name in FILES}
    code, out, err = tunedock("init", "p", "--objective", "dpo")
    assert (code, out) == (2, "")
    assert (
        "error: p: this folder is not empty: it holds .dockerignore, .github, .gitignore, Dockerfile, README.md and 3 more"
        in err
    )
    assert {name: (here / "p" / name).read_bytes() for name in FILES} == before
    (here / "one").mkdir()
    (here / "one" / "notes.txt").touch()
    assert "it holds notes.txt\n" in tunedock("init", "one")[2]
    assert "this is no folder" in tunedock("init", "one/notes.txt")[2]
    (here / "dangling").symlink_to("nowhere")
    assert "this is no folder" in tunedock("init", "dangling")[2]


def test_all_or_nothing(tunedock, here, monkeypatch):
    """The disk fails at the last file: what was made before it is gone, what stood there stays."""
    (here / "empty" / ".git").mkdir(parents=True)
    (here / "file").touch()
    assert tunedock("init", "file/p")[0] == 8
    files = init.project_files(StartObjective.sft, "a/b")
    for target in ("empty", "deep/er"):
        with pytest.raises(init.DiskError, match="cannot write the project"):
            init.write_project(here / target, {**files, "recipe.yaml/no": ""})
    assert sorted(path.name for path in here.rglob("*")) == [".git", "empty", "file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tunedock, here):
    here.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert tunedock("init", "p")[0] == 8
    finally:
        here.chmod(stat.S_IRWXU)


@pytest.mark.parametrize(
    ("given", "named"),
    [("owner/name", "owner/name"), ("./tiny", "../tiny"), ("tiny", "../tiny"), ("with space: #", "../with space: #")],
)
def test_the_model_is_named_as_the_recipe_finds_it(tunedock, here, given, named):
    for name in ("tiny", "with space: #"):
        (here / name).mkdir()
    assert tunedock("init", "p", "--model", given)[0] == 0
    assert yaml.safe_load((here / "p" / "recipe.yaml").read_text())["model"] == named
    code, out, _ = tunedock("recipe", "show", "p/recipe.yaml", "--json")
    assert code == 0
    found = json.loads(out)["recipe"]["model"]["path"]
    assert found == (named if given == "owner/name" else str(here / given))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nope", "there is no "), ("/no/such/model", "there is no /no/such/model"), ("", "this is no path"),
        ("https://huggingface.co/a/b", "a model is a folder or a hub id"), ("*", "a model is a folder or a hub id"),
        ("file.bin", "a model is a folder or a hub id"), ("two\nlines", "characters that are no text"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_refused_and_nothing_written(tunedock, here, given, said):
    (here / "file.bin").touch()
    (here / "two\nlines").mkdir()
    code, _, err = tunedock("init", "p", "--model", given)
    assert code == 2
    assert said in err
    assert not (here / "p").exists()


@pytest.mark.parametrize("given", ["", " ", "~nobody-of-that-name/p"])
def test_what_is_no_folder_is_refused(tunedock, here, given):
    code, _, err = tunedock("init", given)
    assert (code, err.startswith("error: DIR: ")) == (2, True)
    assert not list(here.iterdir())


def test_a_tilde_is_the_home(tunedock, here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    assert tunedock("init", "~/p")[0] == 0
    assert written(here) == sorted(f"p/{name}" for name in FILES)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_project_is_sound_and_trains(tunedock, here, model, objective, monkeypatch):
    monkeypatch.setattr("tunedock.launch.places.LocalLauncher", InlineLauncher)
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    assert tunedock("init", "p", "--objective", objective, "--model", str(model))[0] == 0
    monkeypatch.chdir(here / "p")
    code, out, err = tunedock("recipe", "show", "recipe.yaml", "--json")
    assert code == 0, err
    assert json.loads(out)["recipe"]["objective"]["kind"] == objective
    code, out, err = tunedock("data", "check", "recipe.yaml", "--to", "report", "--json")
    assert code == 0, err
    account = json.loads(out)
    assert account["read"] == account["kept"] >= 20
    assert account["duplicates"] == 0
    assert min(side["samples"] for side in account["splits"].values()) >= 3
    code, out, err = tunedock("plan", "recipe.yaml", "--gpu", "4090", "--json")
    assert code == 0, err
    code, out, err = tunedock(
        "train", "recipe.yaml", "train.output_dir=runs/first", "train.max_steps=2", "train.report_to=none", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["steps"] == 2
    ignored = (here / "p" / ".gitignore").read_text().splitlines()
    made = {path.name for path in (here / "p").iterdir()} - {Path(name).parts[0] for name in FILES}
    assert {f"/{name}/" for name in made} <= set(ignored)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_command_it_names_exists(tunedock, here, objective):
    assert tunedock("init", "p", "--objective", objective)[0] == 0
    readme = (here / "p" / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\$ (tunedock .*)$|`(tunedock [^`]*)`", readme, re.MULTILINE)
    lines += re.findall(r"`(tunedock [^`]*)`()", (here / "p" / "recipe.yaml").read_text(encoding="utf-8"))
    workflow = yaml.safe_load((here / "p" / ".github" / "workflows" / "recipe.yml").read_text())
    runs = [step["run"] for step in workflow["jobs"]["check"]["steps"] if "run" in step]
    named = [first or second for first, second in lines] + [run for run in runs if run.startswith("tunedock")]
    assert len(named) >= 12
    for line in named:
        parse(line)


def test_the_workflow_is_one(tunedock, here):
    tunedock("init", "p")
    workflow = yaml.safe_load((here / "p" / ".github" / "workflows" / "recipe.yml").read_text())
    assert set(workflow) == {"name", True, "permissions", "jobs"}  # YAML 1.1 reads `on` as true
    assert set(workflow[True]) == {"push", "pull_request"}
    assert workflow["permissions"] == {"contents": "read"}
    for step in workflow["jobs"]["check"]["steps"]:
        assert ("uses" in step) != ("run" in step)


def test_the_dockerfile_copies_what_is_there_and_runs_a_command_that_exists(tunedock, here):
    tunedock("init", "p")
    text = (here / "p" / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert steps[0][0] == "FROM"
    known = {"FROM", "RUN", "ARG", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in steps} == known
    ignored = (here / "p" / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    for name, rest in steps:
        if name == "COPY":
            *sources, _ = rest.split()
            for source in sources:
                assert (here / "p" / source).exists()
                assert f"!{source}" in ignored
        if name == "RUN":
            assert subprocess.run(["sh", "-n", "-c", rest]).returncode == 0
    last = dict(steps)
    parse(shlex.join(json.loads(last["ENTRYPOINT"]) + json.loads(last["CMD"])))
    assert last["USER"] == "trainer"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_samples_are_in_two_languages(name):
    rows = (Path(init.__file__).parent / "project" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert 20 <= len(rows) <= 40
    chinese = [row for row in rows if re.search("[\u4e00-\u9fff]", row)]
    assert 5 <= len(chinese) <= len(rows) // 2


def test_it_loads_nothing_heavy(here):
    code = (
        "import sys\nfrom tunedock.cli.app import main\n"
        "try:\n    main(['init', 'p'])\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "heavy = {'transformers', 'torch', 'rich', 'ruamel', 'numpy'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_it_works_from_a_built_wheel(here):
    """The wheel alone, unpacked somewhere else: every template is in it."""
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        ".",
        str(ROOT),
    ]
    assert subprocess.run(build, capture_output=True, timeout=200).returncode == 0
    with zipfile.ZipFile(next(here.glob("*.whl"))) as wheel:
        wheel.extractall(here / "site")
    code = "import tunedock; from tunedock.cli.app import main; print(tunedock.__file__); main(['init', 'p'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(here / "site")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(here / "site"))
    assert written(here / "p") == sorted(FILES)
