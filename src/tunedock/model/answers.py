"""Prompts -> several sampled answers to each, for rollouts. Generation is transformers' own.

What is drawn for a token of an answer is a number that seed, prompt, answer and place alone decide; the token is the one whose
share of the probabilities it falls on. So answers are the same by one process or many, in batches of any size, and where a batch is
done again in halves.

A prompt goes through the model once: its keys and values are then repeated for its answers, which is what generation would have
computed for each of them. A model whose cache cannot be repeated has each answer's prompt computed; which it was, `Sampler.shares`
says.

Shapes: B prompts of a batch, T tokens of the longest, G answers to each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tunedock.model import world
from tunedock.model.generate import generation_config, padded_left
from tunedock.model.out_of_memory import give_back, is_out_of_memory
from tunedock.model.policy import Policy
from tunedock.model.reference import evaluating, sum_type
from tunedock.model.sharding import is_sharded


@dataclass(frozen=True, slots=True)
class Sampling:
    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Sampled:
    """An answer as it was made."""

    ids: tuple[int, ...]
    """With the stop token it ended with, if it did; at least one token."""
    stopped: bool
    logprobs: tuple[float, ...] | None = None
    """What an engine says of its first tokens, or all: for comparison, nothing is learned from them."""


ANSWER_BITS = 24
"""Of the number a draw is keyed by; the rest is the prompt's."""

Batch = list[tuple[int, int]]
"""(index of a prompt, answers to it that are made together)."""


