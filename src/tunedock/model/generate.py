"""Prompts -> completions: batches for evaluation, a stream for a conversation. Generation is transformers' own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from tunedock.model.policy import Policy


def _config(stop_ids: Collection[int], pad: int, max_new_tokens: int, temperature: float) -> GenerationConfig:
    # What is left out would be filled in from the model's own generation_config.json: greedy is greedy, without a penalty.
    sampling: dict[str, Any] = {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
    }
    if temperature > 0:
        sampling |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
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
    batch_size: int = 16,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Token ids of a completion for each prompt, in the prompts' order, without the stop token and what follows it.

    Prompts of like length share a batch, padded on the left. With `temperature` 0 decoding is greedy.
    """
    torch.manual_seed(seed)
    config = _config(stop_ids, pad_id, max_new_tokens, temperature)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    completions: list[list[int]] = [[] for _ in prompts]
    stops = set(stop_ids)
    policy.model.eval()
    if on_progress is not None:
        on_progress(0)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(prompts[batch[0]])
        ids_BT = torch.full((len(batch), width), pad_id, dtype=torch.int64)
        mask_BT = torch.zeros((len(batch), width), dtype=torch.int64)
        for line, index in enumerate(batch):
            length = len(prompts[index])
            ids_BT[line, width - length :] = torch.as_tensor(prompts[index])
            mask_BT[line, width - length :] = 1
        with policy.plain(), policy.autocast():
            out_BT = policy.model.generate(  # type: ignore[operator]
                input_ids=ids_BT.to(policy.device), attention_mask=mask_BT.to(policy.device), generation_config=config
            )
        for line, index in enumerate(batch):
            made = out_BT[line, width:].tolist()
            end = next((i for i, token in enumerate(made) if token in stops), len(made))
            completions[index] = made[:end]
        if on_progress is not None:
            on_progress(min(start + batch_size, len(order)))
    return completions


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
                    generation_config=_config(stop_ids, pad_id, max_new_tokens, temperature),
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
