"""Prompts -> completions: batches for evaluation, a stream for a conversation. Generation is transformers' own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from tunedock.model.out_of_memory import give_back, is_out_of_memory
from tunedock.model.policy import Policy


def generation_config(
    stop_ids: Collection[int],
    pad: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> GenerationConfig:
    """Greedy decoding, or sampling with a `temperature` above 0, and nothing of the model's own settings."""
    # What is left out would be filled in from the model's own generation_config.json: greedy is greedy, without a penalty.
    sampling: dict[str, Any] = {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": 0,
    }
    if temperature > 0:
        sampling |= {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=sorted(stop_ids), pad_token_id=pad, **sampling)


@torch.no_grad()
def complete(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Collection[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    stop_texts: StopTexts | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Token ids of a completion for each prompt, in the prompts' order, without the stop token and what follows it.

    Prompts of like length share a batch, padded on the left; a batch that runs out of memory is done again in halves. With
    `temperature` 0 decoding is greedy. A completion that one of `stop_texts` ends still holds it.
    """
    torch.manual_seed(seed)
    config = generation_config(stop_ids, pad_id, max_new_tokens, temperature, top_k, top_p, repetition_penalty)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    completions: list[list[int]] = [[] for _ in prompts]
    stops = set(stop_ids)
    policy.model.eval()
    if on_progress is not None:
        on_progress(0)
    start = 0
    while start < len(order):
        batch = order[start : start + batch_size]
        try:
            made = _complete(policy, [prompts[i] for i in batch], config, pad_id, stop_texts)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error) or len(batch) == 1:
                raise
            made = None
        if made is None:
            give_back()
            batch_size = (len(batch) + 1) // 2
            continue
        for index, ids in zip(batch, made, strict=True):
            end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
            completions[index] = ids[:end]
        start += len(batch)
        if on_progress is not None:
            on_progress(start)
    return completions


def padded_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] of prompts that end together, and a mask [B, T] that is 1 where a token stands."""
    width = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    mask_BT = torch.zeros((len(prompts), width), dtype=torch.int64)
    for line, prompt in enumerate(prompts):
        ids_BT[line, width - len(prompt) :] = torch.as_tensor(prompt)
        mask_BT[line, width - len(prompt) :] = 1
    return ids_BT, mask_BT


def _complete(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    pad_id: int,
    stop_texts: StopTexts | None,
) -> list[list[int]]:
    """A batch, whose first prompt is the longest. What a stop text ended goes to that text's last token."""
    ids_BT, mask_BT = padded_left(prompts, pad_id)
    width = ids_BT.shape[1]
    stopping = _Said(stop_texts, width, len(prompts)) if stop_texts is not None and stop_texts.texts else None
    with policy.plain(), policy.autocast():
        out_BT = policy.model.generate(  # type: ignore[operator]
            input_ids=ids_BT.to(policy.device),
            attention_mask=mask_BT.to(policy.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stopping] if stopping is not None else []),
        )
    made: list[list[int]] = out_BT[:, width:].tolist()
    return made if stopping is None else [ids[:end] for ids, end in zip(made, stopping.ends, strict=True)]


@dataclass(frozen=True, slots=True)
class StopTexts:
    """Texts that end a completion once they stand in it, and what turns token ids into text."""

    texts: Sequence[str]
    tokenizer: PreTrainedTokenizerBase

    @property
    def window(self) -> int:
        """Tokens at a completion's end that the last of a stop text's can stand in: a token is a byte at least. One before them
        belongs to it, for what a text begins with may be decoded otherwise (a leading space)."""
        return max(len(text.encode()) for text in self.texts) + 1


class _Said(StoppingCriteria):  # type: ignore[misc]
    """Ends the lines of a batch that have come to a stop text."""

    def __init__(self, stop: StopTexts, width: int, lines: int) -> None:
        self._stop = stop
        self._width = width
        self.ends: list[int | None] = [None] * lines
        """Tokens of each completion that a stop text ended, it included."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        length = input_ids.shape[1] - self._width
        going = [line for line, end in enumerate(self.ends) if end is None]
        last_BT = input_ids[going, self._width + max(0, length - self._stop.window) :].tolist()
        for line, text in zip(going, self._stop.tokenizer.batch_decode(last_BT), strict=True):
            if any(stop in text for stop in self._stop.texts):
                self.ends[line] = length
        return torch.tensor([end is not None for end in self.ends], dtype=torch.bool, device=input_ids.device)


class _Asked(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._asked(), device=input_ids.device, dtype=torch.bool)


def stream(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    stop_ids: Collection[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Iterator[str]:
    """Pieces of the completion's text as they are made. `stop_requested` is asked after each token.

    An error of the generating thread is raised here, after the pieces made before it.
    """
    abandoned = threading.Event()  # set when the reader closes this iterator early
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            ids_BT = torch.as_tensor([list(prompt)], dtype=torch.int64, device=policy.device)
            with torch.no_grad(), policy.plain(), policy.autocast():
                policy.model.generate(  # type: ignore[operator]
                    input_ids=ids_BT,
                    attention_mask=torch.ones_like(ids_BT),
                    generation_config=generation_config(stop_ids, pad_id, max_new_tokens, temperature),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_Asked(lambda: abandoned.is_set() or stop_requested())]),
                )
        except BaseException as error:  # noqa: BLE001 - policy: carried over to the reader's thread and raised there
            failure.append(error)
        finally:
            streamer.end()

    policy.model.eval()
    thread = threading.Thread(target=work, name="generate", daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        abandoned.set()
        thread.join()
    if failure:
        raise failure[0]
