"""Reward functions as people write them for TRL, loaded from real files."""

from __future__ import annotations

import inspect
import math
import sys
import textwrap

import pytest

from tunedock.data.conversation import Message
from tunedock.errors import RecipeError, RewardError
from tunedock.eval.rewards import Completion, Moment, make_scorer
from tunedock.eval.rewards.built_in import FUNCTIONS
from tunedock.eval.rewards.completion import Log
from tunedock.eval.rewards.functions import open_function
from tunedock.recipe.objectives.rewards import BUILT_IN, FunctionReward
from tunedock.recipe.rewards import digest

PROMPT = (Message("system", "Be brief."), Message("user", "2+2?"))


def completions(*texts, **columns):
    return [
        Completion(f"rows.jsonl:{n + 1}", PROMPT, text, tuple(range(len(text))), columns=columns, answer="4")
        for n, text in enumerate(texts)
    ]


@pytest.fixture
def written(tmp_path):
    def write(code, name="f", **settings):
        path = tmp_path / "rewards.py"
        path.write_text(textwrap.dedent(code))
        return open_function(FunctionReward(path=str(path), name=name, **settings))

    yield write
    sys.path[:] = [folder for folder in sys.path if folder != str(tmp_path)]


def asked(source, given, log=None, moment=None):
    return source.values(given, moment or Moment(), log or Log())


def test_a_function_of_trls_own_is_called_as_trl_calls_it():
    think = pytest.importorskip("trl.rewards.format_rewards").think_format_reward
    assert think.__module__ == "trl.rewards.format_rewards"
    source = open_function(FunctionReward(path="trl.rewards.format_rewards", name="think_format_reward"))
    assert asked(source, completions("<think>\nI add.\n</think>\n4", "4")) == [1.0, 0.0]
    assert len(source.lineage()["sha256"]) == 64


def test_what_a_function_is_given(written):
    source = written(
        """
        seen = {}
        def f(prompts, completions, completion_ids, level, answer, **kwargs):
            seen.update(prompts=prompts, completions=completions, ids=completion_ids, level=level, answer=answer, **kwargs)
            kwargs["log_metric"]("share", 0.25)
            kwargs["log_metric"]("share", 0.75)
            kwargs["log_extra"]("seen", [len(c) for c in completions])
            return [1, None]
        """
    )
    log = Log()
    given = completions("four", "4", level="hard", solution=[4])
    assert asked(source, given, log, Moment(step=3, max_steps=9)) == [1.0, None]
    seen = sys.modules[source._function.__module__].seen if source._function.__module__ in sys.modules else {}
    seen = seen or source._function.__globals__["seen"]
    assert seen["prompts"][0] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in ("four", "4")]
    assert (seen["ids"][1], seen["level"], seen["answer"]) == ([0], ["hard", "hard"], ["4", "4"])
    assert seen["solution"] == [[4], [4]]
    assert (seen["trainer_state"].global_step, seen["trainer_state"].max_steps) == (3, 9)
    assert (log.metrics, log.extra) == ({"share": [0.25, 0.75]}, {"seen": [1, 1]})


def test_a_function_gets_only_what_it_takes(written):
    assert asked(
        written("def f(completions): return [len(c[0]['content']) for c in completions]"), completions("ab")
    ) == [2]
    source = written("def f(completions, bonus, base=1): return [base + bonus for _ in completions]", args={"bonus": 2})
    assert asked(source, completions("ab")) == [3]


def test_a_rows_own_answer_column_goes_before_the_one_read_from_it(written):
    source = written("def f(answer, **kwargs): return [float(a) for a in answer]")
    assert asked(source, completions("x")) == [4.0]
    assert asked(source, completions("x", answer=7)) == [7.0]


def test_columns_of_rows_that_have_them_not_are_none(written):
    source = written("def f(level, **kwargs): return [0.0 if l is None else 1.0 for l in level]")
    assert asked(source, [*completions("a", level=1), *completions("b")]) == [1.0, 0.0]


def test_an_async_function(written):
    source = written(
        """
        import asyncio
        async def f(completions, **kwargs):
            await asyncio.sleep(0)
            return [0.5] * len(completions)
        """
    )
    assert asked(source, completions("a", "b")) == [0.5, 0.5]


@pytest.mark.parametrize(
    "made", ["torch.tensor([1.0, 2.0])", "[torch.tensor(1), torch.tensor(2.0)]", "numpy.array([1, 2])", "(True, 2)"]
)
def test_numbers_of_any_make(written, made):
    source = written(f"import torch, numpy\ndef f(**kwargs): return {made}")
    assert asked(source, completions("a", "b")) == [1.0, 2.0]


