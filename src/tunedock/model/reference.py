"""The reference policy: the policy as its stage began, which preference objectives measure a change against.

It is never a second model:

- an adapter that starts at zero is switched off;
- otherwise a copy is kept of what is trained, and nothing else, in 16 bits where that loses nothing (half the size for weights
  that were published so, as most are, whatever they are trained in), and takes the place of the trained values for the pass.
  Gradients do not exist yet then, so widening the copy takes the room they will take.

A leaf's log-probability does not change from epoch to epoch, so it is computed once and remembered by the sample's content: about
250 bytes a pair, for at most `REMEMBERED` samples; the rest are asked again. Checkpoints keep what is remembered: computed again in
another row, a figure would differ in its last digits, and a resumed run from the run that was never stopped.

Shapes: N chosen tokens of a row, S samples of a step, L leaves of the sample that has most.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from tunedock.data.layout import Row
from tunedock.data.sample import Sample
from tunedock.model import world
from tunedock.model.policy import Policy
from tunedock.model.sharding import held, is_sharded_parameter

REMEMBERED = 1 << 19
"""Samples whose figures are remembered: about 130 MB for pairs."""

KEY_BYTES = 16


class Reference:
    """Log-probabilities of a policy as it was. Of `policy` itself, entered by `began`, which ends with the trained values back."""

    def __init__(
        self, policy: Policy, began: Callable[[], AbstractContextManager[None]], *, limit: int = REMEMBERED
    ) -> None:
        self._policy: Policy | None = policy
        self._began = began
        self._device = policy.device
        self._limit = limit
        self._known: dict[bytes, tuple[float, ...]] = {}
        self.kept_bytes = 0
        """Memory of the copy; 0 where an adapter is switched off."""

    @classmethod
    def of(cls, policy: Policy, *, at_zero: bool | None = None, limit: int = REMEMBERED) -> Reference:
        """The reference of a policy that has not been trained yet. `at_zero`: what `starts_at_zero` said, for one that has been
        sharded since."""
        if policy.has_base and (starts_at_zero(policy) if at_zero is None else at_zero):
            return cls(policy, policy.base, limit=limit)
        kept = [(parameter, _copy(parameter)) for _, parameter in policy.trainable]
        made = cls(policy, partial(_swapped, kept, policy), limit=limit)
        made.kept_bytes = sum(copy.numel() * copy.element_size() for _, copy in kept)
        return made

    @property
    def remembered(self) -> int:
        """Samples whose figures are known."""
        return len(self._known)

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """What is asked while it holds is not remembered."""
        known = dict(self._known)
        try:
            yield
        finally:
            self._known = known

    def leaf_logprobs(self, samples: Sequence[Sample], rows: Sequence[Row], *, remember: bool = True) -> Tensor:
        """Weighted sums [S, L] of the log-probabilities of each leaf's trained tokens, without gradient; 0 past a sample's leaves.

        `rows` hold all trained tokens of `samples`; only those with a sample not yet known are computed. `remember`: whether the
        samples will come again.
        """
        leaves = [len(sample.leaves()) for sample in samples]
        keys = [_key(sample) for sample in samples]
        found = [self._known.get(key) for key in keys]
        unknown = [i for i, known in enumerate(found) if known is None]
        if unknown:
            computed = self._compute(rows, unknown, (len(samples), max(leaves))).tolist()
            for i in unknown:
                found[i] = tuple(computed[i][: leaves[i]])
                if remember and len(self._known) < self._limit:
                    self._known[keys[i]] = found[i]  # type: ignore[assignment]
        table = [[*(known or ()), *(0.0 for _ in range(max(leaves) - len(known or ())))] for known in found]
        return torch.tensor(table, dtype=sum_type(self._device), device=self._device)

    @torch.no_grad()
    def _compute(self, rows: Sequence[Row], wanted: Sequence[int], shape: tuple[int, int]) -> Tensor:
        policy = self._policy
        if policy is None:
            raise RuntimeError("a sample the reference was not asked about before it was let go")
        sums_SL = torch.zeros(shape, dtype=sum_type(self._device), device=self._device)
        asked = [row for row in rows if np.isin(row.chosen.sample_N, wanted).any()]
        with evaluating(policy.model), self._began():
            for row in world.share(asked):
                logprob_N, of = policy.logprobs(row)
                sums_SL += leaf_sums(logprob_N, of.weight_N, of.sample_N, of.leaf_N, shape)
        return world.add_up(sums_SL)

    @contextmanager
    def entered(self) -> Iterator[Policy]:
        """The policy as it was, without dropout; the trained one is back after it. For who asks token by token."""
        if self._policy is None:
            raise RuntimeError("the reference was let go")
        with torch.no_grad(), evaluating(self._policy.model), self._began():
            yield self._policy

    def precompute(
        self,
        samples: Sequence[Sample],
        layout: Callable[[Sequence[Sample]], list[Row]],
        *,
        batch: int = 128,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Asks about all samples now and remembers every one, however many. Those remembered already are passed over."""
        self._limit = max(self._limit, len(self._known) + len(samples))
        for start in range(0, len(samples), batch):
            part = [samples[i] for i in range(start, min(start + batch, len(samples)))]
            self.leaf_logprobs(part, layout(part))
            if on_progress is not None:
                on_progress(start + len(part))

    def let_go(self) -> None:
        """Frees copy and policy. From here on only samples it was asked about are known; others are a RuntimeError."""
        self._policy = None
        self._began = nullcontext
        self.kept_bytes = 0

    # -- state ---------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """What is remembered, for a checkpoint."""
        values = list(self._known.values())
        return {
            "keys": torch.from_numpy(np.frombuffer(b"".join(self._known), np.uint8).reshape(-1, KEY_BYTES).copy()),
            "leaves": torch.tensor([len(known) for known in values], dtype=torch.int64),
            "logprobs": torch.tensor([value for known in values for value in known], dtype=torch.float64),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what a checkpoint remembers, an empty one nothing, beside what is known already."""
        if not state:
            return
        values = iter(state["logprobs"].tolist())
        counts = state["leaves"].tolist()
        keys = (row.tobytes() for row in state["keys"].numpy())
        self._known |= {key: tuple(next(values) for _ in range(n)) for key, n in zip(keys, counts, strict=True)}


def leaf_sums(
    logprob_N: Tensor, weight_N: Tensor, sample_N: Tensor, leaf_N: Tensor, shape: tuple[int, int] | torch.Size
) -> Tensor:
    """Sums [S, L] of weight times log-probability by sample and leaf; float64 where the device has it: a sum over a long answer is
    large, and what matters is its small difference from another."""
    kind = sum_type(logprob_N.device)
    flat = torch.zeros(shape[0] * shape[1], dtype=kind, device=logprob_N.device)
    return flat.index_add(0, sample_N * shape[1] + leaf_N, (weight_N * logprob_N).to(kind)).reshape(shape)


def starts_at_zero(policy: Policy) -> bool:
    """Whether switching the adapter off changes nothing: one factor of each pair is zero, and nothing else is trained.

    PiSSA starts elsewhere, an adapter that is gone on with too; DoRA's lengths and whole modules are kept rather than compared.
    """
    factors = [p for name, p in policy.trainable if "lora_B" in name or "lora_embedding_B" in name]
    others = [name for name, _ in policy.trainable if "lora_" not in name or "lora_magnitude" in name]
    return bool(factors) and not others and not any(bool(factor.any()) for factor in factors)


def sum_type(device: torch.device) -> torch.dtype:
    """Of sums over tokens: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _key(sample: Sample) -> bytes:
    """A hash of what the sample asks of a model. Not its row id: a row read in two ways has one id and two contents."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for segment in sample.segments:
        digest.update(np.asarray([segment.parent, len(segment.tokens_T)], "<i8").tobytes())
        digest.update(np.ascontiguousarray(segment.tokens_T, "<i4").tobytes())
        digest.update(np.ascontiguousarray(segment.weights_T, "<f4").tobytes())
    return digest.digest()


def _copy(parameter: nn.Parameter) -> Tensor:
    """What is here of the values, in the first type of 16 bits that holds them exactly; as they are where none does."""
    own = held(parameter).detach()
    for dtype in (torch.bfloat16, torch.float16):
        small = own.to(dtype)
        if small.element_size() < own.element_size() and torch.equal(small.to(own.dtype), own):
            return small
    return own.clone()


@contextmanager
def _swapped(kept: Sequence[tuple[nn.Parameter, Tensor]], policy: Policy) -> Iterator[None]:
    """The parameters with the kept values; the trained ones are put back whatever happens.

    A sharded part stays where it is, for what gathers it knows it by its place: there the values are exchanged.
    """
    whole = [pair for pair in kept if not is_sharded_parameter(pair[0])]
    parts = [(held(parameter), copy) for parameter, copy in kept if is_sharded_parameter(parameter)]
    trained = [parameter.data for parameter, _ in whole]
    values = [part.clone() for part, _ in parts]
    try:
        for parameter, copy in whole:
            parameter.data = copy.to(parameter.dtype)
        for part, copy in parts:
            part.copy_(copy)
        _gather_anew(policy)
        yield
    finally:
        for (parameter, _), data in zip(whole, trained, strict=True):
            parameter.data = data
        for (part, _), value in zip(parts, values, strict=True):
            part.copy_(value)
        _gather_anew(policy)


def _gather_anew(policy: Policy) -> None:
    """DeepSpeed keeps gathered weights for the next call; what they were gathered from has changed."""
    if hasattr(policy.called, "empty_partition_cache"):
        policy.called.empty_partition_cache()  # type: ignore[operator]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout; as it was after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
