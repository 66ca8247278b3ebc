"""The fused parts: each gives what the module it replaces gives, forward and backward; what does not fit goes to the module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from families import tiny_model
from tunedock.model import kernels as compiled_kernels
from tunedock.model.adapter import attach
from tunedock.model.fused import fuse
from tunedock.recipe.adapters import Lora


def adapted(family: str, dropout: float = 0.0) -> nn.Module:
    model = attach(tiny_model(family), Lora(r=4, alpha=8, dropout=dropout), seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def outcome(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=ids).logits
    model.zero_grad()
    (logits.float() ** 2).mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("qwen3", {"lora", "norm", "gate", "rotary"}),
        ("llama3", {"lora", "norm", "gate", "rotary"}),
        ("gemma", {"lora", "norm", "gate", "rotary"}),  # norms multiply by 1 + w, gates are GELU
        ("phi3", {"lora", "norm"}),  # gate and up are one product, only a part of a head is turned
    ],
)
@pytest.mark.parametrize("lora", [True, False])
def test_a_fused_model_is_the_same_model(family: str, parts: set[str], lora: bool) -> None:
    plain = adapted(family) if lora else tiny_model(family).requires_grad_(True)
    fused = copy.deepcopy(plain)
    found = {line.split()[1] for line in fuse(fused)}
    assert found - {"rotary"} == parts - {"rotary"} - (set() if lora else {"lora"})
    ids = torch.randint(3, 90, (1, 23))
    logits, gradients = outcome(plain.train(), ids)
    got, got_gradients = outcome(fused.train(), ids)
    torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-5)
    assert got_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max()) + 1e-9
        assert float((got_gradients[name] - gradient).abs().max()) / scale < 5e-5, name


def test_an_adapter_switched_off_is_the_base() -> None:
    base, fused = tiny_model("qwen3"), adapted("qwen3")
    fuse(fused)
    ids = torch.randint(3, 90, (1, 11))
    with torch.no_grad():
        wanted = base(input_ids=ids).logits
        assert float((fused(input_ids=ids).logits - wanted).abs().max()) > 1e-3
        with fused.disable_adapter():
            torch.testing.assert_close(fused(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_dropout_is_left_to_peft() -> None:
    plain, fused = adapted("qwen3", dropout=0.5).train(), adapted("qwen3", dropout=0.5).train()
    fuse(fused)
    ids = torch.randint(3, 90, (1, 11))
    torch.manual_seed(5)
    wanted = plain(input_ids=ids).logits
    torch.manual_seed(5)
    torch.testing.assert_close(fused(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_fusing_twice_changes_nothing() -> None:
    model = adapted("qwen3")
    assert fuse(model)
    forwards = {name: vars(m)["forward"] for name, m in model.named_modules() if "forward" in vars(m)}
    fuse(model)
    assert forwards == {name: vars(m)["forward"] for name, m in model.named_modules() if "forward" in vars(m)}


def test_bfloat16_differs_from_the_plain_model_no_more_than_the_plain_model_from_float32() -> None:
    exact = adapted("qwen3").eval()
    plain = copy.deepcopy(exact)
    for name, parameter in plain.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.bfloat16()
    fused = copy.deepcopy(plain)
    fuse(fused)
    ids = torch.randint(3, 90, (1, 40))
    with torch.no_grad():
        wanted = exact(input_ids=ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            plainly, fusedly = plain(input_ids=ids).logits.float(), fused(input_ids=ids).logits.float()
    assert float((fusedly - wanted).norm()) <= 1.1 * float((plainly - wanted).norm())


def test_a_norm_that_is_something_else_is_left_alone() -> None:
    class OddNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x / x.abs().amax(-1, keepdim=True) * self.weight

    assert fuse(nn.Sequential(OddNorm(), nn.LayerNorm(8))) == []


def test_without_a_compiler_lora_alone_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunedock.model.fused.kernels", lambda: None)
    assert [line.split()[1] for line in fuse(adapted("qwen3"))] == ["lora"]


def test_why_there_are_no_kernels_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(compiled_kernels, "SOURCE", compiled_kernels.SOURCE.with_name("__init__.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made, said = compiled_kernels._loaded.__wrapped__()
    assert made is None and "do not compile" in said
    monkeypatch.setattr("shutil.which", lambda name: None)
    made, said = compiled_kernels._loaded.__wrapped__()
    assert made is None and "no C++ compiler" in said


def test_generation_goes_through_fused_parts() -> None:
    """Several lines at once with a cache: shapes that the rotary kernel does not take."""
    plain = tiny_model("qwen3")
    fused = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain.config.to_dict()))
    fused.load_state_dict(plain.state_dict())
    fuse(fused)
    ids = torch.randint(3, 90, (3, 7))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(ids, **options), fused.eval().generate(ids, **options))
