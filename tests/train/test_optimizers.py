"""Every optimizer that can be had here: its step is its package's own, its states survive a checkpoint, its plan is right."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from families import tiny_model
from tiny_loop import build, data, losses, weights
from tunedock.errors import DependencyError, RecipeError
from tunedock.model.adapter import attach
from tunedock.plan.optimizer_memory import HIDDEN, optimizer_bytes, optimizer_state_bytes
from tunedock.recipe.adapters import Freeze, Full
from tunedock.recipe.optimizers import known, table
from tunedock.recipe.schema import Train
from tunedock.train import optimizer_names, parameter_kinds
from tunedock.train.checkpoint import Checkpoints
from tunedock.train.muon import MuonWithAdamW
from tunedock.train.optimizer_names import make_optimizer
from tunedock.train.parameter_kinds import hidden_matrices, targeted_matrices

LOW_RANK = "rank=4,update_proj_gap=3"
ARGUMENTS = {name: LOW_RANK for name, facts in table().items() if facts.low_rank}


def needs(name: str) -> None:
    facts = table()[name]
    if name.startswith("paged_ademamix") and not torch.cuda.is_available():
        pytest.skip("bitsandbytes pages AdEMAMix on CUDA only")
    if facts.module is not None and find_spec(facts.module) is None:
        pytest.skip(f"{facts.package} is not installed")


class Little(nn.Module):
    """Parameters of every kind, named as a decoder's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(16, 72)
        self.mlp = nn.Linear(72, 96)
        self.attn = nn.Linear(96, 72)
        self.norm = nn.LayerNorm(72)
        self.lm_head = nn.Linear(72, 16, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(self.attn(torch.tanh(self.mlp(self.embed_tokens(ids))))))


def stepped(model: Little, optimizer: torch.optim.Optimizer, steps: int = 8) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(steps):
        ids = torch.randint(0, 16, (4, 6), generator=draw)
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trainers_own(model: Little, train: Train) -> torch.optim.Optimizer:
    """What transformers' Trainer makes of the name; GaLore and APOLLO without weight decay, which it does not give them."""
    low_rank = table()[train.optim].low_rank is not None
    arguments = TrainingArguments(
        output_dir="unused", optim=train.optim, optim_args=train.optim_args, learning_rate=train.learning_rate,
        weight_decay=train.weight_decay, adam_beta1=train.adam_beta1, adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon, report_to=[], use_cpu=True,
        optim_target_modules=["attn", "mlp"] if low_rank else None,
    )  # fmt: skip
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if "params" in keywords:
        return kind(**keywords)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return kind(groups, **keywords)


@pytest.mark.parametrize("optim", [name for name in known() if name != "muon"])
def test_a_name_trains_as_in_transformers(optim: str) -> None:
    needs(optim)
    low_rank = table()[optim].low_rank is not None
    settings: dict[str, Any] = {"optim": optim, "learning_rate": 1e-2, "optim_args": ARGUMENTS.get(optim)}
    if low_rank:
        settings["adam_epsilon"] = 1e-6  # the Trainer leaves GaLore its own epsilon
    else:
        settings["weight_decay"] = 0.1
    if table()[optim].adam and not low_rank:
        settings |= {"adam_beta1": 0.8, "adam_beta2": 0.95}
    train = Train(**settings)
    ours, theirs = Little(), Little()
    got = stepped(ours, make_optimizer(list(ours.named_parameters()), train, model=ours))
    wanted = stepped(theirs, trainers_own(theirs, train))
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(got["mlp.weight"], Little().mlp.weight)


@pytest.mark.parametrize("optim", known())
def test_resuming_is_bit_identical(tmp_path: Path, optim: str) -> None:
    """Over a checkpoint on disk, with a validation between checkpoint and end, whose weights are others where they are averaged."""
    needs(optim)
    settings: dict[str, Any] = {
        "optim": optim, "adapter": Full(), "steps": 6, "save_steps": 3, "learning_rate": 1e-3,
        "optim_args": ARGUMENTS.get(optim), "validation": data(9)[:4], "eval_strategy": "steps", "eval_steps": 2,
        "lr_scheduler_type": "constant" if optim.startswith("schedule_free") else "cosine",
    }  # fmt: skip
    straight, policy, stream = build(tmp_path / "a", **settings)
    straight.run()
    shutil.copytree(tmp_path / "a" / "step-00000003", tmp_path / "b" / "step-00000003")
    resumed, again, stream_again = build(tmp_path / "b", **settings)
    resumed.state.restore(Checkpoints(tmp_path / "b", keep=None).load_last(pytest.fail))
    assert resumed.progress.step == 3
    resumed.run()
    for name, tensor in weights(policy).items():
        assert torch.equal(tensor, weights(again)[name]), name
    assert losses(stream)[3:] == losses(stream_again)
    assert losses(stream, "eval_loss")[1:] == losses(stream_again, "eval_loss")


