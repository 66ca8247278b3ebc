"""Hidden states -> log-probabilities of chosen tokens. The logits of a whole row never exist.

The model is called as a whole (a wrapper that shards it needs that); only `lm_head.forward` is replaced for the call. Inside, the
hidden states of the chosen places are gathered and turned into log-probabilities in chunks; a chunk's logits are computed again in
the backward pass instead of being kept. What a model does to its logits after the head (Gemma's soft cap, Cohere's and Granite's
scale) is done here, in the chunk; `model.policy` compares the result with plain logits when a model is loaded.

Shapes: B lines, T tokens a line, N chosen tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 26
"""Logits held at once: 256 MiB in float32."""


class ChosenHead:
    """Takes the place of a causal language model's output layer while a row is in the model."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        self._module: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self._plain_forward = self._module.forward
        self._module.forward = self._forward
        text = config.get_text_config()
        self._soft_cap: float | None = getattr(text, "final_logit_softcapping", None)
        self._scale = float(getattr(text, "logit_scale", None) or 1.0) / float(
            getattr(text, "logits_scaling", None) or 1.0
        )
        self._chunk = max(64, CHUNK_LOGITS // int(text.vocab_size))
        self._chosen: tuple[Tensor, Tensor] | None = None
        self._logprobs_N: Tensor | None = None

    def choose(self, flat_N: Tensor, token_N: Tensor) -> None:
        """Sets the places (line * T + position) and tokens of the next call."""
        self._chosen = (flat_N, token_N)
        self._logprobs_N = None

    def take(self) -> Tensor:
        """The log-probabilities [N], float32, of the call since `choose`."""
        logprobs_N, self._logprobs_N, self._chosen = self._logprobs_N, None, None
        if logprobs_N is None:
            raise RuntimeError("the model did not call its output layer")
        return logprobs_N

    def _forward(self, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._chosen is None:
            return self._plain_forward(hidden_BTD, *args, **kwargs)  # type: ignore[no-any-return]
        flat_N, token_N = self._chosen
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[flat_N]
        pieces = [
            self._logprobs_of_chunk(hidden_ND[i : i + self._chunk], token_N[i : i + self._chunk])
            for i in range(0, len(token_N), self._chunk)
        ]
        self._logprobs_N = torch.cat(pieces) if pieces else hidden_ND.new_zeros(0, dtype=torch.float32)
        # What the model makes of its "logits" from here on is not read; they stay in the graph for wrappers that watch outputs.
        return self._logprobs_N.reshape(1, -1, 1)

    def _logprobs_of_chunk(self, hidden_ND: Tensor, token_N: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return checkpoint(self._compute, hidden_ND, token_N, use_reentrant=False)  # type: ignore[no-any-return]
        return self._compute(hidden_ND, token_N)

    def _compute(self, hidden_ND: Tensor, token_N: Tensor) -> Tensor:
        logits_NV = self._plain_forward(hidden_ND).float()
        if self._scale != 1.0:
            logits_NV = logits_NV * self._scale
        if self._soft_cap:
            logits_NV = torch.tanh(logits_NV / self._soft_cap) * self._soft_cap
        logprobs_N: Tensor = logits_NV.gather(-1, token_N[:, None])[:, 0] - logits_NV.logsumexp(-1)
        return logprobs_N


class PlainHead:
    """For a model whose output layer cannot be replaced: whole logits, then the chosen ones. Same result, more memory."""

    def __call__(self, logits_BTV: Tensor, flat_N: Tensor, token_N: Tensor) -> Tensor:
        logits_NV = logits_BTV.reshape(-1, logits_BTV.shape[-1])[flat_N].float()
        return torch.log_softmax(logits_NV, -1).gather(-1, token_N[:, None])[:, 0]
