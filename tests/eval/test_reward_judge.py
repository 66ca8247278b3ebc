"""The judge, through the real `openai` client, against a real HTTP server (tests/stand_in_judge.py)."""

from __future__ import annotations

import time

import pytest

from stand_in_judge import KEY, serving
from tunedock.data.conversation import Message
from tunedock.errors import InterruptedRun, RecipeError, RewardError
from tunedock.eval.rewards.completion import Completion, Log, Moment
from tunedock.eval.rewards.judge import Judge
from tunedock.recipe.objectives.rewards import JudgeReward


@pytest.fixture(scope="module")
def server():
    with serving() as found:
        yield found


def completion(text, answer="red green blue", row="rows.jsonl:1", question="Which colours?"):
    return Completion(row, (Message("system", "s"), Message("user", question)), text, (1, 2), answer=answer)


def judge(server, model="words", **settings):
    warnings = settings.pop("warnings", [])
    section = JudgeReward(base_url=server.url, model=model, **settings)
    return Judge(section, "judge", on_warning=warnings.append, backoff_s=0.01)


def asked(made, completions, moment=None):
    try:
        return made.values(completions, moment or Moment(), Log())
    finally:
        made.close()


def test_scores_are_the_servers_mapped_to_0_and_1(server):
    answers = [completion("red green blue"), completion("red"), completion("nothing of it")]
    assert asked(judge(server), answers) == pytest.approx([1.0, 0.3333, 0.0])
    assert asked(judge(server, scale=[10.0, 0.0]), answers) == pytest.approx([0.0, 0.6667, 1.0])


def test_connections_serve_one_call_after_another(server):
    made = judge(server)
    for _ in range(3):
        assert made.values([completion("red green blue")], Moment(), Log()) == [1.0]
    made.close()
    assert made.values([completion("red green blue")], Moment(), Log()) == [1.0]
    made.close()


@pytest.mark.parametrize(
    "model", ["500-2", "503-2", "429-2", "408-1", "html-1", "broken-1", "prose-2", "nothing-1", "cut-2"]
)
def test_what_may_pass_is_tried_again(server, model):
    made = judge(server, model, max_retries=2)
    assert asked(made, [completion(f"red {model}", question=model)]) == pytest.approx([0.3333])


def test_a_server_that_is_slow_once_is_asked_again(server):
    made = judge(server, "slow-1", timeout_s=0.3)
    assert asked(made, [completion("red", question="slowly")]) == pytest.approx([0.3333])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("500", "HTTP 500"),
        ("429", "HTTP 429"),
        ("prose", "no JSON: I would say it deserves a 9"),
        ("nothing", "empty"),
        ("cut", "cut off at `max_tokens`"),
        ("beyond", "11 is not between 0 and 10"),
        ("nan", "no JSON"),
        ("html", "no chat completion"),
        ("broken", "no chat completion"),
    ],
)
def test_when_no_try_gives_a_score_the_row_and_the_reason_are_told(server, model, reason):
    with pytest.raises(RewardError, match=reason) as raised:
        asked(judge(server, model, max_retries=1), [completion("red", row="rows.jsonl:7")])
    assert raised.value.where == "rows.jsonl:7"
    assert "2 tries" in raised.value.message


def test_a_policy_may_leave_the_judge_out(server):
    warnings = []
    made = judge(server, "prose", max_retries=0, on_error="skip", warnings=warnings)
    assert asked(made, [completion("red"), completion("blue")]) == [None, None]
    assert warnings == ["the judge `judge` is left out of 2 of 2 answers' rewards"]


def test_a_request_that_the_server_refuses_is_not_repeated(server):
    before = len(server.requests)
    with pytest.raises(RewardError, match="after 1 try: HTTP 422"):
        asked(judge(server, "422"), [completion("red")])
    assert len(server.requests) == before + 1


