"""Every kind of LoRA: PEFT's own forward and gradients through the engine, what is saved, what a run begins with again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from families import small_config, tiny_model
from pairs import pairs, path_logprob
from tunedock.data.layout import Kind
from tunedock.errors import ModelError
from tunedock.model.adapter import attach, load_adapter, load_trainable_state, save, trainable_state
from tunedock.model.policy import Policy, Precision
from tunedock.model.reference import Reference, starts_at_zero
from tunedock.model.saved_lora import go_on_with
from tunedock.recipe.adapters import Lora

CPU = torch.device("cpu")
FLOAT32 = Precision(torch.float32, torch.float32)
IDS = torch.arange(1, 40)[None]

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-quick": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "pissa-dora": {"init_lora_weights": "pissa", "use_dora": True},
    "norms": {"modules_to_save": ["norm"]},
    "head": {"modules_to_save": ["lm_head"]},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*k_proj": 6},
        "alpha_pattern": {"v_proj": 3.0},
        "exclude_modules": ["down_proj"],
    },
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
}
STARTS_ELSEWHERE = {"pissa", "pissa-quick", "olora", "pissa-dora"}
TIED = [True, False]
LAYOUTS = ["tree", "packed", "padded"]
LONG = pytest.mark.long


OFTEN = {"dora", "pissa", "head", "patterns"}
"""The kinds that say most; the others take their time."""


def each(others: Sequence[Any], often: set[str]) -> list[Any]:
    """Every kind with all of `others`; quick is only the first of these, all of them for kinds that `often` names."""
    return [
        pytest.param(kind, other, marks=() if kind in OFTEN and (other == others[0] or kind in often) else LONG)
        for kind in KINDS
        for other in others
    ]


def lora(kind: str, **more: Any) -> Lora:
    return Lora(r=4, alpha=8, **{**KINDS[kind], **more})


def made(kind: str, tied: bool = True, began: dict[str, Tensor] | None = None) -> nn.Module:
    return attach(tiny_model("qwen3", tie_word_embeddings=tied), lora(kind), seed=3, began=began)


def by_peft(kind: str, tied: bool) -> nn.Module:
    """As a user of PEFT has it, without a line of ours."""
    torch.manual_seed(3)
    given = KINDS[kind]
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **given},
        ensure_weight_tying=tied and "lm_head" in given.get("modules_to_save", []),
    )
    return get_peft_model(tiny_model("qwen3", tie_word_embeddings=tied), config)


def moved(model: nn.Module) -> nn.Module:
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS).logits


def away(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max())


@pytest.mark.parametrize(("kind", "tied"), each(TIED, {"head"}))
def test_it_starts_and_trains_as_peft_has_it(kind: str, tied: bool) -> None:
    ours, theirs = made(kind, tied), by_peft(kind, tied)
    assert {n: p.shape for n, p in ours.named_parameters() if p.requires_grad} == {
        n: p.shape for n, p in theirs.named_parameters() if p.requires_grad
    }
    assert torch.equal(logits(ours), logits(theirs))
    start = logits(tiny_model("qwen3", tie_word_embeddings=tied))
    assert away(logits(ours), start) < 1e-6
    with ours.disable_adapter():  # type: ignore[operator]
        assert (away(logits(ours), start) > 0.1) == (kind in STARTS_ELSEWHERE)


@pytest.mark.parametrize(("kind", "layout"), each(LAYOUTS, {"dora", "head"}))
def test_the_engine_gives_pefts_losses_and_gradients(kind: str, layout: Kind) -> None:
    theirs, ours = moved(by_peft(kind, tied=False)), moved(made(kind, tied=False))
    group = pairs(3, theirs.config.vocab_size)
    wanted = sum((path_logprob(theirs, s, leaf) for s in group for leaf in (0, 1)), torch.zeros(()))
    wanted.backward()
    policy = Policy(ours, CPU, FLOAT32)
    assert policy.probe(layouts=[layout]) == []
    assert any("lora" in part for part in policy.fused) == ("dora" not in kind), policy.fused
    policy.model.train()
    total = 0.0
    for row in policy.rows(group, 90):
        logprob_N, of = policy.logprobs(row)
        loss = (logprob_N * of.weight_N).sum()
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(float(wanted.detach()), rel=1e-5)
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in policy.trainable:
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "tied"), each(TIED, {"head"}))
def test_what_is_saved_fits_the_untouched_base(kind: str, tied: bool, tmp_path: Path) -> None:
    model = made(kind, tied)
    began = {name: value.clone() for name, value in trainable_state(model).items()}
    wanted = logits(moved(model))
    save(model, tmp_path, adapter=lora(kind), began=began)
    base = tiny_model("qwen3", tie_word_embeddings=tied)
    plain = PeftModel.from_pretrained(base, tmp_path)
    assert plain.peft_config["default"].init_lora_weights is True
    assert away(logits(plain), wanted) < 2e-6
    with plain.disable_adapter():
        assert away(logits(plain), logits(tiny_model("qwen3", tie_word_embeddings=tied))) == 0.0
    merged = load_adapter(tiny_model("qwen3", tie_word_embeddings=tied), tmp_path).merge_and_unload()  # type: ignore[operator]
    assert away(logits(merged), wanted) < 2e-6
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


def test_the_conversion_is_pefts_own(tmp_path: Path) -> None:
    theirs = by_peft("pissa", tied=True)
    config = theirs.peft_config["default"]  # type: ignore[index,union-attr]
    config.init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")  # type: ignore[operator]
    config.init_lora_weights = "pissa"
    moved(theirs)
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=tmp_path / "start")  # type: ignore[operator]
    ours = made("pissa")
    began = {name: value.clone() for name, value in trainable_state(ours).items()}
    save(moved(ours), tmp_path / "ours", adapter=lora("pissa"), began=began)
    one, other = (load_adapter(tiny_model("qwen3"), tmp_path / name).state_dict() for name in ("ours", "theirs"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in OFTEN else LONG) for k in KINDS])
def test_a_run_begins_again_as_exactly_what_it_began_with(kind: str) -> None:
    """Though another seed, or another machine, would have drawn or decomposed otherwise."""
    first = made(kind)
    began = {name: value.clone() for name, value in trainable_state(first).items()}
    again = attach(tiny_model("qwen3"), lora(kind), seed=77, began=began)
    assert torch.equal(logits(again), logits(first))
    load_trainable_state(again, trainable_state(moved(first)))
    assert torch.equal(logits(again), logits(first))
    assert began.keys() == trainable_state(again).keys()
    with pytest.raises(ModelError, match="does not fit"):
        attach(tiny_model("qwen3"), lora(kind), seed=3, began=dict(list(began.items())[1:]))


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in OFTEN else LONG) for k in KINDS])
def test_the_reference_is_a_copy_of_the_start(kind: str) -> None:
    policy = Policy(made(kind), CPU, FLOAT32)
    group = pairs(3, policy.config.vocab_size)
    start = tiny_model("qwen3").eval()
    with torch.no_grad():
        wanted = torch.stack([torch.stack([path_logprob(start, s, leaf) for leaf in (0, 1)]) for s in group])
    assert starts_at_zero(policy) == (kind in {"plain", "rslora", "patterns", "layers"})
    reference = Reference.of(policy)
    moved(policy.model)
    got = reference.leaf_logprobs(group, policy.rows(group, 4096))
    torch.testing.assert_close(got.float(), wanted.float(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"target_modules": ["qq_proj"]}, "linear layers are called"),
        ({"init_lora_weights": "pissa", "target_modules": ["embed_tokens"]}, "only a linear layer"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "linear layers are called"),
        ({"modules_to_save": ["nrom"]}, "adapter.modules_to_save: nrom: no module has such a name"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}}, "adapter.rank_pattern: k_proj: no module"),
        ({"alpha_pattern": {r"layers\.9\..*": 2.0}}, "adapter.alpha_pattern"),
    ],
)
def test_what_finds_nothing_to_sit_on_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as error:
        attach(tiny_model("qwen3"), Lora(r=4, alpha=8, **given), seed=0)
    assert said in str(error.value)


def test_an_adapter_of_another_task_or_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    answers = attach(tiny_model("qwen3"), Lora(r=2, alpha=4), seed=0)
    save(answers, tmp_path / "answers")
    classifier = AutoModelForSequenceClassification.from_config(small_config("qwen3", num_labels=1))
    save(attach(classifier, Lora(r=2, alpha=4), seed=0), tmp_path / "scores")
    save(attach(tiny_model("qwen3", hidden_size=48), Lora(r=2, alpha=4), seed=0), tmp_path / "wider")
    fresh = AutoModelForSequenceClassification.from_config(small_config("qwen3", num_labels=1))
    for name, model, message, hint in (
        ("answers", fresh, "it has no .*score", "merge it"),
        ("scores", tiny_model("qwen3"), "score.weight is strange", "a reward model's"),
        ("wider", tiny_model("qwen3"), "size mismatch", "was trained on"),
    ):
        with pytest.raises(ModelError, match=message) as raised:
            go_on_with(model, Lora(r=2, alpha=4, continue_from=str(tmp_path / name)))
        assert hint in str(raised.value.hint) and raised.value.where == str(tmp_path / name)
