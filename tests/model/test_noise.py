"""NEFTune's noise: scaled by each sample's own length in every layout, absent outside training, drawn again exactly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import tiny_model
from pairs import pairs
from tiny_loop import CPU, build, losses, weights
from tunedock.data.layout import Kind, lay_out
from tunedock.data.sample import Sample, single
from tunedock.errors import InterruptedRun
from tunedock.model.noise import EmbeddingNoise, path_lengths_BT
from tunedock.model.policy import Policy, Precision
from tunedock.model.reference import Reference
from tunedock.train.checkpoint import Checkpoints

KINDS: tuple[Kind, ...] = ("tree", "packed", "padded")
ALPHA = 5.0


def noisy(kind: Kind = "tree") -> tuple[Policy, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A policy in training mode, and (embedding without noise, what the layers got) of each call."""
    model = tiny_model("qwen3")
    policy = Policy(model, CPU, Precision(torch.float32, torch.float32))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain: list[torch.Tensor] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda m, a, out: plain.append(out.detach().clone()))
    policy.noise = EmbeddingNoise(model, ALPHA)
    embedding.register_forward_hook(lambda m, a, out: seen.append((plain[-1], out.detach().clone())))
    policy.probe(layouts=[kind])
    seen.clear()
    model.train()
    return policy, seen


def singles(lengths: list[int]) -> list[Sample]:
    draw = np.random.default_rng(3)
    return [single(f"s:{i}", draw.integers(1, 90, n), np.ones(n, np.float32)) for i, n in enumerate(lengths)]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), kind=st.sampled_from(KINDS), budget=st.integers(8, 300))
def test_lengths_are_those_of_the_paths(seed: int, kind: Kind, budget: int) -> None:
    samples = pairs(6, 90, seed)
    seen = 0
    for row in lay_out(samples, kind, budget_tokens=budget):
        lengths_BT = path_lengths_BT(row)
        assert ((lengths_BT > 0) == row.mask_BT).all()
        for at in range(len(row.chosen)):
            sample = samples[int(row.chosen.sample_N[at])]
            paths = [len(sample.path(leaf)[0]) for leaf in sample.leaves()]
            found = int(lengths_BT[row.chosen.line_N[at], row.chosen.own_N[at]])
            assert found == paths[int(row.chosen.leaf_N[at])], "a completion has one path"
            seen += 1
    assert seen


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_of_a_token_is_by_its_sample_s_length(kind: Kind) -> None:
    policy, seen = noisy(kind)
    samples = singles([4, 9, 25, 64])
    width = policy.config.get_text_config().hidden_size
    drawn: dict[int, list[float]] = {}
    for _ in range(12):
        for row in policy.rows(samples, 4096):
            policy.logprobs(row)
            plain, given_ = seen.pop()
            lengths_BT = path_lengths_BT(row)
            noise = (given_ - plain)[:, : lengths_BT.shape[1]]
            for length in np.unique(lengths_BT):
                part = noise[torch.from_numpy(lengths_BT == length)]
                if length == 0:
                    assert not part.any(), "padding stays as it is"
                else:
                    drawn.setdefault(int(length), []).extend(part.flatten().tolist())
    assert sorted(drawn) == [4, 9, 25, 64]
    for length, values in drawn.items():
        bound = ALPHA / math.sqrt(length * width)
        scaled = np.asarray(values) / bound
        assert np.abs(scaled).max() <= 1 + 1e-4, "never above alpha / sqrt(L d)"
        assert np.abs(scaled).max() > 0.99
        assert abs(scaled.mean()) < 0.03 and scaled.var() == pytest.approx(1 / 3, rel=0.05), "uniform"


def test_a_shared_prefix_draws_once_by_its_longest_path() -> None:
    samples = pairs(1, 90, seed=1)
    (row,) = lay_out(samples, "tree", budget_tokens=4096)
    prompt = len(samples[0].segments[0].tokens_T)
    longest = max(len(samples[0].path(leaf)[0]) for leaf in samples[0].leaves())
    assert set(path_lengths_BT(row)[0, :prompt]) == {longest}


def test_outside_training_there_is_none() -> None:
    policy, _ = noisy()
    samples = singles([6, 12])
    (row,) = policy.rows(samples, 4096)
    first, again = policy.logprobs(row)[0], policy.logprobs(row)[0]
    assert not torch.equal(first, again)
    policy.model.eval()
    quiet = policy.logprobs(row)[0]
    assert torch.equal(quiet, policy.logprobs(row)[0])
    policy.noise = None
    assert torch.equal(quiet, policy.logprobs(row)[0])


def test_the_reference_hears_nothing_of_it() -> None:
    policy, _ = noisy()
    samples = pairs(2, 90)
    rows = policy.rows(samples, 4096)
    said = Reference.of(policy).leaf_logprobs(samples, rows)
    assert policy.model.training
    assert torch.equal(said, Reference.of(policy).leaf_logprobs(samples, rows))


def test_generation_calls_are_not_touched() -> None:
    """What calls the model without a row (a rollout) gets its embedding as it is, even in training mode."""
    policy, seen = noisy()
    with policy.plain(), torch.no_grad():
        policy.model(input_ids=torch.tensor([[1, 2, 3]]))
    assert torch.equal(*seen[-1])


def test_resuming_draws_the_same(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"neftune_noise_alpha": 5.0, "budget": 60, "steps": 7}
    straight, policy, stream = build(tmp_path / "a", **recipe)
    straight.run()
    asked = iter([False] * 9 + [True] * 100)
    stopped, _, _ = build(tmp_path / "b", stop=lambda: next(asked), **recipe)
    with pytest.raises(InterruptedRun):
        stopped.run()
    resumed, again, _ = build(tmp_path / "b", **recipe)
    resumed.state.restore(Checkpoints(tmp_path / "b", keep=None).load_last(pytest.fail))
    assert 0 < resumed.progress.step < 7
    resumed.run()
    for name, tensor in weights(policy).items():
        assert torch.equal(tensor, weights(again)[name]), name
    quiet, _, stream_quiet = build(tmp_path / "c", **{**recipe, "neftune_noise_alpha": None})
    quiet.run()
    assert losses(stream) != losses(stream_quiet)
