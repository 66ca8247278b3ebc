"""Base and adapter -> one model, in float32, from the base's own weights; and what shows that it is the run's.

    merged in memory gives the logits of base plus adapter, to rounding
    the weights differ from the base's: an export of untrained weights is caught (LLaMA-Factory #9051 shipped one)

Of a reward model the scores of both answers of held-out pairs are compared, as plain transformers reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from tunedock.data import prepare as preparing
from tunedock.data.conversation import Message
from tunedock.data.store import SampleStore
from tunedock.errors import CheckError
from tunedock.eval.questions import questions_of
from tunedock.events import Emitter
from tunedock.model import adapter as adapters
from tunedock.model.chat_facts import ChatFacts
from tunedock.model.policy import Policy, Precision
from tunedock.model.session import Base, base_weights

PROMPTS = 8
EXACT_TOLERANCE = 1e-3
"""Largest difference of a logit, relative to the largest logit, between merged and unmerged in float32."""
ROUNDED_TOLERANCE = 0.05
"""The same for files of bfloat16 or float16, whose weights are rounded."""
FLOAT32 = Precision(torch.float32, torch.float32)
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids of real text, and what the run's model makes of it."""

    ids: list[list[int]]
    outputs: list[Tensor]
    """Logits [T, V] of each, or one tensor of the scores of all; float32, on the CPU."""
    scored: bool

    def asked_of(self, model: nn.Module, device: torch.device) -> list[Tensor]:
        return _scores(model, self.ids, device) if self.scored else _logits(model, self.ids, device)

    def difference(self, got: Sequence[Tensor]) -> float:
        """Largest difference, relative to the largest value."""
        pairs = zip(self.outputs, got, strict=True)
        return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-6)) for a, b in pairs)

    def same_top(self, got: Sequence[Tensor]) -> float:
        """Share of positions with the same most likely token."""
        same = [(a.argmax(-1) == b.argmax(-1)).float() for a, b in zip(self.outputs, got, strict=True)]
        return float(torch.cat(same).mean())

    def same_order(self, got: Sequence[Tensor]) -> float:
        """Share of pairs ranked as the run ranks them; chosen and rejected stand side by side."""
        gaps = [score_P[0::2] - score_P[1::2] for score_P in (self.outputs[0], got[0])]
        return float(((gaps[0] > 0) == (gaps[1] > 0)).float().mean())


def prompts_of(base: Base, facts: ChatFacts, policy: Policy, emit: Emitter) -> Prompts:
    scored = base.head == "scores"
    ids = _pairs(base, emit) if scored else _questions(base, emit, facts)
    outputs = (_scores if scored else _logits)(policy.model, ids, policy.device)
    return Prompts(ids, outputs, scored)


def merged(policy: Policy, folder: Path, prompts: Prompts) -> tuple[nn.Module, float]:
    """The model in one piece, and by how much it differs from base plus adapter. Raises CheckError where that is too much.

    The policy's own model is used up.
    """
    model: nn.Module = policy.model.merge_and_unload() if adapters.is_adapter(folder) else policy.model  # type: ignore[operator]
    difference = prompts.difference(prompts.asked_of(model, policy.device))
    if not difference <= EXACT_TOLERANCE:
        raise CheckError(
            f"the merged weights do not give the logits of base plus adapter: they differ by {difference:.3g}",
            where="export",
        )
    return model, difference


@dataclass(frozen=True, slots=True)
class Changes:
    """What training has changed."""

    changed_tensors: int
    tensors: int
    largest_change: float

    def require(self) -> None:
        if not self.changed_tensors:
            raise CheckError(
                f"the exported weights are the base's own: nothing was trained or merged ({self.tensors} tensors)",
                where="export",
            )


def changes(base: Base, state: Mapping[str, Tensor], dtype: torch.dtype) -> Changes:
    """Of a model's weights against the base's, both rounded to `dtype`."""
    original = base_state(base)
    found = [
        float((tensor.cpu().to(dtype).float() - original[name].to(dtype).float()).abs().max())
        for name, tensor in state.items()
        if name in original and original[name].shape == tensor.shape
    ]
    return Changes(sum(change > 0 for change in found), len(found), max(found, default=0.0))


def base_state(base: Base) -> Mapping[str, Tensor]:
    """The base's weights in float32, on the CPU."""
    return base_weights(base, FLOAT32, CPU, quantise=False).state_dict()


def own_dtype(base: Base) -> torch.dtype:
    """The type the base's config states, which its files are in; float32 where it states none."""
    config = AutoConfig.from_pretrained(base.located.folder, trust_remote_code=base.recipe.model.trust_remote_code)
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def _questions(base: Base, emit: Emitter, facts: ChatFacts) -> list[list[int]]:
    """Token ids of real prompts: held-out rows where there are any, else training rows; a stream has none, then its template's."""
    if not base.recipe.data.streaming:
        prepared = preparing.prepare(base.recipe, base.chat, emit)
        for side in ("test", "validation", "train"):
            store: SampleStore = prepared.side(side)
            questions = questions_of(store, PROMPTS)
            if questions:
                return [base.chat.prompt_ids(q.prompt, q.tools, thinking=facts.thinking) for q in questions]
            if len(store):
                return [sample.path(sample.leaves()[0])[0].tolist() for sample in islice(store, PROMPTS)]
    return [base.tokenizer(text)["input_ids"] for text in ("The model was exported.", "模型已导出。")]


def _pairs(base: Base, emit: Emitter) -> list[list[int]]:
    """Token ids of both answers, with their prompts, of held-out pairs where there are any, else of training pairs; a stream's
    pairs are gone, and a made-up one takes their place."""
    if not base.recipe.data.streaming:
        prepared = preparing.prepare(base.recipe, base.chat, emit)
        for side in ("test", "validation", "train"):
            store: SampleStore = prepared.side(side)
            if len(store):
                return [sample.path(leaf)[0].tolist() for sample in islice(store, PROMPTS) for leaf in sample.leaves()]
    asked = Message("user", "Was the model exported?")
    return [base.chat.whole_ids((asked, Message("assistant", text))) for text in ("The model was exported.", "No.")]


@torch.no_grad()
def _scores(model: nn.Module, paths: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """One tensor of the paths' scores, float32, on the CPU, their mean taken off: what counts is how they differ."""
    model.eval()
    found = [model(torch.as_tensor([list(ids)], device=device), use_cache=False).logits[0] for ids in paths]
    score_P = torch.cat(found).float().cpu()
    return [score_P - score_P.mean()]


@torch.no_grad()
def _logits(model: nn.Module, prompts: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Logits [T, V] of each prompt, float32, on the CPU."""
    model.eval()
    return [
        model(torch.as_tensor([list(ids)], device=device), use_cache=False).logits[0].float().cpu() for ids in prompts
    ]