def test_classes_and_modules_beside_the_file(written, tmp_path):
    (tmp_path / "beside_it.py").write_text("BONUS = 3\n")
    source = written(
        """
        from dataclasses import dataclass
        from beside_it import BONUS
        @dataclass
        class Judge:
            weight: int
        def f(completions): return [Judge(BONUS).weight for _ in completions]
        """
    )
    assert asked(source, completions("a")) == [3]


def test_an_exception_names_the_line_and_the_row(written, tmp_path):
    source = written(
        """
        def inner(text):
            return int(text)
        def f(completions, **kwargs):
            return [inner(c[0]["content"]) for c in completions]
        """
    )
    with pytest.raises(RewardError) as raised:
        asked(source, completions("1", "two", "3"))
    assert raised.value.where == "rows.jsonl:2"
    assert f"{tmp_path / 'rewards.py'}:3" in raised.value.message
    assert "ValueError: invalid literal" in raised.value.message
    assert "`rewards.py:f`" in raised.value.message


def test_an_exception_that_only_all_rows_together_cause(written):
    source = written("def f(completions):\n  assert len(completions) < 2, 'too many'\n  return [0]")
    with pytest.raises(RewardError, match="too many") as raised:
        asked(source, completions("a", "b", "c"))
    assert raised.value.where == "rows.jsonl:1 and 2 more rows together"


@pytest.mark.parametrize(
    ("returned", "reason", "row"),
    [
        ("[1.0]", "gave 1 scores for 2 completions", "rows.jsonl:1"),
        ("None", "NoneType", "rows.jsonl:1"),
        ("{'a': 1}", "not a list", "rows.jsonl:1"),
        ("1.0", "not a list", "rows.jsonl:1"),
        ("[1.0, 'good']", "str \\('good'\\) for a score", "rows.jsonl:2"),
        ("[1.0, [2.0]]", "list", "rows.jsonl:2"),
        ("[1.0, float('nan')]", "nan", "rows.jsonl:2"),
        ("[float('-inf'), 1]", "-inf", "rows.jsonl:1"),
        ("[1, 1j]", "complex", "rows.jsonl:2"),
    ],
)
def test_what_is_no_list_of_scores(written, returned, reason, row):
    with pytest.raises(RewardError, match=reason) as raised:
        asked(written(f"def f(**kwargs): return {returned}"), completions("a", "b"))
    assert raised.value.where == row


def test_sys_exit_ends_nothing(written):
    with pytest.raises(RewardError, match="SystemExit"):
        asked(written("import sys\ndef f(**kwargs): sys.exit(3)"), completions("a"))


def test_a_column_no_row_has_is_told_with_those_there_are(written):
    source = written("def f(completions, solution): return [0] * len(completions)")
    with pytest.raises(RewardError, match="wants the column `solution`") as raised:
        asked(source, completions("a", level=1))
    assert "`level`" in raised.value.hint


@pytest.mark.parametrize(
    ("code", "reason", "line"),
    [
        ("def f(:\n", "SyntaxError", 1),
        ("x = 1\nimport nothing_of_this_name\n", "No module named", 2),
        ("x = 1\n\n1/0\n", "ZeroDivision", 3),
    ],
)
def test_a_file_that_cannot_be_loaded(written, tmp_path, code, reason, line):
    with pytest.raises(RecipeError, match=reason) as raised:
        written(code)
    assert raised.value.where == f"{tmp_path / 'rewards.py'}:{line}"


def test_what_is_not_there(written):
    with pytest.raises(RecipeError, match="no function `g`") as raised:
        written("def f(): ...\ndef _hidden(): ...", name="g")
    assert raised.value.hint == "it has f"
    with pytest.raises(RecipeError, match="No module named"):
        open_function(FunctionReward(path="nothing_of.this_name", name="f"))
    with pytest.raises(RecipeError, match="does not say what it takes"):
        open_function(FunctionReward(path="builtins", name="max"))
    with pytest.raises(RecipeError, match="takes no `bonus`"):
        written("def f(completions): ...", args={"bonus": 1})
    with pytest.raises(RecipeError, match="`completions` is given by training"):
        written("def f(completions): ...", args={"completions": []})


def test_what_runs_is_what_was_hashed(written, tmp_path):
    code = "def f(**kwargs): return [1.0]"
    known = digest(code.encode())
    assert asked(written(code, sha256=known), completions("a")) == [1.0]
    with pytest.raises(RecipeError, match="its content has changed"):
        written(code + "  # other", sha256=known)


