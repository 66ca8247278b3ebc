"""The reference is the policy as it began: after training, in every way it is kept, and after a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from families import tiny_model
from pairs import pairs, path_logprob
from tunedock.data.sample import Sample, Segment
from tunedock.model.adapter import attach
from tunedock.model.policy import Policy, Precision
from tunedock.model.reference import Reference, starts_at_zero
from tunedock.recipe.adapters import Adapter, Freeze, Full, Lora

CPU = torch.device("cpu")
FLOAT32 = Precision(torch.float32, torch.float32)
ADAPTERS = {"lora": Lora(r=4, alpha=8, dropout=0.3), "full": Full(), "freeze": Freeze(last_n_layers=1)}


def policy_of(adapter: Adapter, *, weights: torch.dtype = torch.float32) -> Policy:
    model = attach(tiny_model("qwen3").to(weights), adapter, seed=3).train()
    return Policy(model, CPU, Precision(weights, torch.float32 if weights == torch.float32 else torch.bfloat16))


def train(policy: Policy) -> None:
    torch.manual_seed(9)
    with torch.no_grad():
        for _, parameter in policy.trainable:
            parameter.add_(0.1 * torch.randn_like(parameter))


def trained(policy: Policy) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.trainable}


def by_definition(model: nn.Module, group: Sequence[Sample]) -> Tensor:
    with torch.no_grad():
        return torch.stack([torch.stack([path_logprob(model.eval(), s, leaf) for leaf in (0, 1)]) for s in group])


@pytest.fixture(scope="module")
def group() -> list[Sample]:
    return pairs(5, tiny_model("qwen3").config.vocab_size)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("budget", [30, 4096])
def test_it_is_the_policy_as_it_began(kind: str, budget: int, group: list[Sample]) -> None:
    policy = policy_of(ADAPTERS[kind])
    reference = Reference.of(policy)
    train(policy)
    before, random = trained(policy), torch.get_rng_state()
    got = reference.leaf_logprobs(group, policy.rows(group, budget))
    torch.testing.assert_close(got, by_definition(tiny_model("qwen3"), group), rtol=1e-5, atol=1e-5)
    assert not got.requires_grad
    assert policy.model.training, "the mode is as it was"
    assert torch.equal(random, torch.get_rng_state()), "without dropout it draws nothing"
    assert before.keys() == dict(policy.trainable).keys()
    for name, parameter in policy.trainable:
        assert torch.equal(parameter, before[name]), name
    (logprob_N, _) = policy.logprobs(policy.rows(group[:1], 4096)[0])
    logprob_N.sum().backward()
    assert all(parameter.grad is not None for _, parameter in policy.trainable), "it still trains"


def test_it_has_no_dropout(group: list[Sample]) -> None:
    policy = Policy(tiny_model("qwen3", attention_dropout=0.5).train(), CPU, FLOAT32)
    rows = policy.rows(group, 4096)
    got = Reference.of(policy).leaf_logprobs(group, rows)
    torch.testing.assert_close(got, by_definition(tiny_model("qwen3"), group), rtol=1e-5, atol=1e-5)


def test_what_is_kept_for_it() -> None:
    sizes = {}
    for kind, adapter in ADAPTERS.items():
        policy = policy_of(adapter)
        if kind != "lora":
            train(policy)  # as drawn, norms are ones, which 16 bits hold
        sizes[kind] = Reference.of(policy).kept_bytes
        numbers = sum(parameter.numel() for _, parameter in policy.trainable)
        assert sizes[kind] == (0 if kind == "lora" else 4 * numbers)
    assert sizes["freeze"] < sizes["full"]
    assert 2 * Reference.of(policy_of(Full(), weights=torch.bfloat16)).kept_bytes == sizes["full"]


def test_a_copy_in_the_bases_type_is_exact(group: list[Sample]) -> None:
    """Weights read from a bfloat16 file and trained in float32: half the room, and before the first step no difference at all."""
    policy = policy_of(Full(), weights=torch.bfloat16)
    policy.precision = Precision(torch.float32, torch.bfloat16)  # what a run that trains whole weights has
    reference = Reference.of(policy)
    assert reference.kept_bytes == 2 * sum(parameter.numel() for _, parameter in policy.trainable)
    rows = policy.rows(group, 4096)
    as_it_is = Reference(policy, torch.no_grad)
    assert torch.equal(reference.leaf_logprobs(group, rows), as_it_is.leaf_logprobs(group, rows))


def test_values_a_smaller_type_cannot_hold_are_kept_whole() -> None:
    policy = policy_of(Full(), weights=torch.bfloat16)
    with torch.no_grad():
        policy.trainable[0][1][0, 0] = 1 + 2**-20
    reference = Reference.of(policy)
    wide = sum(p.numel() * (4 if i == 0 else 2) for i, (_, p) in enumerate(policy.trainable))
    assert reference.kept_bytes == wide


def test_an_adapter_that_starts_elsewhere_is_copied(group: list[Sample]) -> None:
    policy = policy_of(Lora(r=4, alpha=8))
    assert starts_at_zero(policy)
    train(policy)
    assert not starts_at_zero(policy)
    reference = Reference.of(policy)
    assert reference.kept_bytes == 4 * sum(parameter.numel() for _, parameter in policy.trainable)
    policy.model.eval()
    expected = by_definition(policy.model, group)
    train(policy)
    got = reference.leaf_logprobs(group, policy.rows(group, 4096))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_trained_values_come_back_when_the_pass_fails(group: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(Full())
    reference = Reference.of(policy)
    train(policy)
    before, rows = trained(policy), policy.rows(group, 64)

    def out_of_memory(row: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(policy, "logprobs", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        reference.leaf_logprobs(group, rows)
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.trainable)
    assert policy.model.training and reference.remembered == 0


class Counted:
    """Counts the rows that go through a policy."""

    def __init__(self, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = 0
        own = policy.logprobs

        def counted(row: object) -> object:
            self.rows += 1
            return own(row)  # type: ignore[arg-type]

        monkeypatch.setattr(policy, "logprobs", counted)


def test_what_was_asked_once_is_remembered(group: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(Lora(r=4, alpha=8))
    reference, counted = Reference.of(policy), Counted(policy, monkeypatch)
    first = reference.leaf_logprobs(group[:3], policy.rows(group[:3], 4096))
    assert (counted.rows, reference.remembered) == (1, 3)
    again = reference.leaf_logprobs(group[2::-1], policy.rows(group[2::-1], 16))
    assert counted.rows == 1
    assert torch.equal(again, first.flip(0))
    rows = policy.rows(group, 1)  # a row for each leaf
    reference.leaf_logprobs(group, rows)
    assert counted.rows == 1 + sum(bool(np.isin(row.chosen.sample_N, [3, 4]).any()) for row in rows) < 1 + len(rows)


def test_memory_has_a_bound(group: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(Lora(r=4, alpha=8))
    reference, counted = Reference.of(policy, limit=2), Counted(policy, monkeypatch)
    rows = policy.rows(group, 4096)
    first = reference.leaf_logprobs(group, rows)
    assert reference.remembered == 2
    assert torch.equal(reference.leaf_logprobs(group, rows), first)
    assert counted.rows == 2


def test_a_sample_is_known_by_its_content_not_by_its_row(group: list[Sample]) -> None:
    policy = policy_of(Lora(r=4, alpha=8))
    reference = Reference.of(policy)
    one = group[0]
    lighter = [Segment(s.tokens_T, s.weights_T * np.float32(0.5), s.parent) for s in one.segments]
    other = Sample(one.row_id, tuple(lighter))
    both = [reference.leaf_logprobs([sample], policy.rows([sample], 4096)) for sample in (one, other)]
    torch.testing.assert_close(both[1], both[0] / 2)


def test_asked_before_and_let_go(group: list[Sample]) -> None:
    policy = policy_of(Full())
    reference = Reference.of(policy, limit=1)
    told: list[int] = []
    reference.precompute(group[:4], lambda part: policy.rows(part, 50), batch=3, on_progress=told.append)
    assert told == [3, 4] and reference.remembered == 4, "what is asked for is remembered, whatever the bound"
    reference.let_go()
    train(policy)
    got = reference.leaf_logprobs(group[:4], [])
    torch.testing.assert_close(got, by_definition(tiny_model("qwen3"), group[:4]), rtol=1e-5, atol=1e-5)
    assert reference.kept_bytes == 0
    with pytest.raises(RuntimeError, match="let go"):
        reference.leaf_logprobs(group, policy.rows(group, 50))


def test_a_checkpoint_keeps_it_to_the_last_bit(group: list[Sample], tmp_path: Path) -> None:
    policy = policy_of(Lora(r=4, alpha=8))
    reference, again = Reference.of(policy), Reference.of(policy)
    expected = reference.leaf_logprobs(group, policy.rows(group, 4096))
    save_file(reference.state(), tmp_path / "r.safetensors")
    again.restore({})
    assert again.remembered == 0
    save_file(again.state(), tmp_path / "empty.safetensors")
    again.restore(load_file(tmp_path / "empty.safetensors"))
    again.restore(load_file(tmp_path / "r.safetensors"))
    assert again.remembered == 5
    assert torch.equal(again.leaf_logprobs(group, []), expected)