@pytest.mark.parametrize("model", ["404", "403", "keyed"])
def test_what_never_passes_ends_the_run_whatever_the_policy(server, model):
    with pytest.raises(RewardError, match=r"cannot be asked at http.*HTTP 40"):
        asked(judge(server, model, on_error="skip"), [completion("red")])


def test_nobody_listening_is_told_with_the_address():
    section = JudgeReward(base_url="http://127.0.0.1:9/v1", model="m", max_retries=1)
    made = Judge(section, "judge", on_warning=print, backoff_s=0.01)
    with pytest.raises(RewardError, match=r"Connection error.*127\.0\.0\.1:9"):
        asked(made, [completion("red")])


def test_the_key_comes_from_its_variable_and_no_other_goes_out(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-this-server")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    assert asked(judge(server), [completion("red green blue")]) == [1.0]
    assert "not-for-this-server" not in str(server.headers[-1])
    with pytest.raises(RecipeError, match="JUDGE_KEY is not set"):
        judge(server, "keyed", api_key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    made = judge(server, "keyed", api_key_env="JUDGE_KEY")
    assert KEY not in str(made.lineage())
    assert asked(made, [completion("red green blue")]) == [1.0]


def test_requests_under_way_are_bounded_and_equal_ones_asked_once(server):
    server.most_at_once, before = 0, len(server.requests)
    answers = [completion(f"red {n // 2}") for n in range(16)]
    asked(judge(server, "busy", concurrency=3), answers)
    assert server.most_at_once <= 3
    assert len(server.requests) - before == 8
    before = len(server.requests)
    asked(judge(server, temperature=0.7), [completion("red")] * 3)
    assert len(server.requests) - before == 3


def test_waiting_can_be_stopped(server):
    def stop():
        raise InterruptedRun("stopped")

    began = time.monotonic()
    with pytest.raises(InterruptedRun):
        asked(judge(server, "slow", timeout_s=30.0), [completion("red")], Moment(check=stop))
    assert time.monotonic() - began < 0.95  # the server sleeps 1 s


def test_the_request_is_what_the_recipe_says(server):
    template = "{{ question }}|{{ completion }}|{{ columns.level }}|{{ prompt | length }}|{{ answer }}"
    made = judge(server, "prose-0", prompt=template, system="Be strict.", temperature=0.25, max_tokens=9)
    one = Completion("r:1", (Message("user", "Why?"),), "Because.", (1,), columns={"level": 3}, answer=None)
    asked(made, [one])
    sent = server.requests[-1]
    assert sent["messages"] == [
        {"role": "system", "content": "Be strict."},
        {"role": "user", "content": "Why?|Because.|3|1|None"},
    ]
    assert (sent["temperature"], sent["max_tokens"], sent["model"]) == (0.25, 9, "prose-0")


def test_the_default_prompt_holds_the_reference_only_where_there_is_one(server):
    for answer in ("blue", None):
        asked(judge(server, scale=[1.0, 5.0], on_error="skip", max_retries=0), [completion("x", answer=answer)])
        said = server.requests[-1]["messages"][0]["content"]
        assert ("<reference>\nblue\n</reference>" in said) == (answer is not None)
        assert "from 1 (useless) to 5 (perfect)" in said
    asked(judge(server, parse="regex", on_error="skip", max_retries=0), [completion("x")])
    assert server.requests[-1]["messages"][0]["content"].endswith(
        "Reply with one line, Score: n, and nothing else, where n is a number from 0 (useless) to 10 (perfect)."
    )


@pytest.mark.parametrize(
    "template", ["{{ nobody }}", "{{ columns.level }}", "{{ ''.__class__.__mro__ }}", "{{ 1 // 0 }}"]
)
def test_a_template_that_cannot_be_rendered_names_the_row(server, template):
    with pytest.raises(RewardError, match="cannot be rendered") as raised:
        asked(judge(server, prompt=template), [completion("red", row="rows.jsonl:3")])
    assert raised.value.where == "rows.jsonl:3"
