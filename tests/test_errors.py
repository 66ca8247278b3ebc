"""Errors: what users read, what crosses between processes, and exit codes that scripts rely on."""

from __future__ import annotations

import json
import pickle

import pytest

from tunedock import errors
from tunedock.errors import BugError, RecipeError, RunError, TunedockError, exit_codes

KINDS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, TunedockError)]


def test_the_text_names_place_reason_and_way_out() -> None:
    assert str(RecipeError("x is wrong", where="r.yaml:3", hint="write y")) == "r.yaml:3: x is wrong\nhint: write y"
    assert str(RecipeError("x is wrong")) == "x is wrong"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_crosses_as_json(kind: type[TunedockError]) -> None:
    error = kind("什么 went wrong", where="row 3", hint="mend it")
    back = TunedockError.from_json(json.loads(json.dumps(error.to_json())))
    assert type(back) is kind
    assert (back.message, back.where, back.hint, str(back)) == (error.message, error.where, error.hint, str(error))


def test_an_unknown_kind_is_a_bug_not_a_crash() -> None:
    for value in ({"kind": "KeyError", "message": "x"}, {}, {"kind": ["a"], "message": None}):
        assert type(TunedockError.from_json(value)) is BugError


def test_exit_codes_are_stable() -> None:
    assert exit_codes() == {
        1: ["TunedockError"],
        2: ["RecipeError", "NotBuiltError"],
        3: ["DataError"],
        4: ["ModelError"],
        5: ["RunError"],
        6: ["CheckError"],
        7: ["OutOfMemoryError", "RowTooLargeError"],
        8: ["DiskError"],
        9: ["DivergedError"],
        10: ["DependencyError"],
        11: ["RewardError"],
        12: ["EngineError"],
        13: ["LostPeerError"],
        70: ["BugError"],
        130: ["InterruptedRun"],
        143: ["PreemptedRun"],
    }
    assert sum(len(names) for names in exit_codes().values()) == len(KINDS)


def test_the_docstring_lists_every_kind_with_its_code() -> None:
    tree = (errors.__doc__ or "").split("The number is")[0]
    for kind in KINDS:
        if kind is not TunedockError and TunedockError in kind.__bases__:
            line = next(line for line in tree.splitlines() if f" {kind.__name__} " in line)
            assert f" {kind.exit_code} " in line


def test_an_error_survives_a_worker_pool() -> None:
    error = pickle.loads(pickle.dumps(RunError("gone", where="runs/a", hint="look")))
    assert (str(error), error.where, error.hint) == ("runs/a: gone\nhint: look", "runs/a", "look")
