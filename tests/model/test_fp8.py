"""Linear layers in float8: what the bits stand for is what is computed, in both ways of computing it, with gradients."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

from families import tiny_model
from tunedock.model import fp8
from tunedock.model.compiling import compile_layers
from tunedock.model.fp8 import FLOAT8, Fp8Linear, rounded
from tunedock.model.policy import Policy, Precision
from tunedock.model.quantize import quantised, to_fp8

BFLOAT16 = torch.bfloat16


def layer(inputs: int = 64, outputs: int = 48, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(inputs, outputs, bias=bias)
    made.weight.data[3] *= 50.0  # outputs of very different size
    made.weight.data[5] = 0.0
    return made.requires_grad_(False)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_bits_stand_for_the_weights(scale: float) -> None:
    plain = layer()
    plain.weight.data *= scale
    wide = Fp8Linear(plain).widened()
    largest_N1 = plain.weight.abs().amax(-1, keepdim=True)
    assert bool(((wide - plain.weight).abs() <= plain.weight.abs() / 16 + largest_N1 / 2**17).all())
    assert torch.equal(wide[5], torch.zeros(64))


def through(function: object, x: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)  # type: ignore[operator]
    (grad,) = torch.autograd.grad((y.float() * up).sum(), x)
    return y.detach(), grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widened_products_are_those_of_the_widened_layer(dtype: torch.dtype, bias: bool) -> None:
    narrow = Fp8Linear(plain := layer(bias=bias))
    plain.weight.data = narrow.widened()
    plain = plain.to(dtype)
    x, up = torch.randn(2, 9, 64).to(dtype), torch.randn(2, 9, 48)
    got, wanted = through(narrow, x, up), through(plain, x, up)
    for one, other in zip(got, wanted, strict=True):
        tolerance = {"rtol": 2e-2, "atol": 1e-2} if dtype == BFLOAT16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_float8_are_those_of_rounded_factors(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The reference is written from the definition, in float32: factors rounded, multiplied as they then are."""
    monkeypatch.setattr(fp8, "in_float8", lambda layer, device: True)
    narrow = Fp8Linear(layer(bias=False))
    x, up = torch.randn(7, 64).to(dtype), torch.randn(7, 48)
    x[2] *= 1000.0  # tokens of very different size
    y, grad = through(narrow, x, up)
    weight_NK = narrow.weight.view(FLOAT8).float()
    x8, x_scale = rounded(x)
    tolerance = {"rtol": 1e-2 if dtype == BFLOAT16 else 1e-5, "atol": 1e-4}
    torch.testing.assert_close(y.float(), (x8.float() * x_scale) @ (weight_NK * narrow.scale_N1).T, **tolerance)
    g8, g_scale = rounded(up.to(dtype).float() * narrow.scale_N1[:, 0])
    torch.testing.assert_close(grad.float(), (g8.float() * g_scale) @ weight_NK, **tolerance)
    exact = up @ narrow.widened()
    assert float((grad.float() - exact).norm() / exact.norm()) < 0.05


def test_a_tokens_result_depends_on_that_token_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "in_float8", lambda layer, device: True)
    narrow = Fp8Linear(layer())
    x = torch.randn(7, 64)
    beside = x.clone()
    beside[3:] *= 1e5
    torch.testing.assert_close(narrow(x)[:3], narrow(beside)[:3])


def test_a_model_keeps_its_head_and_embeddings_and_an_adapter_is_float32() -> None:
    model = tiny_model("qwen3").to(BFLOAT16)
    before = {name: p.dtype for name, p in model.named_parameters()}
    linears = [name for name, m in model.named_modules() if type(m) is nn.Linear and name != "lm_head"]
    to_fp8(model)
    found = quantised(model)
    assert found is not None and found.layers == len(linears) and not found.products
    layers = [model.get_submodule(name) for name in linears]
    assert found.size_bytes == sum(m.out_features * (m.in_features + 4) for m in layers)
    narrowed = {name for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert narrowed == {f"{name}.weight" for name in linears}
    assert all(p.dtype == before[name] for name, p in model.named_parameters() if name not in narrowed)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(linears) and all(p.dtype == torch.float32 for p in trained)


def test_a_models_rows_are_exact_and_its_adapter_gets_gradients() -> None:
    """Against the model whose weights are what the bits stand for."""
    narrow = tiny_model("qwen3")
    wide = deepcopy(narrow)
    to_fp8(narrow)
    for name, module in narrow.named_modules():
        if isinstance(module, Fp8Linear):
            wide.get_submodule(name).weight.data = module.widened()
    ids = torch.randint(1, 90, (1, 12))
    torch.testing.assert_close(narrow(ids).logits, wide(ids).logits, rtol=1e-4, atol=1e-5)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = Policy(get_peft_model(narrow, config), torch.device("cpu"), Precision(torch.float32, torch.float32))
    assert policy.probe() == [] and policy.layout == "tree"
    assert quantised(tiny_model("qwen3")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_on_a_gpu(dtype: torch.dtype) -> None:
    narrow = Fp8Linear(layer(256, 512)).cuda()
    x, up = torch.randn(33, 256, device="cuda").to(dtype), torch.randn(33, 512, device="cuda")
    y, grad = through(narrow, x, up)
    wide = narrow.widened()
    for got, wanted in ((y, x.float() @ wide.T + narrow.bias), (grad, up @ wide)):
        assert got.dtype == dtype
        assert float((got.float() - wanted).norm() / wanted.norm()) < 0.06


def test_the_compiler_goes_around_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by the compiler's front end; what it would make of the rest is its own business."""
    monkeypatch.setattr(fp8, "in_float8", lambda layer, device: True)
    monkeypatch.setattr(fp8, "_product", fp8._product)  # put back at the end
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = tiny_model("qwen3", num_hidden_layers=1).train()
    to_fp8(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.randint(1, 90, (1, 12))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    counters.clear()
    assert compile_layers(model) == 1
    for got, wanted in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] > 1