@pytest.mark.parametrize("optim", [name for name in known() if name not in ARGUMENTS])
def test_states_are_as_large_as_planned(optim: str) -> None:
    needs(optim)
    weight = nn.Parameter(torch.zeros(512, 512))
    optimizer = make_optimizer([("mlp.weight", weight)], Train(optim=optim, learning_rate=1e-3))
    weight.grad = torch.ones_like(weight)
    if hasattr(optimizer, "train"):
        optimizer.train()
    optimizer.step()
    held = bytes_of(optimizer.state)
    planned = optimizer_state_bytes(optim, None, weight.numel(), [("mlp.weight", 512, 512)])
    if "adafactor" in optim:
        assert held <= planned
    else:  # a table of 256 digits and a scale for each 256 numbers are not counted
        assert held == pytest.approx(planned, rel=0.04, abs=64)


@pytest.mark.parametrize("optim", sorted(ARGUMENTS))
@pytest.mark.parametrize("shape", [(512, 128), (128, 512)])
def test_low_rank_states_are_as_large_as_planned(optim: str, shape: tuple[int, int]) -> None:
    needs(optim)
    weight = nn.Parameter(torch.randn(*shape))
    train = Train(optim=optim, learning_rate=1e-3, optim_args="rank=16")
    optimizer = make_optimizer([("mlp.weight", weight)], train)
    weight.grad = torch.randn(*shape)
    optimizer.step()
    planned = optimizer_state_bytes(optim, "rank=16", weight.numel(), [("mlp.weight", *shape)])
    assert bytes_of(optimizer.state) == pytest.approx(planned, rel=0.05, abs=64)


def test_sgd_with_momentum_keeps_one_number() -> None:
    assert (optimizer_bytes("sgd"), optimizer_bytes("sgd", "momentum=0.9")) == (0, 4)
    assert optimizer_bytes("brand_new") == 8


def bytes_of(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(bytes_of(child) for child in value.values())
    return sum(bytes_of(child) for child in vars(value).values()) if hasattr(value, "ortho_matrix") else 0


# -- Muon ------------------------------------------------------------------------------------------------------------------


def muon_reference(
    weight: torch.Tensor, grads: Sequence[torch.Tensor], *, lr: float, decay: float, momentum: float = 0.95
) -> torch.Tensor:
    """Jordan et al. 2024 with Nesterov momentum and the scale of Liu et al. 2025 (arXiv 2502.16982, eq. 4), in float64."""
    w, average = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for grad in grads:
        g = grad.double()
        average = momentum * average + (1 - momentum) * g
        x = (1 - momentum) * g + momentum * average
        tall = x.shape[0] > x.shape[1]
        x = (x.T if tall else x) / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        w = w * (1 - lr * decay) - lr * 0.2 * max(weight.shape) ** 0.5 * (x.T if tall else x)
    return w


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (64, 64)])
def test_muon_is_its_definition(shape: tuple[int, int]) -> None:
    """PyTorch's rounds the five products to bfloat16; what is left of them after three steps is far below a step."""
    draw = torch.Generator().manual_seed(4)
    start = torch.randn(*shape, generator=draw)
    grads = [torch.randn(*shape, generator=draw) for _ in range(3)]
    weight = nn.Parameter(start.clone())
    train = Train(optim="muon", learning_rate=2e-2, weight_decay=0.1)
    optimizer = make_optimizer([("mlp.weight", weight)], train)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    wanted = muon_reference(start, grads, lr=2e-2, decay=0.1)
    moved = (wanted - start.double()).norm()
    assert (weight.detach().double() - wanted).norm() < 0.02 * moved


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    model = Little()
    named = list(model.named_parameters())
    assert hidden_matrices(named, model) == ["mlp.weight", "attn.weight"]
    train = Train(optim="muon", learning_rate=1e-2, weight_decay=0.1)
    optimizer = make_optimizer(named, train, model=model)
    got = stepped(model, optimizer)
    held = {len(optimizer.state[p]) for p in (model.mlp.weight, model.attn.weight)}
    assert held == {1}
    alone = Little()
    others = [(name, p) for name, p in alone.named_parameters() if name not in ("mlp.weight", "attn.weight")]
    stepped_alone = make_optimizer(others, Train(optim="adamw_torch", learning_rate=1e-2, weight_decay=0.1))
    ids = torch.randint(0, 16, (4, 6), generator=torch.Generator().manual_seed(1))
    nn.functional.cross_entropy(alone(ids).flatten(0, 1), ids.flatten()).backward()
    stepped_alone.step()
    once = Little()
    one = make_optimizer(list(once.named_parameters()), train, model=once)
    after = stepped(once, one, steps=1)
    for name, p in others:
        torch.testing.assert_close(after[name], p.detach(), rtol=1e-6, atol=1e-7)
    assert not torch.equal(after["mlp.weight"], got["mlp.weight"])


