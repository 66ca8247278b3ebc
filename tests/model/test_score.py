"""Where a reward model's score is read, its padding, and what it is made from."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, ModernBertDecoderConfig

from families import tiny_model, tokenizer
from pairs import pairs
from scored import plain_score, tiny_scorer
from tunedock.data.sample import Sample, Segment
from tunedock.errors import ModelError
from tunedock.model.policy import Policy, Precision
from tunedock.model.score import begin_score, require_score_layer, score_layer, set_padding, share_padding

CPU = torch.device("cpu")


def test_a_row_without_places_still_takes_part() -> None:
    """As on a rank that has no row left: the gradients are zero, and none is missing."""
    from tunedock.data.layout import empty_row

    model = tiny_scorer("qwen3").train()
    policy = Policy(model, CPU, Precision(torch.float32, torch.float32))
    score_N, _ = policy.scores(empty_row())
    assert score_N.shape == (0,)
    score_N.sum().backward()
    assert model.score.weight.grad is not None and not model.score.weight.grad.any()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_scores_are_float32_whatever_is_computed_in(compute: torch.dtype) -> None:
    model = tiny_scorer("qwen3")
    policy = Policy(model, CPU, Precision(torch.float32, compute))
    assert policy.probe() == []
    group = [sample.weighed_at_ends() for sample in pairs(3, model.config.vocab_size)]
    with torch.no_grad():
        (row,) = policy.rows(group, 4096)
        score_N, tensors = policy.scores(row)
        assert score_N.dtype == torch.float32 and len(score_N) == 6
        wanted = [
            float(plain_score(tiny_scorer("qwen3"), group[int(s)].path(group[int(s)].leaves()[int(leaf)])[0]))
            for s, leaf in zip(tensors.sample_N, tensors.leaf_N, strict=True)
        ]
    assert score_N.tolist() == pytest.approx(wanted, abs=1e-5 if compute == torch.float32 else 0.1)


def test_the_end_of_a_leaf_passes_padding_over() -> None:
    def segment(tokens: list[int], parent: int) -> Segment:
        return Segment(np.asarray(tokens, np.int32), np.ones(len(tokens), np.float32), parent)

    sample = Sample("a", (segment([1, 2], -1), segment([3, 0, 0], 0), segment([0, 0], 0)), margin=0.5)
    weights = lambda made: [one.weights_T.tolist() for one in made.segments]  # noqa: E731
    assert weights(sample.weighed_at_ends()) == [[0, 0], [0, 0, 1], [0, 1]]
    assert weights(sample.weighed_at_ends(pad_id=0)) == [[0, 0], [1, 0, 0], [0, 1]]
    assert sample.weighed_at_ends().margin == 0.5 and replace(sample, margin=1.0).margin == 1.0


@pytest.mark.parametrize(
    ("family", "end", "kept"),
    [("qwen3", "<|im_end|>", "<|endoftext|>"), ("qwen3", "<|endoftext|>", None), ("mistral", "</s>", "<unk>")],
)
def test_padding_never_ends_a_conversation(family: str, end: str, kept: str | None) -> None:
    words = deepcopy(tokenizer(family))
    set_padding(words, words.convert_tokens_to_ids(end))
    assert words.pad_token == kept
    model = tiny_scorer(family)
    share_padding(model, words)
    assert model.config.pad_token_id == words.pad_token_id


def test_what_has_no_score_layer() -> None:
    assert score_layer(tiny_model("qwen3")) is None
    config = ModernBertDecoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1,
        pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config)
    for ask in (require_score_layer, lambda m: begin_score(m, seed=0, made_up=True)):
        with pytest.raises(ModelError, match="ModernBertDecoderForSequenceClassification has no layer `score`"):
            ask(model)
