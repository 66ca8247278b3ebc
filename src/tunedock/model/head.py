"""Hidden states -> log-probabilities of chosen tokens. The logits of a whole row never exist.

The model is called as a whole (a wrapper that shards it needs that); only `lm_head.forward` is replaced for the call. Inside, the
hidden states of the chosen places are gathered and turned into log-probabilities in chunks. A log-probability depends on one
hidden state alone, so where the output layer is frozen its derivative, a vector as long as the hidden state, is computed in the
forward chunk while the logits are there: whatever the objective, the backward pass is one multiplication, and nothing is computed
twice. A trained output layer's own gradient needs to know what each log-probability weighs in the loss: where the loss is their
weighted sum (likelihood) it is computed in the forward chunk too; for other objectives, and where the layer is wrapped (LoRA,
sharding), a chunk's logits are computed again in the backward pass.

What a model does to its logits after the head (Gemma's soft cap, Cohere's and Granite's scale) is done here, in the chunk;
`model.policy` compares the result with plain logits when a model is loaded.

Shapes: B lines, T tokens a line, N chosen tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tunedock.model.kernels import kernels, takes

CHUNK_BYTES = 1 << 27
"""Logits held at once, in the type they are computed in."""

GRANULE = 32
"""On a CPU places are filled up to a multiple of this. Each new number of them makes oneDNN write a kernel for each product, over a
megabyte that it keeps in the middle of the heap."""


@dataclass(frozen=True, slots=True)
class AfterHead:
    """What becomes of the output layer's product before the softmax."""

    scale: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0
    """What all of it is divided by: that of sampling, where the policy is what answers are sampled from."""

    @classmethod
    def of(cls, text_config: Any) -> AfterHead:
        scale = float(getattr(text_config, "logit_scale", None) or 1.0)
        return cls(
            scale=scale / float(getattr(text_config, "logits_scaling", None) or 1.0),
            soft_cap=getattr(text_config, "final_logit_softcapping", None),
        )

    def __call__(self, logits_NV: Tensor) -> Tensor:
        """float32 logits as the softmax takes them."""
        logits_NV = logits_NV.float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.soft_cap:
            logits_NV = torch.tanh(logits_NV / self.soft_cap) * self.soft_cap
        if self.temperature != 1.0:
            logits_NV = logits_NV / self.temperature
        return logits_NV