class Sampler:
    """Makes answers with the policy as it is."""

    def __init__(
        self, policy: Policy, *, stop_ids: Collection[int], pad_id: int, batch_size: int = 64, share: bool = True
    ) -> None:
        """`batch_size`: answers made at once. `share`: prompts are computed once, where the model's cache allows it."""
        self._policy = policy
        self._stop_ids = frozenset(stop_ids)
        self._pad_id = pad_id
        self._batch_size = batch_size
        self.shares = share

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        answers: int,
        sampling: Sampling,
        *,
        seed: int,
        between: Callable[[int], None] = lambda done: None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Sampled]]:
        """`answers` to each prompt, in the prompts' order; what is drawn depends on `seed` and nothing drawn elsewhere.

        `between` hears, before each batch, how many answers are made, and may raise to stop. A batch that runs out of memory is
        done again in halves. `numbers`: of the prompts among those that all ranks answer together, which are then called here
        together; `between` is called equally often on each.
        """
        made: list[list[Sampled]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        numbered = numbers or range(len(prompts))
        todo = list(self._batches(order, answers, self._batch_size))
        rounds = -world.least(-len(todo)) if numbers is not None else len(todo)
        with evaluating(self._policy.model):
            for number in range(rounds):
                between(sum(map(len, made)))
                left = todo[number : number + 1]
                if not left and self._in_step:
                    self._lines([[self._pad_id] * 2], [answers], sampling, None)
                while left:
                    batch = left.pop(0)
                    draws = self._draws(batch, [(numbered[i], len(made[i])) for i, _ in batch], sampling, seed)
                    lines = self._attempt(prompts, batch, sampling, draws)
                    if lines is None:
                        left = [*_halves(batch), *left]
                        continue
                    for index, count in batch:
                        made[index] += [self._cut(next(lines)) for _ in range(count)]
        between(sum(map(len, made)))
        return made

    @property
    def shared_out(self) -> bool:
        """Each rank answers its own part of the prompts."""
        return True

    @property
    def _in_step(self) -> bool:
        """Whether ranks wait for each other at every token: each has a part of the weights."""
        return world.together() and is_sharded(self._policy.model)

    def _draws(self, batch: Batch, lines: Sequence[tuple[int, int]], sampling: Sampling, seed: int) -> Tensor | None:
        """A number in [0, 1) for each token [answers, tokens] of a batch; None where nothing is drawn. `lines`: for each prompt its
        number, and the number of its first answer here."""
        if sampling.temperature == 0:
            return None
        keys = [
            (number << ANSWER_BITS) + first + answer
            for (number, first), (_, count) in zip(lines, batch, strict=True)
            for answer in range(count)
        ]
        made = [np.random.Generator(np.random.Philox(key=[seed, key])).random(sampling.max_new_tokens) for key in keys]
        return torch.as_tensor(np.stack(made)).to(self._policy.device, sum_type(self._policy.device))

    @staticmethod
    def _batches(order: Sequence[int], answers: int, size: int) -> Iterator[Batch]:
        """Whole groups side by side; a group larger than a batch in parts."""
        if answers >= size:
            for index in order:
                yield from ([(index, min(size, answers - start))] for start in range(0, answers, size))
            return
        prompts = size // answers
        for start in range(0, len(order), prompts):
            yield [(index, answers) for index in order[start : start + prompts]]

    def _attempt(
        self, prompts: Sequence[Sequence[int]], batch: Batch, sampling: Sampling, draws: Tensor | None
    ) -> Iterator[list[int]] | None:
        """The completions of a batch, line by line; None when there was not memory enough, unless for one answer alone."""
        try:
            return iter(self._lines([prompts[i] for i, _ in batch], [count for _, count in batch], sampling, draws))
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error) or self._in_step or sum(count for _, count in batch) == 1:
                raise
        give_back()
        return None

    @torch.no_grad()
    def _lines(
        self, prompts: Sequence[Sequence[int]], counts: Sequence[int], sampling: Sampling, draws: Tensor | None
    ) -> list[list[int]]:
        """Greedy where there are no `draws`."""
        policy = self._policy
        config = generation_config(self._stop_ids, self._pad_id, sampling.max_new_tokens, 0.0)
        ids_BT, mask_BT = (tensor.to(policy.device) for tensor in padded_left(prompts, self._pad_id))
        repeats_B = torch.as_tensor(counts, device=policy.device)
        with policy.plain(), policy.autocast():
            cache = self._prompts_once(ids_BT, mask_BT, counts) if self.shares else None
            out_BT = policy.model.generate(  # type: ignore[operator]
                input_ids=ids_BT.repeat_interleave(repeats_B, 0),
                attention_mask=mask_BT.repeat_interleave(repeats_B, 0),
                generation_config=config,
                logits_processor=_drawing(sampling, draws, ids_BT.shape[1]),
                synced_gpus=self._in_step,
                **({} if cache is None else {"past_key_values": cache}),
            )
        lines: list[list[int]] = out_BT[:, ids_BT.shape[1] :].tolist()
        return lines

    def _prompts_once(self, ids_BT: Tensor, mask_BT: Tensor, counts: Sequence[int]) -> DynamicCache | None:
        """Keys and values of all prompts but for their last tokens, repeated for the answers; None where that is not possible."""
        cannot = ids_BT.shape[1] < 2 or len(set(counts)) > 1 or counts[0] == 1
        if world.agree(cannot) if self._in_step else cannot:
            return None
        policy = self._policy
        cache = DynamicCache(config=policy.config.get_text_config())
        places_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        try:
            policy.model(
                input_ids=ids_BT[:, :-1],
                attention_mask=mask_BT[:, :-1],
                position_ids=places_BT[:, :-1],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache.batch_repeat_interleave(counts[0])
        except (NotImplementedError, AttributeError, TypeError, ValueError):
            # policy: a cache of another kind (linear attention) cannot be repeated, and the plain way serves every model
            self.shares = False
            return None
        return cache

    def _cut(self, ids: list[int]) -> Sampled:
        end = next((i + 1 for i, token in enumerate(ids) if token in self._stop_ids), None)
        return Sampled(tuple(ids[:end]), end is not None)


class _Drawn(LogitsProcessor):  # type: ignore[misc]
    """Leaves of each line's tokens the one that its number falls on."""

    def __init__(self, draws_BT: Tensor, width: int) -> None:
        self._draws_BT = draws_BT
        self._width = width
        """Tokens of the prompts."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        at = input_ids.shape[1] - self._width
        shares_BV = torch.softmax(scores.float(), -1).cumsum(-1, dtype=self._draws_BT.dtype)
        wanted_B1 = self._draws_BT[:, at : at + 1] * shares_BV[:, -1:]
        token_B1 = torch.searchsorted(shares_BV, wanted_B1, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)


def _drawing(sampling: Sampling, draws: Tensor | None, width: int) -> LogitsProcessorList:
    """What makes greedy decoding sample by `draws`; transformers' own parts, in its order."""
    if draws is None:
        return LogitsProcessorList()
    parts: list[Any] = [TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature != 1.0 else []
    parts += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    parts += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1.0 else []
    return LogitsProcessorList([*parts, _Drawn(draws, width)])


def _halves(batch: Batch) -> list[Batch]:
    if len(batch) > 1:
        middle = (len(batch) + 1) // 2
        return [batch[:middle], batch[middle:]]
    ((index, count),) = batch
    return [[(index, (count + 1) // 2)], [(index, count // 2)]]
