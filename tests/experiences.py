"""Rollouts of random tokens, and what a plain model says of them, answer by answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunedock.objective.experience import Answer, Experience, asked_and_answered


def experiences(
    prompts: int, answers: int, vocabulary: int, seed: int = 0, *, by_token: bool = False, all_count: bool = True
) -> list[Experience]:
    """Prompts of 3 to 40 tokens with answers of 1 to 14, and what is known of them. `by_token`: an advantage for each token."""
    draw = np.random.default_rng(seed)
    made = []
    for p in range(prompts):
        prompt_T = draw.integers(1, vocabulary, int(draw.integers(3, 40))).astype(np.int32)
        lengths = draw.integers(1, 15, answers)
        tokens = [draw.integers(1, vocabulary, int(length)).astype(np.int32) for length in lengths]
        counts = [all_count or g == 0 or bool(draw.random() < 0.7) for g in range(answers)]
        known = tuple(_known(int(length), draw, by_token=by_token) for length in lengths)
        sample = asked_and_answered(f"p:{p}", prompt_T, tokens, counts)
        made.append(Experience(sample.row_id, sample.segments, answers=known))
    return made


def _known(length: int, draw: np.random.Generator, *, by_token: bool) -> Answer:
    def numbers(spread: float, centre: float = 0.0) -> NDArray[np.float32]:
        return draw.normal(centre, spread, length).astype(np.float32)

    advantage_T = numbers(1.0) if by_token else np.full(length, draw.normal(), np.float32)
    return Answer(
        reward=float(draw.normal()),
        advantage_T=advantage_T,
        old_T=numbers(0.3, -5.0),
        reference_T=numbers(0.3, -5.0),
        value_T=numbers(0.5),
        return_T=numbers(0.5),
    )


def token_logprobs(model: nn.Module, experience: Experience, number: int, temperature: float = 1.0) -> Tensor:
    """Of an answer's tokens [T] under a plain transformers model, float64."""
    prompt_T, answer_T = experience.segments[0].tokens_T, experience.segments[number + 1].tokens_T
    ids = torch.as_tensor(np.concatenate([prompt_T, answer_T]), dtype=torch.int64)[None]
    logits = model(input_ids=ids).logits[0].double() / temperature
    every = torch.log_softmax(logits[:-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
    return every[-len(answer_T) :]


def with_old(model: nn.Module, group: Sequence[Experience], *, noise: float = 0.2, seed: int = 3) -> list[Experience]:
    """The same with old and reference log-probabilities near the model's own, so that some ratios are clipped and some are not."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    with torch.no_grad():
        for experience in group:
            known = []
            for number, answer in enumerate(experience.answers):
                own_T = token_logprobs(model, experience, number)
                near: dict[str, Any] = {
                    name: (own_T + noise * torch.randn(own_T.shape, generator=draw)).float().numpy()
                    for name in ("old_T", "reference_T")
                }
                known.append(
                    Answer(
                        answer.reward,
                        answer.advantage_T,
                        near["old_T"],
                        near["reference_T"],
                        answer.value_T,
                        answer.return_T,
                    )
                )
            made.append(Experience(experience.row_id, experience.segments, answers=tuple(known)))
    return made
