"""The head: log-probabilities of chosen tokens and their gradients, frozen and trained, against float64 logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tunedock.model import head
from tunedock.model.head import AfterHead, ChosenHead, softmax_of_chosen_
from tunedock.model.kernels import kernels, status

VOCABULARY = 301


class Small(nn.Module):
    """An output layer, and nothing before it."""

    def __init__(self, *, bias: bool, trained: bool, **config: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lm_head = nn.Linear(16, VOCABULARY, bias=bias).requires_grad_(trained)
        text = SimpleNamespace(vocab_size=VOCABULARY, **config)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def reference(weight: Tensor, bias: Tensor | None, hidden: Tensor, token_N: Tensor, after: AfterHead) -> Tensor:
    logits = hidden.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    logits = logits * after.scale
    if after.soft_cap:
        logits = torch.tanh(logits / after.soft_cap) * after.soft_cap
    return torch.log_softmax(logits, -1).gather(-1, token_N[:, None])[:, 0]


@pytest.mark.parametrize("chunk_bytes", [1 << 27, 4000])
@pytest.mark.parametrize(
    "config", [{}, {"final_logit_softcapping": 2.0}, {"logit_scale": 0.3}, {"logits_scaling": 4.0}]
)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_log_softmax(
    monkeypatch: pytest.MonkeyPatch, bias: bool, trained: bool, config: dict[str, float], chunk_bytes: int
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", chunk_bytes)
    model = Small(bias=bias, trained=trained, **config)
    chosen = ChosenHead(model, model.config)
    hidden = torch.randn(2, 9, 16, requires_grad=True)
    flat_N, token_N = torch.tensor([0, 3, 3, 17, 8]), torch.tensor([5, 0, 300, 7, 5])
    chosen.choose(flat_N, token_N)
    got = chosen.take(model.lm_head(hidden))
    after = AfterHead.of(model.config.get_text_config())
    weight, bias_V = model.lm_head.weight, model.lm_head.bias
    wanted = reference(weight, bias_V, hidden.reshape(-1, 16)[flat_N], token_N, after)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    up = torch.randn(5)
    leaves = [hidden, *(p for p in (weight, bias_V) if trained and p is not None)]
    grads = torch.autograd.grad((got * up).sum(), leaves)
    for one, other in zip(grads, torch.autograd.grad((wanted * up).sum(), leaves), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_bytes", [1 << 27, 4000])
@pytest.mark.parametrize("config", [{}, {"final_logit_softcapping": 2.0}, {"logit_scale": 0.3}])
@pytest.mark.parametrize(("bias", "frozen"), [(False, ""), (True, ""), (True, "weight"), (True, "bias")])
def test_a_trained_layer_and_a_loss_that_is_a_weighted_sum(
    monkeypatch: pytest.MonkeyPatch, bias: bool, frozen: str, config: dict[str, float], chunk_bytes: int
) -> None:
    """The gradients are computed in the forward pass: logits are made once."""
    monkeypatch.setattr(head, "CHUNK_BYTES", chunk_bytes)
    model = Small(bias=bias, trained=True, **config)
    if frozen:
        model.lm_head.get_parameter(frozen).requires_grad_(False)
    chosen = ChosenHead(model, model.config)
    hidden = torch.randn(2, 9, 16, requires_grad=True)
    flat_N, token_N = torch.tensor([0, 3, 3, 17, 8]), torch.tensor([5, 0, 300, 7, 5])
    weight_N = torch.tensor([1.0, 0.25, 1.0, -2.0, 0.5])
    chosen.choose(flat_N, token_N, weight_N)
    got = chosen.take(model.lm_head(hidden))
    after = AfterHead.of(model.config.get_text_config())
    weight, bias_V = model.lm_head.weight, model.lm_head.bias
    wanted = reference(weight, bias_V, hidden.reshape(-1, 16)[flat_N], token_N, after)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    leaves = [hidden, *(p for p in (weight, bias_V) if p is not None and p.requires_grad)]
    wanted_grads = torch.autograd.grad(-0.37 * (wanted * weight_N).sum(), leaves)
    loss = -(got * weight_N).sum() * 0.37
    grads = torch.autograd.grad(loss, leaves, retain_graph=True)
    for one, other in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="taken before"):
        loss.backward()


def test_a_loss_that_is_no_such_sum_is_not_believed() -> None:
    model = Small(bias=False, trained=True)
    chosen = ChosenHead(model, model.config)
    chosen.choose(torch.tensor([0, 1]), torch.tensor([5, 6]), torch.tensor([1.0, 2.0]))
    output = model.lm_head(torch.randn(1, 4, 16, requires_grad=True))
    with pytest.raises(RuntimeError, match="not the weighted sum"):
        (chosen.take(output) ** 2).sum().backward()


@pytest.mark.parametrize("after", [AfterHead(), AfterHead(soft_cap=3.0), AfterHead(scale=0.4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_softmax_and_its_twin(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, after: AfterHead
) -> None:
    assert kernels() is not None, status()
    torch.manual_seed(1)
    product = (torch.randn(6, 70_001) * 4).to(dtype)
    product[0, :] = 0.0
    product[1, 9] = 80.0
    token_N = torch.tensor([3, 9, 70_000, 0, 5, 12])
    compiled, plain = product.clone(), product.clone()
    got = softmax_of_chosen_(compiled, token_N, after, derivative=True)
    assert torch.equal(softmax_of_chosen_(product.clone(), token_N, after, derivative=False), got)
    monkeypatch.setattr(head, "kernels", lambda: None)
    torch.testing.assert_close(softmax_of_chosen_(plain, token_N, after, derivative=True), got, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled, plain, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)


def test_gradients_come_to_the_models_output_though_nothing_is_read_of_it() -> None:
    """What shards a model gathers weights by that."""
    model = Small(bias=False, trained=False)
    chosen = ChosenHead(model, model.config)
    chosen.choose(torch.tensor([0, 1]), torch.tensor([5, 6]))
    output = torch.tanh(model.lm_head(torch.randn(1, 4, 16, requires_grad=True)))
    came: list[torch.Tensor] = []
    output.register_hook(came.append)
    chosen.take(output).sum().backward()
    assert len(came) == 1 and not came[0].any()


@pytest.mark.parametrize("chunk_bytes", [1 << 27, 4000])
@pytest.mark.parametrize("config", [{}, {"final_logit_softcapping": 2.0}, {"logit_scale": 0.3}])
@pytest.mark.parametrize(("trained", "wrapped"), [(False, False), (True, False), (True, True)])
def test_which_tokens_are_the_likeliest(
    monkeypatch: pytest.MonkeyPatch, trained: bool, wrapped: bool, config: dict[str, float], chunk_bytes: int
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", chunk_bytes)
    model = Small(bias=True, trained=trained, **config)
    if wrapped:
        model.lm_head = Wrapped(model.lm_head)
    chosen = ChosenHead(model, model.config)
    hidden = torch.randn(2, 9, 16)
    flat_N = torch.tensor([0, 3, 3, 17, 8])
    logits = hidden.reshape(-1, 16)[flat_N] @ model.lm_head.weight.T + model.lm_head.bias
    best = logits.argmax(-1)
    token_N = torch.where(torch.tensor([True, False, True, True, False]), best, (best + 7) % VOCABULARY)
    chosen.choose(flat_N, token_N)
    wanted = chosen.take(model.lm_head(hidden))
    assert chosen.greedy_N is None
    chosen.choose(flat_N, token_N, ranked=True)
    got = chosen.take(model.lm_head(hidden))
    assert not got.requires_grad
    torch.testing.assert_close(got, wanted.detach(), rtol=1e-6, atol=1e-6)
    assert chosen.greedy_N is not None and chosen.greedy_N.tolist() == [True, False, True, True, False]
    plain = head.PlainHead()
    plain(logits, torch.arange(5), token_N, ranked=True)
    assert plain.greedy_N is not None and torch.equal(plain.greedy_N, chosen.greedy_N)


class Wrapped(nn.Module):
    """An output layer that is more than a matrix, as one with a LoRA is."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x)
        return made


def test_asking_for_nothing_gives_nothing() -> None:
    model = Small(bias=False, trained=False)
    chosen = ChosenHead(model, model.config)
    hidden = torch.randn(1, 4, 16, requires_grad=True)
    chosen.choose(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    taken = chosen.take(model.lm_head(hidden))
    assert taken.shape == (0,)
    taken.sum().backward()
    assert hidden.grad is not None and not hidden.grad.any()


def test_outside_of_a_row_the_model_has_its_own_logits() -> None:
    model = Small(bias=True, trained=False)
    hidden = torch.randn(1, 4, 16)
    wanted = model.lm_head(hidden)
    ChosenHead(model, model.config)
    assert torch.equal(model.lm_head(hidden), wanted)
