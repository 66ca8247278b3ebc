"""A reward model asked from outside says what plain transformers says, whatever it is loaded from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from families import save_tiny, tokenizer
from scored import SCORED, plain_score, save_scorer, tiny_scorer
from tunedock.data.conversation import Conversation, Message
from tunedock.data.sample import Sample, Segment
from tunedock.errors import DataError, ModelError, OutOfMemoryError
from tunedock.model import scorer as scoring
from tunedock.model.scorer import LineScorer, RowScorer, load_scorer


def talk(answer: str, question: str = "How many hours are in two days?") -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)))


TALKS = [talk("There are 48 hours."), talk("I do not know."), talk("No."), talk("Paris.", "What is the capital?")]


@pytest.mark.parametrize("family", SCORED)
def test_a_foreign_reward_model_scores_as_in_plain_transformers(family: str, tmp_path: Path) -> None:
    folder = save_scorer(family, tmp_path / "model")
    scorer = load_scorer(folder)
    assert isinstance(scorer, RowScorer) and scorer.policy.layout == "tree" and scorer.policy.head == "score"
    plain, words = tiny_scorer(family), AutoTokenizer.from_pretrained(folder)
    wanted = []
    for one in TALKS:
        messages = [{"role": message.role, "content": message.content} for message in one.messages]
        ids = words.apply_chat_template(messages, tokenize=True)["input_ids"]
        assert scorer.render(one) == ids
        wanted.append(float(plain_score(plain, ids).detach()))
    tolerance = 1e-5 if scorer.policy.precision.compute == torch.float32 else 0.05
    assert scorer.scores(TALKS) == pytest.approx(wanted, rel=tolerance, abs=tolerance)
    mixed = [scorer.render(TALKS[0]), TALKS[1], scorer.render(TALKS[2])]
    assert scorer.scores(mixed) == pytest.approx(wanted[:3], rel=tolerance, abs=tolerance)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> RowScorer:
    made = load_scorer(save_scorer("qwen3", tmp_path_factory.mktemp("scorer")))
    assert isinstance(made, RowScorer)
    return made


def test_every_leaf_of_a_tree_has_its_score(scorer: RowScorer) -> None:
    """Two completions of a prompt, one of which goes on in two ways; weights do not matter."""
    draw = np.random.default_rng(0)

    def segment(length: int, parent: int) -> Segment:
        return Segment(draw.integers(1, 300, length).astype(np.int32), np.zeros(length, np.float32), parent)

    tree = Sample("t", (segment(40, -1), segment(5, 0), segment(9, 0), segment(3, 2), segment(7, 2)))
    again = Sample("u", (tree.segments[0], segment(4, 0)))
    told: list[int] = []
    got = scorer.sample_scores([tree, again, tree], on_progress=told.append)
    paths = [sample.path(leaf)[0] for sample in (tree, again, tree) for leaf in sample.leaves()]
    assert got == pytest.approx(scorer.scores([path.tolist() for path in paths]), abs=0.02) and len(got) == 7
    assert got[:3] == got[4:] and told == [3]


def test_more_than_are_laid_out_at_once_and_rows_of_any_size(
    scorer: RowScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [[5 + n % 7, *range(10, 20 + n % 5)] for n in range(20)]
    wanted = scorer.scores(paths)
    monkeypatch.setattr(scoring, "TOGETHER", 6)
    assert scorer.scores(paths) == pytest.approx(wanted, abs=0.02)
    monkeypatch.setattr(scorer, "_budget", 16)
    assert scorer.scores(paths) == pytest.approx(wanted, abs=0.02)
    assert scorer.scores([]) == []


def test_rows_become_smaller_when_memory_runs_out(scorer: RowScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [list(range(1, 30)) for _ in range(6)]
    ask, sizes = scorer.policy.scores, []

    def limited(row):  # type: ignore[no-untyped-def]
        sizes.append(row.slots)
        if row.slots > 40:
            raise torch.OutOfMemoryError
        return ask(row)

    monkeypatch.setattr(scorer.policy, "layout", "packed")
    monkeypatch.setattr(scorer.policy, "scores", limited)
    monkeypatch.setattr(scorer, "_budget", 8192)
    assert len(scorer.scores(paths)) == 6 and max(sizes) > 40 >= sizes[-1]
    with pytest.raises(OutOfMemoryError, match="50 tokens does not fit"):
        scorer.scores([list(range(1, 51))])


def test_what_cannot_be_scored(scorer: RowScorer) -> None:
    with pytest.raises(ModelError, match=r"conversation 1: there are 1 token"):
        scorer.scores([[1, 2], [3]])
    with pytest.raises(DataError, match="the last message is not the assistant's"):
        scorer.scores([Conversation((Message("user", "Hi"),))])
    with pytest.raises(RuntimeError, match="log-probabilities of a reward model"):
        scorer.policy.logprobs(scorer.policy.rows([], 1)[0] if scorer.policy.rows([], 1) else None)  # type: ignore[arg-type]


def test_an_answer_of_nothing_is_scored(scorer: RowScorer) -> None:
    (score,) = scorer.scores([talk("")])
    assert abs(score) < 10


def test_an_encoder_is_called_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = tokenizer("qwen3")
    config = BertConfig(
        vocab_size=640, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=1,
        max_position_embeddings=64, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    scorer = load_scorer(tmp_path, token_budget=40)
    assert isinstance(scorer, LineScorer)
    paths = [list(range(1, n)) for n in (9, 30, 4, 22)]
    wanted = [float(plain_score(model, path).detach()) for path in paths]
    assert scorer.scores(paths) == pytest.approx(wanted, abs=0.02)
    with pytest.raises(ModelError, match="has 65 tokens, and the reward model reads 64 at most"):
        scorer.scores([list(range(65))])


def test_what_is_no_reward_model(tmp_path: Path) -> None:
    causal = save_tiny("qwen3", tmp_path / "causal")
    with pytest.raises(ModelError, match="no reward model: its architecture is Qwen3ForCausalLM"):
        load_scorer(causal)
    labelled = save_scorer("qwen3", tmp_path / "labelled")
    config = json.loads((labelled / "config.json").read_text())
    config["id2label"] = {"0": "a", "1": "b", "2": "c"}
    (labelled / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="a classifier with 3 labels; a reward model has one"):
        load_scorer(labelled)
    with pytest.raises(ModelError, match="no such folder"):
        load_scorer(tmp_path / "nowhere")
    flat = save_scorer("qwen3", tmp_path / "flat")
    model = AutoModelForSequenceClassification.from_pretrained(flat)
    torch.nn.init.zeros_(model.score.weight)
    model.save_pretrained(flat)
    with pytest.raises(ModelError, match="gives every token the same score"):
        load_scorer(flat)
