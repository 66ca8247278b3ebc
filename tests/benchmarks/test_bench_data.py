"""The rows have the shares they are said to have, and every side gets the same ones."""

import json

import numpy as np
import pytest

from benchmarks import data, models
from benchmarks.words import LEXICON, Words
from tunedock.data.layout import epoch_order


@pytest.fixture(scope="module")
def tokenizer():
    return models.train_tokenizer()


def test_words_are_the_same_each_time_and_short_ones_are_frequent():
    assert Words(3).text(50) == Words(3).text(50) != Words(4).text(50)
    words = Words(3)
    assert len(set(words.lexicon)) == LEXICON
    drawn = words.draw(5000)
    assert np.mean([len(word) for word in drawn]) < np.mean([len(word) for word in words.lexicon])


def test_sft_rows_have_the_lengths_the_padding_and_the_trained_share(tokenizer):
    facts = data.count("sft", data.make("sft", 800, tokenizer), tokenizer)
    lengths = [length for row in facts.lengths for length in row]
    assert max(lengths) <= data.MAX_LENGTH
    assert data.padding_share(lengths, 4) == pytest.approx(0.38, abs=0.03)
    assert sum(facts.trained) / sum(facts.tokens) == pytest.approx(0.295, abs=0.015)


def test_pairs_have_prompts_longer_than_their_answers(tokenizer):
    facts = data.count("dpo", data.make("dpo", 300, tokenizer), tokenizer)
    answers = np.asarray(facts.trained) / 2
    prompts = np.asarray([first for first, _ in facts.lengths]) - answers
    assert prompts.mean() == pytest.approx(305, rel=0.08)
    assert answers.mean() == pytest.approx(60, rel=0.08)
    assert max(length for row in facts.lengths for length in row) <= data.MAX_LENGTH


def test_padding_share_is_what_a_batch_leaves_empty():
    assert data.padding_share([2, 4, 4, 4], 2) == pytest.approx(2 / 16)
    assert data.padding_share([5, 5], 2) == 0.0


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_every_file_holds_the_same_rows_and_peers_get_them_in_our_order(tokenizer, tmp_path, monkeypatch, objective):
    monkeypatch.setattr(data, "MADE", tmp_path)
    folder = data.ensure(objective, 12, tokenizer, seed=42)

    def rows(name):
        return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]

    ours, ordered = rows("tunedock.jsonl"), rows("ordered.jsonl")
    assert ordered == [ours[i] for i in epoch_order(12, seed=42, epoch=0)]
    assert ordered != ours
    for row, completion, shared in zip(ordered, rows("completions.jsonl"), rows("sharegpt.jsonl"), strict=True):
        prompt = (row.get("messages") or row["prompt"])[0]["content"]
        assert completion["prompt"][0]["content"] == shared["conversations"][0]["value"] == prompt
        if objective == "dpo":
            assert shared["rejected"]["value"] == row["rejected"][0]["content"] == completion["rejected"][0]["content"]
        else:
            assert shared["conversations"][1]["value"] == row["messages"][1]["content"]
    facts = data.read_facts(folder)
    assert len(facts.tokens) == 12 and facts.tokens == [sum(row) for row in facts.lengths]
    assert data.ensure(objective, 12, tokenizer, seed=42) == folder


def test_the_template_renders_what_is_counted(tokenizer):
    transformers = pytest.importorskip("transformers")
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=models.END)
    wrapped.chat_template = models.CHAT_TEMPLATE
    chat = [{"role": "user", "content": "he bam"}, {"role": "assistant", "content": "lor"}]
    assert wrapped.apply_chat_template(chat, tokenize=False) == data.render("he bam", "lor")
    prompt = wrapped.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert data.render("he bam", "lor").startswith(prompt)