class ChosenHead:
    """Takes the place of a causal language model's output layer while a row is in the model."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        self._module: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self._plain_forward = self._module.forward
        self._module.forward = self._forward
        text = config.get_text_config()
        self._after = AfterHead.of(text)
        self._vocabulary = int(text.vocab_size)
        self._chosen: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._logprobs_N: Tensor | None = None
        self._ranked, self._count = False, 0
        self.greedy_N: Tensor | None = None
        """Of the last call that was asked for it: whether each chosen token is the likeliest at its place."""
        self.value: nn.Module | None = None
        """A head [.., D] -> [.., 1] of its own that is asked at the same places."""
        self.value_N: Tensor | None = None
        """Of the last call: what it says, float32."""
        self._room = Room()

    def at_temperature(self, temperature: float) -> None:
        """The log-probabilities of sampling at `temperature`, from the next call on."""
        self._after = replace(self._after, temperature=temperature)

    def choose(self, flat_N: Tensor, token_N: Tensor, weight_N: Tensor | None = None, *, ranked: bool = False) -> None:
        """Sets the places (line * T + position) and tokens of the next call.

        `weight_N`: for a loss that is the sum of the log-probabilities times these, and times one number that need not be known.
        `ranked`: also leaves `greedy_N`; such a call has no gradients.
        """
        self._count = len(flat_N)
        self._chosen = (_filled(flat_N), _filled(token_N), None if weight_N is None else _filled(weight_N))
        self._logprobs_N, self.greedy_N, self.value_N, self._ranked = None, None, None, ranked

    def take(self, output: Tensor) -> Tensor:
        """The log-probabilities [N], float32, of the call since `choose`. `output`: what the model then made of its "logits".

        It is not read, but stays in the graph: a wrapper that shards the model gathers weights when gradients come to its output.
        """
        logprobs_N, self._logprobs_N, self._chosen = self._logprobs_N, None, None
        if logprobs_N is None:
            raise RuntimeError("the model did not call its output layer")
        if self.greedy_N is not None:
            self.greedy_N = self.greedy_N[: self._count]
        if self.value_N is not None:
            self.value_N = self.value_N[: self._count]
        return beside(logprobs_N[: self._count], output)

    def _forward(self, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._chosen is None:
            return self._plain_forward(hidden_BTD, *args, **kwargs)  # type: ignore[no-any-return]
        flat_N, token_N, weight_N = self._chosen
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).index_select(0, flat_N)
        plain = self._is_plain()
        if self.value is not None:
            with torch.autocast(hidden_ND.device.type, enabled=False):
                self.value_N = self.value(hidden_ND.float())[:, 0]
        if self._ranked:
            self._logprobs_N = self._compared(hidden_ND, token_N, plain=plain)
        elif plain and not any(p.requires_grad for p in self._layer().parameters()):
            self._logprobs_N = self._frozen(hidden_ND, token_N)
        elif plain and weight_N is not None and len(token_N) and torch.is_grad_enabled():
            self._logprobs_N = self._weighted(hidden_ND, token_N, weight_N)
        elif len(token_N):
            self._logprobs_N = self._recomputed(hidden_ND, token_N)
        else:  # a rank without tokens still takes part: the layer's weights get a gradient of zero, as they do elsewhere
            first = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[:1]
            self._logprobs_N = self._recomputed(first, token_N.new_zeros(1))[:0]
        return self._logprobs_N.reshape(1, -1, 1)

    def _is_plain(self) -> bool:
        """Whether the output layer is a matrix that is all here, and perhaps a bias."""
        layer = self._layer()
        return type(layer) is nn.Linear and type(layer.weight.data) is Tensor

    def _layer(self) -> nn.Module:
        """The output layer: the model's own, or the copy of it that is trained beside an adapter."""
        module = self._module
        if not isinstance(module, ModulesToSaveWrapper):
            return module
        active = module.active_adapters
        if module.disable_adapters or not active or active[0] not in module.modules_to_save:
            whole: nn.Module = module.original_module
        else:
            whole = module.modules_to_save[active[0]]
        return whole

    def _frozen(self, hidden_ND: Tensor, token_N: Tensor) -> Tensor:
        compute, (weight_VD, bias_V) = self._compute_type(hidden_ND), self._parameters()
        bias_V = None if bias_V is None else bias_V.detach().to(compute)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return frozen_head(
                hidden_ND.to(compute), weight_VD.detach().to(compute), bias_V, token_N, self._after, self._room
            )

    @torch.no_grad()
    def _compared(self, hidden_ND: Tensor, token_N: Tensor, *, plain: bool) -> Tensor:
        """Log-probabilities, and in `greedy_N` whether no token of the vocabulary has a larger one (of equal ones, the first)."""
        logprobs_N = torch.empty(len(token_N), dtype=torch.float32, device=hidden_ND.device)
        greedy_N = torch.empty(len(token_N), dtype=torch.bool, device=hidden_ND.device)
        if plain:
            compute, (weight_VD, bias_V) = self._compute_type(hidden_ND), self._parameters()
            with torch.autocast(hidden_ND.device.type, enabled=False):
                bias_V = None if bias_V is None else bias_V.to(compute)
                products = _products(hidden_ND.to(compute), weight_VD.to(compute), bias_V, self._room)
                self._compare(products, token_N, logprobs_N, greedy_N)
        else:
            chunks = _chunks(len(token_N), self._vocabulary * 4)
            self._compare(
                ((rows, self._plain_forward(hidden_ND[rows])) for rows in chunks), token_N, logprobs_N, greedy_N
            )
        self.greedy_N = greedy_N
        return logprobs_N

    def _compare(
        self, products: Iterable[tuple[slice, Tensor]], token_N: Tensor, logprobs_N: Tensor, greedy_N: Tensor
    ) -> None:
        for rows, product_NV in products:
            # What comes after the product leaves the order as it is: a positive scale, a soft cap.
            greedy_N[rows] = product_NV.argmax(-1) == token_N[rows]
            logprobs_N[rows] = softmax_of_chosen_(product_NV, token_N[rows], self._after, derivative=False)

    def _weighted(self, hidden_ND: Tensor, token_N: Tensor, weight_N: Tensor) -> Tensor:
        compute, (weight_VD, bias_V) = self._compute_type(hidden_ND), self._parameters()
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return weighted_head(hidden_ND.to(compute), weight_VD, bias_V, token_N, weight_N, self._after, self._room)

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        layer = self._layer()
        return layer.weight, layer.bias  # type: ignore[return-value]

    def _compute_type(self, hidden_ND: Tensor) -> torch.dtype:
        if torch.is_autocast_enabled(hidden_ND.device.type):
            return torch.get_autocast_dtype(hidden_ND.device.type)
        return hidden_ND.dtype

    def _recomputed(self, hidden_ND: Tensor, token_N: Tensor) -> Tensor:
        pieces: list[Tensor] = []
        for rows in _chunks(len(token_N), self._vocabulary * 4):
            if torch.is_grad_enabled():
                pieces.append(checkpoint(self._compute, hidden_ND[rows], token_N[rows], use_reentrant=False))
            else:
                pieces.append(self._compute(hidden_ND[rows], token_N[rows]))
        return torch.cat(pieces)

    def _compute(self, hidden_ND: Tensor, token_N: Tensor) -> Tensor:
        logits_NV = self._after(self._plain_forward(hidden_ND))
        logprobs_N: Tensor = logits_NV.gather(-1, token_N[:, None])[:, 0] - logits_NV.logsumexp(-1)
        return logprobs_N


