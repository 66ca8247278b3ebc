"""The `rewards` of a recipe: shorthands, checks before a run, files known by their content."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from tunedock.errors import RecipeError
from tunedock.recipe.load import Loaded
from tunedock.recipe.merge import Merge
from tunedock.recipe.objectives.rewards import FunctionReward, JudgeReward, ModelReward, Reward, labels, names_module
from tunedock.recipe.rewards import digest, path_keys, settle

READ = TypeAdapter(Reward)
JUDGE = {"kind": "judge", "base_url": "http://localhost:8000/v1", "model": "m"}


def settled(*rewards):
    values = {"objective": {"rewards": [READ.validate_python(reward).model_dump() for reward in rewards]}}
    derived = {}
    settle(values, Loaded(None, {}, Merge(), ()), derived)
    return values["objective"]["rewards"], derived


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("exact_match", {"name": "exact_match", "path": None}),
        ("rewards.py:exact", {"name": "exact", "path": "rewards.py"}),
        ("pkg.mod:f", {"name": "f", "path": "pkg.mod"}),
        ({"name": "f", "path": "/a/b.py"}, {"name": "f", "path": "/a/b.py"}),
    ],
)
def test_functions_by_a_word(written, meant):
    read = READ.validate_python(written)
    assert isinstance(read, FunctionReward)
    assert {"name": read.name, "path": read.path} == meant


def test_kinds():
    assert isinstance(READ.validate_python({"kind": "model", "path": "x/y", "weight": 2.0}), ModelReward)
    assert isinstance(READ.validate_python(JUDGE), JudgeReward)
    for wrong in ({"kind": "oracle"}, {"kind": "model"}, {"kind": "model", "path": "x", "args": {}}, 3, None):
        with pytest.raises(ValidationError):
            READ.validate_python(wrong)


def test_names_of_metrics_are_never_alike():
    rewards = [
        READ.validate_python(r)
        for r in ("f", "f", {"kind": "model", "path": "a"}, {"kind": "model", "path": "b"}, "f-2")
    ]
    assert labels(rewards) == ["f", "f-2", "model", "model-2", "f-2-2"]


@given(st.lists(st.sampled_from(["f", "f-2", "g", "f-2-2"]), max_size=8))
def test_names_stay_apart_whatever_they_are(names):
    found = labels([FunctionReward(name=name) for name in names])
    assert len(set(found)) == len(names)


def test_a_file_is_known_by_its_content(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text("def f(): ...\n")
    ((first,), derived) = settled({"name": "f", "path": str(path)})
    assert first["sha256"] == digest(b"def f(): ...\n")
    assert derived == {"objective.rewards.0.sha256": "the file's content"}
    assert settled(first)[1] == {}
    path.write_text("def f(): return 1\n")
    with pytest.raises(RecipeError, match="its content has changed"):
        settled(first)
    assert settled({"name": "f", "path": str(path)})[0][0]["sha256"] != first["sha256"]


def test_paths_to_look_up():
    rewards = [{"kind": "model", "path": "a/b"}, "rewards.py:f", "pkg.mod:f", "exact_match", JUDGE]
    values = {"objective": {"rewards": [READ.validate_python(reward).model_dump() for reward in rewards]}}
    found = list(path_keys(values))
    assert found == [
        (("objective", "rewards", 0, "path"), True, True),
        (("objective", "rewards", 1, "path"), True, False),
    ]
    assert list(path_keys({"objective": {"kind": "sft"}})) == []
    assert (
        names_module("trl.rewards.format_rewards") and not names_module("rewards.py") and not names_module("./rewards")
    )


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        ("exact_mach", "no function `exact_mach` of tunedock's own"),
        ({"name": "regex_match"}, "`args.pattern` must be a regular expression"),
        ({"name": "regex_match", "args": {"pattern": "("}}, "no regular expression"),
        ({"name": "exact_match", "args": {"colum": "a"}}, "takes no `colum`"),
        ({"name": "length_penalty", "args": {"free_tokens": 9, "max_tokens": 9}}, "smaller"),
        ({"name": "a.b", "path": "pkg"}, "no name of a function"),
        ({"kind": "model", "path": "x", "name": "a/b"}, "names a metric"),
        ({**JUDGE, "base_url": "localhost:8000"}, "is no URL"),
        ({**JUDGE, "base_url": "https://user:pass@host/v1"}, "holds a password"),
        ({**JUDGE, "scale": [3.0, 3.0]}, "one value twice"),
        ({**JUDGE, "parse": "regex", "pattern": "Score"}, "needs one group"),
        ({**JUDGE, "parse": "regex", "pattern": "(("}, "no regular expression"),
        ({**JUDGE, "prompt": "{% if %}"}, "no Jinja template"),
    ],
)
def test_what_cannot_be_is_told_before_a_run(reward, reason):
    with pytest.raises(RecipeError, match=reason) as raised:
        settled(reward)
    assert "objective.rewards.0" in str(raised.value)


def test_files_that_are_none(tmp_path):
    for name, reason in (("there_is_none.py", "cannot be read"), ("notes.txt", "no Python file")):
        with pytest.raises(RecipeError, match=reason):
            settled({"name": "f", "path": str(tmp_path / name)})
    (tmp_path / "large.py").write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(RecipeError, match="larger than 1 MiB"):
        settled({"name": "f", "path": str(tmp_path / "large.py")})


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(RecipeError, match="2 problems"):
        settled("nope", {**JUDGE, "base_url": "x"})
