from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from tunedock import __version__
from tunedock.cli import app as cli
from tunedock.errors import CheckError, exit_codes


def test_version_and_help(tunedock):
    assert tunedock("--version") == (0, f"tunedock {__version__}\n", "")
    code, out, _ = tunedock("--help")
    assert code == 0
    for command in ("train", "eval", "chat", "export", "data", "recipe", "runs"):
        assert f"\n  {command} " in out


@pytest.mark.parametrize("group", [[], ["data"], ["recipe"], ["runs"]], ids=lambda group: " ".join(group) or "all")
def test_the_list_of_commands_cuts_no_line(tunedock, group, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = tunedock(*group, "--help")
    assert code == 0
    assert [line for line in out.partition("Commands:")[2].splitlines() if line.endswith("...")] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"], ["--version"], ["train", "--help"], ["eval", "--help"], ["chat", "--help"], ["export", "--help"],
        ["data", "--help"], ["data", "check", "--help"], ["data", "show", "--help"], ["recipe", "--help"],
        ["recipe", "show", "--help"], ["runs", "--help"], ["runs", "list", "--help"], ["runs", "compare", "--help"],
    ],
)  # fmt: skip
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import sys\nfrom tunedock.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "heavy = {'pydantic', 'transformers', 'torch', 'rich', 'ruamel', 'numpy', 'tunedock.recipe.schema'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_line_never_loads_the_work_plane(recipe):
    code = (
        "import sys\nfrom tunedock.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "assert not {'torch', 'transformers', 'peft', 'datasets', 'accelerate'} & set(sys.modules)\n"
    )
    for arguments in (["recipe", "show", str(recipe)], ["runs", "list"], ["recipe", "schema"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nope"],
        ["train", "--nope"],
        ["data", "show", "r.yaml"],
        ["export"],
        ["export", "r", "--to", "d", "--format", "exe"],
    ],
)
def test_usage_errors_end_with_2(tunedock, arguments):
    code, _, err = tunedock(*arguments)
    assert code == 2
    assert "Usage: tunedock" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "nope.yaml"], "error: nope.yaml: there is no such file"),
        (["train"], "no recipe file was given"),
        (["train", "train.seed=3"], "no recipe file was given"),
        (["train", "r.yaml", "seed"], "`seed` is neither a recipe file nor key=value"),
        (["train", "r.yaml", "=3"], "`=3` is neither a recipe file nor key=value"),
        (["train", "r.yaml", "train.sede=3"], "sede"),
        (["train", "r.yaml", "train.seed=x"], "train.seed"),
        (["train", "r.yaml", "launch.on=kubernetes"], "not built yet"),
        (["data", "show", "r.yaml", "--row", "x"], "`x` names no row"),
    ],
)
def test_mistakes_are_said_once_with_exit_code_2(recipe, tunedock, arguments, said):
    code, out, err = tunedock(*arguments)
    assert code == 2
    assert out == ""
    assert said in err
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert not (recipe.parent / "runs").exists()


def test_an_error_as_json_stands_on_standard_output(recipe, tunedock):
    code, out, err = tunedock("train", "nope.yaml", "--json")
    error = json.loads(out)["error"]
    assert (code, error["kind"], error["where"], err) == (2, "RecipeError", "nope.yaml", "")


def test_every_error_ends_with_its_own_code(recipe, tunedock, worker):
    for code, names in exit_codes().items():
        for name in names:
            if name == "TunedockError":
                continue
            error = {"kind": name, "message": f"of kind {name}", "where": "here", "hint": "do this"}
            worker(["event", "failure", {"error": error}], ["exit", code])
            ended, out, err = tunedock("data", "show", "r.yaml", "--row", "0")
            assert ended == code
            assert out == ""
            assert f"error: here: of kind {name}" in err
            assert "hint: do this" in err


def test_what_nobody_foresaw_is_our_bug_and_shown_in_full(recipe, tunedock, monkeypatch):
    def fails(*_arguments, **_options):
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr("tunedock.pipeline.resolve_recipe", fails)
    code, _, err = tunedock("recipe", "show", "r.yaml")
    assert code == 70
    assert "Traceback (most recent call last)" in err
    assert "ZeroDivisionError: surprise" in err
    assert "error: this is a bug in tunedock" in err
    code, out, err = tunedock("recipe", "show", "r.yaml", "--json")
    assert json.loads(out)["error"]["kind"] == "BugError"
    assert "ZeroDivisionError: surprise" in err


def test_ctrl_c_that_a_library_made_an_error_of_is_no_bug(recipe, tunedock, monkeypatch):
    """As pydantic does while it makes a schema."""

    def interrupted(*_arguments, **_options):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("KeyboardInterrupt: ") from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("tunedock.pipeline.resolve_recipe", interrupted)
    code, _, err = tunedock("recipe", "show", "r.yaml")
    assert (code, err) == (130, "")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_cannot_steer_the_terminal(capsys):
    cli.print_error(CheckError("differs\x1b[2J", where="a\x1b]0;x\x07", hint="look\x9b1m"), as_json=False)
    assert capsys.readouterr().err == "error: a: differs\nhint: look\n"


@pytest.mark.parametrize(
    "arguments",
    [["recipe", "schema"], ["recipe", "show", "r.yaml"], ["--help"], ["recipe", "show", "r.yaml", "--json"]],
)
def test_a_closed_pipe_ends_quietly(recipe, arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "tunedock", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=recipe.parent,
    )
    process.stdout.close()  # before anything is written: every write fails
    _, err = process.communicate(timeout=30)
    assert err == b""


@pytest.mark.parametrize(
    "arguments",
    [
        ["runs", "stop"],
        ["runs", "show"],
        ["eval"],
        ["image", "load"],
        ["bundle", "key"],
        ["bundle", "load", "x", "--to"],
    ],
    ids=" ".join,
)
def test_a_path_that_no_disk_takes_is_no_bug(tunedock, arguments):
    code, _, told = tunedock(*arguments, "n" * 300)
    assert code in (5, 6, 8, 12)
    assert "Traceback" not in told
    assert told.startswith("error: ")