class _Beside(torch.autograd.Function):
    """The first tensor as it is, with a gradient of zero for the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, watched: Tensor) -> Tensor:
        ctx.save_for_backward(watched)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (watched,) = ctx.saved_tensors
        return grad, torch.zeros_like(watched)


beside: Callable[..., Tensor] = _Beside.apply


class Room:
    """Memory for a chunk's logits, kept from call to call: the largest thing there is would cost its page faults each time."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def take(self, rows: int, like_VD: Tensor) -> Tensor:
        """[rows, V], not initialised, valid until the next call."""
        size = rows * like_VD.shape[0]
        kept = self._kept
        if kept is None or kept.numel() < size or kept.dtype != like_VD.dtype or kept.device != like_VD.device:
            self._kept = None  # before the new one is there: both at once would be the peak
            self._kept = kept = torch.empty(size, dtype=like_VD.dtype, device=like_VD.device)
        return kept[:size].view(rows, -1)


class FrozenHead(torch.autograd.Function):
    """Log-probabilities under a frozen output layer, with d logprob_n / d hidden_n computed in the forward chunk.

    With z = W h, y = after(z) and p = softmax(y): d log p_token / d h = W^T (after'(z) * (onehot_token - p)).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        token_N: Tensor,
        after: AfterHead,
        room: Room,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        logprobs_N = torch.empty(len(token_N), dtype=torch.float32, device=hidden_ND.device)
        slope_ND = torch.empty_like(hidden_ND) if wanted else None
        for rows, product_NV in _products(hidden_ND, weight_VD, bias_V, room):
            logprobs_N[rows] = softmax_of_chosen_(product_NV, token_N[rows], after, derivative=wanted)
            if slope_ND is not None:
                torch.mm(product_NV, weight_VD, out=slope_ND[rows])
        if slope_ND is not None:
            ctx.save_for_backward(slope_ND)
        return logprobs_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (slope_ND,) = ctx.saved_tensors
        return slope_ND * grad_N[:, None].to(slope_ND.dtype), None, None, None, None, None


class WeightedHead(torch.autograd.Function):
    """Log-probabilities under a trained output layer, for a loss s * sum_n w_n logprob_n with the w known: its gradients, but for
    the factor s, are computed in the forward chunk.

    With the notation of `FrozenHead` and g_n = w_n after'(z_n) * (onehot_n - p_n): d / d h_n = W^T g_n, d / d W = sum_n g_n h_n^T.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        token_N: Tensor,
        weight_N: Tensor,
        after: AfterHead,
        room: Room,
    ) -> Tensor:
        product_dtype = hidden_ND.dtype
        matrix_VD = weight_VD.to(product_dtype)
        logprobs_N = torch.empty(len(token_N), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.zeros_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        for rows, product_NV in _products(hidden_ND, matrix_VD, bias_V, room):
            logprobs_N[rows] = softmax_of_chosen_(product_NV, token_N[rows], after, derivative=True)
            product_NV *= weight_N[rows, None].to(product_dtype)
            if grad_hidden_ND is not None:
                torch.mm(product_NV, matrix_VD, out=grad_hidden_ND[rows])
            if grad_weight_VD is not None:
                grad_weight_VD += product_NV.T @ hidden_ND[rows]
            if grad_bias_V is not None:
                grad_bias_V += product_NV.sum(0, dtype=torch.float32)
        ctx.save_for_backward(weight_N)
        ctx.grads = grad_hidden_ND, grad_weight_VD, grad_bias_V
        return logprobs_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        """Raises RuntimeError for a loss that is no such sum, and when asked for twice."""
        (weight_N,) = ctx.saved_tensors
        if ctx.grads is None:
            raise RuntimeError("the gradients of this row were taken before")
        (grads, ctx.grads) = (ctx.grads, None)
        at = weight_N.abs().argmax()
        factor = grad_N[at] / weight_N[at]
        if not torch.allclose(grad_N, factor * weight_N, rtol=1e-4, atol=0.0):
            raise RuntimeError("the loss is not the weighted sum of log-probabilities it was said to be")
        return *(None if grad is None else grad.mul_(factor) for grad in grads), None, None, None, None


frozen_head: Callable[..., Tensor] = FrozenHead.apply
weighted_head: Callable[..., Tensor] = WeightedHead.apply


def softmax_of_chosen_(product_NV: Tensor, token_N: Tensor, after: AfterHead, *, derivative: bool) -> Tensor:
    """Log-probability [N], float32, of a token each. With `derivative`, `product_NV` is overwritten with d logprob / d product."""
    compiled = kernels()
    cap = after.soft_cap or 0.0
    # The kernel scales before the cap; without a cap a temperature is a scale.
    told = after.temperature == 1.0 or not cap
    if compiled is not None and takes(product_NV) and after.scale > 0.0 and told:
        logprobs_N = torch.empty(len(token_N), dtype=torch.float32)
        rows, size, scale = *product_NV.shape, after.scale / after.temperature
        compiled("chosen", product_NV.dtype, product_NV, rows, size, token_N, scale, cap, logprobs_N, int(derivative))
        return logprobs_N
    logits_NV = after(product_NV)
    index_N1 = token_N[:, None]
    logsumexp_N1 = logits_NV.logsumexp(-1, keepdim=True)
    logprobs_N = (logits_NV.gather(-1, index_N1) - logsumexp_N1)[:, 0]
    if derivative:
        slope_NV = torch.exp(logits_NV - logsumexp_N1).neg_()
        slope_NV.scatter_add_(-1, index_N1, torch.ones_like(index_N1, dtype=torch.float32))
        if after.soft_cap:
            slope_NV *= 1.0 - (logits_NV * (after.temperature / after.soft_cap)) ** 2
        if after.scale != after.temperature:
            slope_NV *= after.scale / after.temperature
        product_NV.copy_(slope_NV)
    return logprobs_N


def _products(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, room: Room
) -> Iterator[tuple[slice, Tensor]]:
    """The output layer's product, a chunk of places after the other; each stands until the next is asked for."""
    for rows in _chunks(len(hidden_ND), weight_VD.shape[0] * weight_VD.element_size()):
        product_NV = torch.mm(hidden_ND[rows], weight_VD.T, out=room.take(rows.stop - rows.start, weight_VD))
        if bias_V is not None:
            product_NV += bias_V.to(product_NV.dtype)
        yield rows, product_NV


def _filled(value_N: Tensor) -> Tensor:
    """The row's first place asked too, with token 0 and no weight, up to a multiple of GRANULE; what comes of it is dropped."""
    more = -len(value_N) % GRANULE if value_N.device.type == "cpu" else 0
    return nn.functional.pad(value_N, (0, more)) if more else value_N


def _chunks(count: int, bytes_each: int) -> list[slice]:
    """Slices of like size, each of at most CHUNK_BYTES; of a multiple of GRANULE where that many fit."""
    if count == 0:
        return []
    number = -(-count * bytes_each // CHUNK_BYTES)
    size = -(-count // min(number, count))
    if size > GRANULE:
        size -= size % GRANULE
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class PlainHead:
    """For a model whose output layer cannot be replaced: whole logits, then the chosen ones. Same result, more memory."""

    def __init__(self) -> None:
        self.greedy_N: Tensor | None = None
        """As `ChosenHead.greedy_N`."""
        self.temperature = 1.0

    def __call__(self, logits_BTV: Tensor, flat_N: Tensor, token_N: Tensor, *, ranked: bool = False) -> Tensor:
        logits_NV = logits_BTV.reshape(-1, logits_BTV.shape[-1])[flat_N].float() / self.temperature
        self.greedy_N = logits_NV.argmax(-1) == token_N if ranked else None
        return torch.log_softmax(logits_NV, -1).gather(-1, token_N[:, None])[:, 0]
