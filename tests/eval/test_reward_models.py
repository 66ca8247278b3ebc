"""A reward model as a source of rewards: the scores of a real, tiny classifier, loaded from its folder."""

from __future__ import annotations

import pytest

from scored import save_scorer
from tunedock.data.conversation import Conversation, Message
from tunedock.errors import InterruptedRun, ModelError
from tunedock.eval.rewards import Completion, Moment, make_scorer
from tunedock.eval.rewards.model import conversation
from tunedock.model.scorer import load_scorer
from tunedock.recipe.objectives.rewards import FunctionReward, ModelReward

PROMPT = (Message("user", "How many hours are in two days?"),)
ANSWERS = ["There are 48 hours.", "I do not know.", "No."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_scorer("qwen3", tmp_path_factory.mktemp("reward") / "model")


def completions(*texts):
    return [Completion(f"rows.jsonl:{n}", PROMPT, text, (1, 2, 3), answer="No.") for n, text in enumerate(texts)]


def test_scores_are_the_models_own(folder):
    talks = [Conversation((*PROMPT, Message("assistant", answer))) for answer in ANSWERS]
    wanted = load_scorer(folder).scores(talks)
    scorer = make_scorer([ModelReward(path=str(folder), weight=2.0), FunctionReward(name="exact_match")])
    scores = scorer(completions(*ANSWERS))
    assert scores.parts["model"] == pytest.approx(wanted)
    assert scores.total == pytest.approx([2 * value + exact for value, exact in zip(wanted, (0, 0, 1), strict=True)])
    assert scorer.lineage()[0]["path"] == str(folder)

    def stop():
        raise InterruptedRun("stopped")

    with pytest.raises(InterruptedRun):
        scorer(completions("x"), Moment(check=stop))


def test_reasoning_is_put_where_templates_look_for_it():
    (one, other) = completions("<think>\nTwice 24.\n</think>\n\n48", "<think> never ends")
    assert conversation(one).messages[-1] == Message("assistant", "48", reasoning="Twice 24.")
    assert conversation(other).messages[-1] == Message("assistant", "<think> never ends")


def test_what_is_no_reward_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    with pytest.raises(ModelError):
        make_scorer([ModelReward(path=str(tmp_path))])


def test_a_reward_model_that_is_not_there_is_named_as_one():
    with pytest.raises(ModelError) as raised:
        make_scorer([ModelReward(path="runs/nowhere")], offline=True)
    assert raised.value.where == "objective.rewards: runs/nowhere" and "local path" in str(raised.value.hint)