def test_a_schedule_moves_both_halves_of_muon() -> None:
    model = Little()
    optimizer = make_optimizer(list(model.named_parameters()), Train(optim="muon", learning_rate=1.0), model=model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert isinstance(optimizer, MuonWithAdamW)
    assert {group["lr"] for half in optimizer.halves for group in half.param_groups} == {0.5}
    optimizer.load_state_dict(optimizer.state_dict())
    stepped(model, optimizer, steps=1)
    schedule.base_lrs = [0.25] * len(schedule.base_lrs)
    schedule.step()
    assert {group["lr"] for half in optimizer.halves for group in half.param_groups} == {0.125}


def test_matrices_of_a_real_model() -> None:
    whole = tiny_model("qwen3")
    named = list(whole.named_parameters())
    hidden = hidden_matrices(named, whole)
    assert all(".self_attn." in name or ".mlp." in name for name in hidden)
    assert not [name for name in hidden if "embed_tokens" in name or "lm_head" in name or "norm" in name]
    assert targeted_matrices(named, whole, None) == hidden == targeted_matrices(named, whole, "all-linear")
    assert all("q_proj" in name for name in targeted_matrices(named, whole, ["q_proj"]))
    assert targeted_matrices(named, whole, r".*layers\.0\.mlp\..*") == [n for n in hidden if "layers.0.mlp" in n]
    assert parameter_kinds.HIDDEN.pattern == HIDDEN.pattern
    adapted = attach(tiny_model("qwen3"), Freeze(last_n_layers=1), seed=1)
    trained = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad]
    assert len(hidden_matrices(trained, adapted)) == 7


# -- schedule-free ---------------------------------------------------------------------------------------------------------


def test_schedule_free_is_validated_and_kept_with_its_average(tmp_path: Path) -> None:
    needs("schedule_free_adamw")
    held_out = data(9)[:6]
    settings: dict[str, Any] = {
        "optim": "schedule_free_adamw", "adapter": Full(), "learning_rate": 3e-3, "lr_scheduler_type": "constant",
        "validation": held_out, "eval_strategy": "steps", "eval_steps": 8, "save_steps": 4, "steps": 8, "warmup_steps": 2,
    }  # fmt: skip
    loop, policy, stream = build(tmp_path, **settings)
    loop.run()
    kept = weights(policy)
    training = Checkpoints(tmp_path, keep=None).load("step-00000008").trained
    assert any(not torch.equal(kept[name], training[name]) for name in kept), "the result is the average"
    said = losses(stream, "eval_loss")[-1]
    loop._evaluate()
    assert losses(stream, "eval_loss")[-1] == pytest.approx(said, rel=1e-5)
    loop.state.take_weights(Checkpoints(tmp_path, keep=None).load("step-00000008"))
    for name, tensor in kept.items():
        torch.testing.assert_close(weights(policy)[name], tensor, rtol=1e-5, atol=1e-7)
    rates = losses(stream, "learning_rate")
    assert rates[0] == pytest.approx(1.5e-3) and rates[-1] == pytest.approx(3e-3), "the warm-up is the optimizer's"


# -- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optim": "lomo"}, "inside the backward pass"),
        ({"optim": "grokadamw"}, "would not be the same run"),
        ({"optim": "adamw_troch"}, "did you mean `adamw_torch`"),
        ({"optim": "muon", "optim_args": "ns_step=3"}, "has no argument `ns_step`"),
        ({"optim": "muon", "optim_args": "ns_steps=three"}, "no whole number"),
        ({"optim": "muon", "optim_args": "nesterov=maybe"}, "neither true nor false"),
        ({"optim": "muon", "optim_args": "adjust_lr_fn=mine"}, "not supported"),
        ({"optim": "adamw_8bit", "optim_args": "rank=3"}, "does not use them"),
    ],
)  # fmt: skip
def test_refused_with_a_reason(settings: dict[str, Any], said: str) -> None:
    model = Little()
    with pytest.raises(RecipeError, match=said):
        make_optimizer(list(model.named_parameters()), Train(learning_rate=1e-3, **settings), model=model)


def test_targets_that_match_nothing() -> None:
    needs("galore_adamw")
    model = Little()
    train = Train(learning_rate=1e-3, optim="galore_adamw", optim_target_modules=["q_proj"])
    with pytest.raises(RecipeError, match="no trained matrix has such a name"):
        make_optimizer(list(model.named_parameters()), train, model=model)


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_names, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="schedulefree") as caught:
        make_optimizer([], Train(learning_rate=1e-3, optim="schedule_free_adamw"))
    assert "pip install schedulefree" in str(caught.value)
    with pytest.raises(DependencyError) as caught:
        make_optimizer([], Train(learning_rate=1e-3, optim="adamw_8bit"))
    assert "tunedock[quantize]" in str(caught.value)


def test_paged_ademamix_needs_a_card() -> None:
    """bitsandbytes falls back to plain states on a CPU for the others; for this one it fails at the first large matrix."""
    with pytest.raises(DependencyError, match="on CUDA only"):
        make_optimizer(list(Little().named_parameters()), Train(learning_rate=1e-3, optim="paged_ademamix_8bit"))


def test_every_name_of_transformers_is_in_the_table() -> None:
    from transformers.training_args import OptimizerNames

    assert {name.value for name in OptimizerNames} | {"muon"} == set(table())
    assert all(facts.instead in known() for facts in table().values() if facts.refused)