def test_a_stray_module_beside_the_file_stands_in_for_nothing(written, tmp_path):
    (tmp_path / "json.py").write_text("raise RuntimeError('a stray json.py ran')\n")
    sys.modules.pop("json.tool", None)
    source = written("import json\ndef f(completions): return [float(json.loads('1'))]")
    assert asked(source, completions("a")) == [1.0]
    assert sys.path[-1] == str(tmp_path)


# -- those that come with tunedock ------------------------------------------------------------------------------------


def built_in(name, **args):
    return open_function(FunctionReward(name=name, args=args))


def test_the_recipe_knows_the_functions_and_their_arguments():
    for name, function in FUNCTIONS.items():
        parameters = [p.name for p in inspect.signature(function).parameters.values()]
        own = set(parameters) - {"prompts", "completions", "completion_ids", "answer", "columns"}
        assert own == set(BUILT_IN[name])
    assert FUNCTIONS.keys() == BUILT_IN.keys()


def test_exact_match():
    assert asked(built_in("exact_match"), completions("4", " 4\n", "5", "The answer is 4")) == [1, 1, 0, 0]
    given = completions("Paris", "paris", city="paris")
    assert asked(built_in("exact_match", column="city"), given) == [0, 1]
    assert asked(built_in("exact_match", column="city", ignore_case=True), given) == [1, 1]
    assert asked(built_in("exact_match"), [Completion("r", PROMPT, "4", (1,))]) == [None]
    with pytest.raises(RewardError, match="`exact_match` wants the column `town`, which no row has") as raised:
        asked(built_in("exact_match", column="town"), given)
    assert raised.value.hint == "the rows have `city`"


def test_regex_match():
    source = built_in("regex_match", pattern="<think>.*</think>\\s*<answer>\\d+</answer>")
    texts = ("<think>a\nb</think>\n<answer>4</answer>\n", "<answer>4</answer>", "so: <think></think><answer>4</answer>")
    assert asked(source, completions(*texts)) == [1, 0, 0]


def test_length_penalty():
    source = built_in("length_penalty", free_tokens=4, max_tokens=8)
    assert asked(source, completions("abcd", "abcde", "abcdefgh", "abcdefghijk")) == [0, -0.25, -1, -1]


# -- together ---------------------------------------------------------------------------------------------------------


def scorer_of(*rewards):
    return make_scorer([FunctionReward.model_validate(reward) for reward in rewards])


def test_the_weighted_sum_is_trls(tmp_path):
    (tmp_path / "parts.py").write_text("def some(completions): return [None, 3.0, None]\n")
    scorer = scorer_of(
        {"name": "exact_match", "weight": 2.0},
        {"name": "length_penalty", "args": {"free_tokens": 0, "max_tokens": 10}, "weight": 0.5},
        {"name": "some", "path": str(tmp_path / "parts.py"), "weight": -1.0},
    )
    scores = scorer(completions("4", "5", "44"))
    values = [[1.0, -0.1, math.nan], [0.0, -0.1, 3.0], [0.0, -0.2, math.nan]]
    import torch

    wanted = (torch.tensor(values, dtype=torch.float64) * torch.tensor([2.0, 0.5, -1.0])).nansum(dim=1)
    assert scores.total == pytest.approx(wanted.tolist())
    assert scores.parts["some"] == [None, 3.0, None]
    assert scores.metrics == pytest.approx(
        {
            "rewards/exact_match": 1 / 3,
            "rewards/length_penalty": -0.4 / 3,
            "rewards/some": 3.0,
            "rewards/some/skipped": 2 / 3,
        }
    )
    assert [one["name"] for one in scorer.lineage()] == ["exact_match", "length_penalty", "some"]
    scorer.close()


def test_two_sources_of_one_name_have_two_metrics():
    scorer = scorer_of(
        {"name": "regex_match", "args": {"pattern": "4"}}, {"name": "regex_match", "args": {"pattern": "5"}}
    )
    assert scorer(completions("4")).parts == {"regex_match": [1.0], "regex_match-2": [0.0]}


def test_what_a_function_logs_takes_the_place_of_no_figure_of_the_run(tmp_path):
    (tmp_path / "one.py").write_text(
        "def one(completions, log_metric, **rest):\n    log_metric('loss', 9.0)\n    return [1.0 for _ in completions]\n"
    )
    scores = scorer_of({"name": "one", "path": str(tmp_path / "one.py")})(completions("4"))
    assert scores.metrics == {"logged/loss": 9.0, "rewards/one": 1.0}


def test_an_answer_nobody_scores_is_an_error():
    with pytest.raises(RewardError, match="no source of rewards has a say") as raised:
        scorer_of({"name": "exact_match"})([Completion("rows.jsonl:9", PROMPT, "4", (1,))])
    assert raised.value.where == "rows.jsonl:9"
