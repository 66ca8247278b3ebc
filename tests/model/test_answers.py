"""Several answers to a prompt: its one pass through the model changes nothing of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from families import MODEL_FAMILIES, tiny_model
from tunedock.model import answers as answers_module
from tunedock.model.answers import Sampler, Sampling
from tunedock.model.policy import Policy, Precision

CPU = torch.device("cpu")
STOPS = (2, 3, 5, 7, 11)


def prompts(vocabulary: int, count: int = 3) -> list[list[int]]:
    draw = np.random.default_rng(1)
    return [draw.integers(20, vocabulary, int(draw.integers(2, 30))).tolist() for _ in range(count)]


def policy_of(family: str = "qwen3") -> Policy:
    policy = Policy(tiny_model(family).eval(), CPU, Precision(torch.float32, torch.float32))
    policy.probe()
    return policy


def sampler(policy: Policy, **settings: Any) -> Sampler:
    return Sampler(policy, stop_ids=STOPS, pad_id=0, **settings)


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_shared_prompts_give_what_each_alone_gives(family: str) -> None:
    """Greedy, for every family: windows, soft caps, caches of several kinds."""
    policy = policy_of(family)
    asked = prompts(policy.config.get_text_config().vocab_size)
    greedy = Sampling(12, temperature=0.0)
    shared = sampler(policy)(asked, 3, greedy, seed=0)
    assert shared == sampler(policy, share=False)(asked, 3, greedy, seed=0)
    for prompt, group in zip(asked, shared, strict=True):
        (alone,) = sampler(policy)([prompt], 1, greedy, seed=0)[0]
        assert all(answer == alone for answer in group)


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    policy = policy_of()
    asked = prompts(policy.config.vocab_size)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = sampler(policy)(asked, 4, Sampling(8), seed=7)
    assert torch.equal(before, torch.get_rng_state()), "nothing else that is drawn changes"
    torch.manual_seed(2)
    assert sampler(policy)(asked, 4, Sampling(8), seed=7) == one
    assert sampler(policy)(asked, 4, Sampling(8), seed=8) != one
    assert len({answer.ids for group in one for answer in group}) > 4, "answers to one prompt differ"


def test_an_answer_ends_with_its_stop_token_or_is_cut_off() -> None:
    policy = policy_of()
    asked = prompts(policy.config.vocab_size, 6)
    made = [answer for group in sampler(policy)(asked, 16, Sampling(40), seed=1) for answer in group]
    assert any(answer.stopped for answer in made) and any(not answer.stopped for answer in made)
    for answer in made:
        assert 1 <= len(answer.ids) <= 40
        assert (answer.ids[-1] in STOPS) == answer.stopped
        assert not set(answer.ids[:-1]) & set(STOPS)
        assert answer.stopped or len(answer.ids) == 40


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_what_is_drawn_does_not_depend_on_how_many_at_once(batch_size: int) -> None:
    policy = policy_of()
    asked = prompts(policy.config.vocab_size, 5)
    sampled = Sampling(8, temperature=0.9, top_k=40, top_p=0.95)
    assert sampler(policy, batch_size=batch_size)(asked, 3, sampled, seed=4) == sampler(policy)(
        asked, 3, sampled, seed=4
    )


def test_numbered_prompts_get_what_they_get_among_all() -> None:
    """As one of several processes does that share the prompts."""
    policy = policy_of()
    asked = prompts(policy.config.vocab_size, 5)
    whole = sampler(policy)(asked, 2, Sampling(8), seed=4)
    assert sampler(policy)([asked[1], asked[3]], 2, Sampling(8), seed=4, numbers=[1, 3]) == [whole[1], whole[3]]


def test_tokens_are_drawn_by_their_probabilities() -> None:
    """Of 4,000 draws of one token, each token's share is its probability; the bound is five standard deviations."""
    policy = policy_of()
    prompt = prompts(policy.config.vocab_size, 1)[0]
    with torch.no_grad(), policy.plain():
        logits_V = policy.model(torch.tensor([prompt])).logits[0, -1].double()
    for sampling in (Sampling(1), Sampling(1, temperature=0.25, top_k=12), Sampling(1, temperature=0.25, top_p=0.5)):
        scaled_V = logits_V / sampling.temperature
        kept_V = torch.ones_like(scaled_V, dtype=torch.bool)
        order = scaled_V.argsort(descending=True)
        if sampling.top_k:
            kept_V[order[sampling.top_k :]] = False
        shares = torch.softmax(scaled_V, 0)[order].cumsum(0)
        kept_V[order[1:][shares[:-1] >= sampling.top_p]] = False
        wanted_V = torch.softmax(scaled_V.masked_fill(~kept_V, -torch.inf), 0)
        made = sampler(policy, batch_size=4000)([prompt], 4000, sampling, seed=3)[0]
        seen_V = torch.bincount(torch.tensor([one.ids[0] for one in made]), minlength=len(logits_V)).double() / 4000
        bound_V = 5 * (wanted_V * (1 - wanted_V) / 4000).sqrt() + 1e-4
        assert not seen_V[~kept_V].any()
        assert bool(((seen_V - wanted_V).abs() <= bound_V).all())


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 64])
def test_however_many_at_once(batch_size: int) -> None:
    policy = policy_of()
    asked = prompts(policy.config.vocab_size, 5)
    heard: list[int] = []
    greedy = Sampling(6, temperature=0.0)
    made = sampler(policy, batch_size=batch_size)(asked, 3, greedy, seed=0, between=heard.append)
    assert made == sampler(policy)(asked, 3, greedy, seed=0)
    assert heard[0] == 0 and heard[-1] == 15 and heard == sorted(heard)


def test_a_batch_without_room_is_done_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    asked = prompts(policy.config.vocab_size, 2)
    greedy = Sampling(6, temperature=0.0)
    wanted = sampler(policy)(asked, 3, greedy, seed=0)
    lines, sizes = Sampler._lines, []

    def short(self: Sampler, group: Any, counts: Any, sampling: Sampling, draws: Any) -> Any:
        sizes.append(sum(counts))
        if sum(counts) > 2:
            raise torch.OutOfMemoryError("no room")
        return lines(self, group, counts, sampling, draws)

    monkeypatch.setattr(answers_module.Sampler, "_lines", short)
    assert sampler(policy)(asked, 3, greedy, seed=0) == wanted
    assert max(sizes) == 6 and sizes.count(1) == 2
    monkeypatch.setattr(
        answers_module.Sampler, "_lines", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        sampler(policy)(asked, 3, greedy, seed=0)


def test_a_cache_that_cannot_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    asked = prompts(policy.config.vocab_size)
    greedy = Sampling(6, temperature=0.0)
    wanted = sampler(policy)(asked, 2, greedy, seed=0)

    def refuses(self: Any, repeats: int) -> None:
        raise NotImplementedError

    monkeypatch.setattr(answers_module.DynamicCache, "batch_repeat_interleave", refuses)
    plain = sampler(policy)
    assert plain(asked, 2, greedy, seed=0) == wanted
    assert not plain.shares
