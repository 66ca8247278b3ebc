"""Completion: what fits at the cursor, and real shells that ask: bash and zsh at a terminal, fish by its `complete -C`."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from tunedock.cli.app import app
from tunedock.cli.completion import complete

ROOT = typer.main.get_command(app)
PROGRAM = str(Path(sys.executable).parent)
"""Where the `tunedock` of this environment is."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("recipe.yaml", "recipe.txt", "rows.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "chain.yaml").write_text("stages:\n  - name: sft\n    model: m\n  - {name: scores, eval: sft}\n")
    for age, name in enumerate(["first", "with space", "second", ".hidden", "no\nline"]):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "run.json").write_text("{}")
        os.utime(run / "run.json", (age, age))
    (tmp_path / "runs" / "no-run").mkdir()
    return tmp_path


def words(*typed: str) -> list[str]:
    *before, current = typed
    return [word for word, _ in complete(ROOT, before, current).words]


@pytest.mark.parametrize(
    ("typed", "fitting"),
    [
        (["tr"], ["train"]),
        (["data", "s"], ["show"]),
        (["runs", ""], ["list", "show", "stop", "compare", "metrics", "delete"]),
        (["data", "check", "--"], ["--to", "--json", "--help"]),
        (["data", "check", "--json", "--"], ["--to", "--help"]),
        (["--v"], ["--version"]),
        (["export", "first", "--format", ""], ["hf", "adapter", "gguf", "ollama"]),
        (["export", "first", "--format=a"], ["--format=adapter"]),
        (["init", "p", "--objective", "d"], ["dpo"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["eval", "first", "--split", "t"], ["train", "test"]),
        (["plan", "r.yaml", "--gpu", "409"], ["4090"]),
        (["train", "recipe.yaml", "train.learning"], ["train.learning_rate="]),
        (["train", "recipe.yaml", "quan"], ["quantize="]),
        (["pipeline", "chain.yaml", "--from", "s"], ["sft", "scores"]),
        (["pipeline", "chain.yaml", "sft.train.learning_rate"], ["sft.train.learning_rate="]),
        (["pipeline", "chain.yaml", "no.train.se"], []),
        (["pipeline", "nowhere.yaml", "--only", ""], []),
        (["eval", "first", "max_new"], ["max_new_tokens="]),
        (["eval", ""], ["second", "with space", "first"]),
        (["eval", "--split", "test", "f"], ["first"]),
        (["runs", "compare", "first", "s"], ["second"]),
        (["train", "--resume", "sec"], ["second"]),
        (["eval", "--runs-dir", "elsewhere", ""], []),
        (["eval", "--", "f"], ["first"]),
        (["doctor", ""], []),
        (["no", "such", "command", ""], []),
        (["train", "--no-such-option", ""], []),
        (["train", "--json="], []),
        ([""], list(ROOT.commands)),
    ],
)
def test_words(folder, typed, fitting):
    assert words(*typed) == fitting


@pytest.mark.parametrize(
    ("typed", "rest"),
    [
        (["train", ""], ":files .yaml .yml"),
        (["recipe", "show", "a.yaml", "b"], ":files .yaml .yml"),
        (["pipeline", ""], ":files .yaml .yml"),
        (["train", "r.yaml", "data.train=ro"], ":files"),
        (["eval", ""], ":folders"),
        (["export", "first", "--to", ""], ":folders"),
        (["init", ""], ":folders"),
        (["init", "p", "--model", ""], ":folders"),
        (["data", "show", "r.yaml", "--html", ""], ":files"),
        (["doctor", ""], ":none"),
        (["plan", "r.yaml", "--rows", ""], ":none"),
    ],
)
def test_what_the_shell_completes_itself(folder, typed, rest):
    *before, current = typed
    assert complete(ROOT, before, current).rest == rest


def test_every_key_is_one_that_a_recipe_takes(folder):
    from tunedock.recipe.words import ITEM

    keys = words("train", "recipe.yaml", "t") + words("train", "recipe.yaml", "d") + words("train", "recipe.yaml", "a")
    assert {"train.seed=", "data.max_length=", "data.split.seed=", "data.train=", "adapter=", "adapter.r="} <= set(keys)
    assert not [key for key in keys if f".{ITEM}" in key]


@given(
    st.lists(
        st.one_of(st.sampled_from(["train", "data", "--runs-dir", "--", "-", "", "--to=", "eval"]), st.text(max_size=8))
    )
)
def test_whatever_is_typed_nothing_breaks(typed):
    found = complete(ROOT, typed[:-1], typed[-1] if typed else "")
    for line in str(found).splitlines()[1:]:
        assert line.split("\t")[0]


def test_the_answer_is_quick_to_come_by():
    code = (
        "import sys\nfrom tunedock.cli.app import main\n"
        "try:\n    main(['__complete', *sys.argv[1:]])\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "heavy = {'pydantic', 'torch', 'transformers', 'rich', 'ruamel', 'numpy'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    for typed in ([""], ["train", ""], ["eval", "x"], ["plan", "r.yaml", "--gpu", ""]):
        done = subprocess.run([sys.executable, "-c", code, *typed], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(":")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_printed(tunedock, shell):
    code, out, _ = tunedock("completion", shell)
    assert code == 0
    assert "__complete" in out
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=out, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, "")
    assert tunedock("completion", "tcsh")[0] == 2


TYPED = [
    ("tunedock tra", ["train"]),
    ("tunedock eval wi", ["eval", "with space"]),
    ("tunedock eval with\\ s", ["eval", "with space"]),
    ("tunedock eval 'wi", ["eval", "with space"]),
    ("tunedock eval ./runs/fi", ["eval", "./runs/first/"]),
    ("tunedock train rec", ["train", "recipe.yaml"]),
    ("tunedock train ~/rec", ["train", "{home}/recipe.yaml"]),
    ("tunedock export first --format=ad", ["export", "first", "--format=adapter"]),
    ("tunedock train recipe.yaml train.lear", ["train", "recipe.yaml", "train.learning_rate="]),
    ("tunedock train recipe.yaml data.train=./ro", ["train", "recipe.yaml", "data.train=./rows.jsonl"]),
    (f"{PROGRAM}/tunedock runs sh", ["runs", "show"]),
]


class Terminal:
    """A shell at a pseudo-terminal."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self._end, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "HOME": str(folder), "PS1": "READY> ", "INPUTRC": "/dev/null"}
        environment["PATH"] = f"{PROGRAM}{os.pathsep}{os.environ['PATH']}"
        self._process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment, start_new_session=True
        )
        os.close(theirs)
        self._seen = ""
        self.read_to("READY> ")

    def write(self, text: str) -> None:
        os.write(self._end, text.encode())

    def read_to(self, text: str) -> str:
        deadline = time.monotonic() + 20
        while text not in self._seen:
            assert time.monotonic() < deadline, self._seen
            if select.select([self._end], [], [], 0.1)[0]:
                self._seen += os.read(self._end, 65536).decode("utf-8", "replace")
        found, _, self._seen = self._seen.partition(text)
        return found

    def line(self, text: str) -> str:
        self.write(f"{text}\r")
        return self.read_to("READY> ")

    def arguments_after_tab(self, typed: str) -> list[str]:
        """The words of the line as the shell has them once Tab is pressed behind `typed`."""
        # ^A and ^E: to the line's start and end.
        self.write(f"{typed}\t\x01printf '<%s>\\n' BEGIN \x05 END\r")
        self.read_to("<BEGIN>")
        found = self.read_to("<END>")
        self.read_to("READY> ")
        return [line[1:-1] for line in found.replace("\r", "").split("\n") if line]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._end)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_real_tab(folder, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    quiet = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"]}[shell]
    terminal = Terminal([shell, *quiet, "-i"], folder)
    try:
        terminal.line(f'eval "$(tunedock completion {shell})"')
        for typed, words_ in TYPED:
            expected = [word.format(home=folder) for word in words_]
            found = terminal.arguments_after_tab(typed)[1:]
            # zsh takes a folder's slash back when the word ends.
            assert [word.rstrip("/") for word in found] == [word.rstrip("/") for word in expected], typed
        shown = terminal.line("tunedock runs \t\t\x15")  # an open choice is listed
        assert [name for name in ("list", "show", "stop", "compare", "delete") if name in shown] == [
            "list",
            "show",
            "stop",
            "compare",
            "delete",
        ]
    finally:
        terminal.close()


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed here")
def test_a_real_fish(folder):
    environment = {**os.environ, "PATH": f"{PROGRAM}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder)}
    asked = [
        (typed, words_[-1]) for typed, words_ in TYPED if not set("'~\\") & set(typed)
    ]  # which it gives back as typed
    script = ["tunedock completion fish | source", *(f"complete -C '{typed}'; echo" for typed, _ in asked)]
    done = subprocess.run(
        ["fish", "--no-config", "-c", "; ".join(script)], capture_output=True, text=True, env=environment, timeout=60
    )
    answers = [line.split("\t")[0] for line in done.stdout.splitlines() if line]
    assert answers == [word for _, word in asked], done.stderr
