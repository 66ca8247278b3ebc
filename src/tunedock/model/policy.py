"""A model as the loop sees it: a row in, log-probabilities of its chosen tokens out.

When a policy is made it is probed on a short made-up row: the replaced head must give what plain logits give, and two lines of one
row what each gives alone. A model that fails the first keeps its own head (and the run says so); one that fails the second cannot
be trained on batches and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tunedock.data.batch import RowTensors, to_device
from tunedock.data.layout import Row, padded
from tunedock.data.sample import single
from tunedock.errors import ModelError
from tunedock.model.head import ChosenHead, PlainHead

PROBE_TOLERANCE = 1e-3
"""Largest difference in log-probability, float32, for two ways of computing the same thing."""


@dataclass(frozen=True, slots=True)
class Precision:
    weights: torch.dtype
    compute: torch.dtype

    @property
    def scaled(self) -> bool:
        """float16 gradients need scaling."""
        return self.compute == torch.float16


class Policy:
    """A causal language model and the way it is called. N chosen tokens of a row."""

    def __init__(self, model: nn.Module, device: torch.device, precision: Precision) -> None:
        self.model = model
        self.device = device
        self.precision = precision
        self._head: ChosenHead | None = ChosenHead(model, self.config)
        self._plain = PlainHead()

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def head(self) -> str:
        return "chosen" if self._head else "plain"

    def logprobs(self, row: Row) -> tuple[Tensor, RowTensors]:
        """Log-probabilities [N], float32, of the row's chosen tokens, with the row's tensors."""
        tensors = to_device(row, self.device)
        with self.autocast():
            return self._call(tensors), tensors

    def _call(self, row: RowTensors) -> Tensor:
        if self._head is not None:
            self._head.choose(row.flat_N, row.token_N)
        output = self.model(
            input_ids=row.input_ids_BT,
            attention_mask=row.attention_mask_BT,
            position_ids=row.position_ids_BT,
            use_cache=False,
        )
        if self._head is not None:
            return self._head.take()
        return self._plain(output.logits, row.flat_N, row.token_N)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision.compute == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision.compute)

    @property
    def has_adapter(self) -> bool:
        """Whether the base can be had by switching an adapter off."""
        return hasattr(self.model, "disable_adapter")

    @contextmanager
    def base(self) -> Iterator[None]:
        """The model as it was before the adapter. Only for a model with an adapter."""
        with self.model.disable_adapter():  # type: ignore[operator]
            yield

    @property
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def probe(self) -> str | None:
        """Compares the ways of computing on a made-up row. Returns a sentence when the model keeps its own head."""
        vocabulary = int(self.config.get_text_config().vocab_size)
        draw = np.random.Generator(np.random.Philox(key=[7, 7]))
        tokens = [draw.integers(0, vocabulary, length).astype(np.int32) for length in (12, 7)]
        samples = [single(f"probe {i}", t, np.ones(len(t), np.float32)) for i, t in enumerate(tokens)]
        training = self.model.training
        self.model.eval()
        said = None
        try:
            with torch.no_grad():
                alone = torch.cat([self._alone(t) for t in tokens])
                together = self._in_rows(padded(samples, budget_tokens=64))
                if self._head is not None and not _close(together, alone, self._tolerance):
                    self._head = None
                    together = self._in_rows(padded(samples, budget_tokens=64))
                    said = "the model's own output layer is used: the replaced one does not give the same log-probabilities"
                if not _close(together, alone, self._tolerance):
                    worst = float((together - alone).abs().max())
                    raise ModelError(
                        f"two samples in one row do not give what each gives alone (log-probabilities differ by {worst:.2g})",
                        where=type(self.model).__name__,
                        hint="this architecture cannot be trained on batches; please report it",
                    )
        finally:
            self.model.train(training)
        return said

    @property
    def _tolerance(self) -> float:
        return PROBE_TOLERANCE if self.precision.compute == torch.float32 else 0.3

    def _in_rows(self, rows: list[Row]) -> Tensor:
        (row,) = rows
        logprobs_N, _ = self.logprobs(row)
        order = np.lexsort((row.chosen.position_N, row.chosen.sample_N))
        return logprobs_N[torch.as_tensor(order, device=self.device)]

    def _alone(self, tokens_T: np.ndarray[Any, np.dtype[np.int32]]) -> Tensor:
        ids = torch.as_tensor(tokens_T, dtype=torch.int64, device=self.device)[None]
        with self.autocast():
            logits_TV = self.model(input_ids=ids, use_cache=False).logits[0].float()
        return torch.log_softmax(logits_TV[:-1], -1).gather(-1, ids[0, 1:, None])[:, 0]


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance)
