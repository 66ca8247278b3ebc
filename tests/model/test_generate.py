"""Batched and streamed completions are those of plain greedy decoding, one prompt at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from families import stop_ids, tiny_model, tokenizer
from tunedock.model.generate import StopTexts, complete, stream
from tunedock.model.policy import Policy, Precision

CPU = torch.device("cpu")


def policy() -> Policy:
    return Policy(tiny_model("qwen3").eval(), CPU, Precision(torch.float32, torch.float32))


def prompts() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(5, 90, length).tolist() for length in (3, 11, 7, 2, 9)]


def greedy(model: torch.nn.Module, prompt: list[int], stops: set[int], limit: int) -> list[int]:
    """From the definition: the most likely token, again and again."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        with torch.no_grad():
            token = int(model(input_ids=torch.as_tensor([ids])).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_batches_give_what_each_prompt_gives_alone() -> None:
    made = policy()
    # A token that greedy decoding does produce, so that stopping is tested too.
    stop = greedy(made.model, prompts()[1], set(), 6)[3]
    expected = [greedy(made.model, prompt, {stop}, 12) for prompt in prompts()]
    assert any(len(answer) < 12 for answer in expected)
    for batch_size in (1, 2, 16):
        done: list[int] = []
        got = complete(
            made,
            prompts(),
            stop_ids=[stop],
            pad_id=0,
            max_new_tokens=12,
            batch_size=batch_size,
            on_progress=done.append,
        )
        assert got == expected
        assert done[-1] == len(expected)


def test_a_stream_is_the_same_text_in_pieces() -> None:
    made, words = policy(), tokenizer("qwen3")
    stops = stop_ids("qwen3")
    most = 0
    for text in ("How many hours are in a day?", "Let me think", "你好", "def add(a, b):", "the customer wants"):
        prompt = words(text)["input_ids"]
        pieces = list(stream(made, words, prompt, stop_ids=stops, pad_id=0, max_new_tokens=24))
        expected = words.decode(greedy(made.model, prompt, set(stops), 24), skip_special_tokens=True)
        assert "".join(pieces) == expected
        most = max(most, len(pieces))
    assert most > 1


def test_a_stream_ends_when_asked() -> None:
    made, words = policy(), tokenizer("qwen3")
    asked = iter([False] * 3 + [True] * 1000)
    list(stream(made, words, [7, 8], stop_ids=[], pad_id=0, max_new_tokens=100_000, stop_requested=lambda: next(asked)))


def test_a_reader_that_leaves_ends_the_generation() -> None:
    made, words = policy(), tokenizer("qwen3")
    tokens: list[int] = []
    torch.manual_seed(0)
    pieces = stream(
        made, words, [7, 8], stop_ids=[], pad_id=0, max_new_tokens=1000, temperature=1.0,
        stop_requested=lambda: bool(tokens.append(1)),
    )  # fmt: skip
    next(pieces)
    pieces.close()
    assert 0 < len(tokens) < 1000


def test_an_error_while_generating_reaches_the_reader() -> None:
    made, words = policy(), tokenizer("qwen3")
    try:
        list(stream(made, words, [10**6], stop_ids=[], pad_id=0, max_new_tokens=4))
    except IndexError:
        return
    raise AssertionError("a token outside the vocabulary must not pass in silence")


def test_sampling_is_seeded() -> None:
    made = policy()
    one = complete(made, prompts(), stop_ids=[], pad_id=0, max_new_tokens=8, temperature=1.0, seed=1)
    two = complete(made, prompts(), stop_ids=[], pad_id=0, max_new_tokens=8, temperature=1.0, seed=1)
    other = complete(made, prompts(), stop_ids=[], pad_id=0, max_new_tokens=8, temperature=1.0, seed=2)
    assert one == two != other


def test_a_stop_text_ends_its_line_and_no_other() -> None:
    """What each prompt gives alone up to the text, however many tokens that has, and whatever its neighbours do."""
    made, words = policy(), tokenizer("qwen3")
    whole = [greedy(made.model, prompt, set(), 12) for prompt in prompts()]
    said = [words.decode(ids) for ids in whole]
    stop = said[1][2:6]
    assert len(stop) == 4
    wanted = [text.partition(stop)[0] + (stop if stop in text else "") for text in said]
    assert any(len(text) < len(all_) for text, all_ in zip(wanted, said, strict=True))
    for batch_size in (1, 5):
        got = complete(
            made,
            prompts(),
            stop_ids=[],
            pad_id=0,
            max_new_tokens=12,
            batch_size=batch_size,
            stop_texts=StopTexts(["never there", stop], words),
        )
        for ids, text, all_ in zip(got, wanted, whole, strict=True):
            assert ids == all_[: len(ids)] and words.decode(ids).startswith(text)
            assert stop not in words.decode(ids[:-1])


def test_a_batch_that_runs_out_of_memory_is_done_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """`small_card` stands in for a card that holds two lines."""
    made = policy()
    wanted = complete(made, prompts(), stop_ids=[], pad_id=0, max_new_tokens=6)
    real, sizes = made.model.generate, []

    def small_card(*, input_ids: torch.Tensor, **more: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(input_ids=input_ids, **more)

    monkeypatch.setattr(made.model, "generate", small_card)
    done: list[int] = []
    got = complete(made, prompts(), stop_ids=[], pad_id=0, max_new_tokens=6, on_progress=done.append)
    assert got == wanted
    assert sizes == [5, 3, 2, 2, 1] and done == [0, 2, 4, 5]
    monkeypatch.setattr(made.model, "generate", lambda **_: (_ for _ in ()).throw(RuntimeError("another fault")))
    with pytest.raises(RuntimeError, match="another fault"):
        complete(made, prompts(), stop_ids=[], pad_id=0, max_new_tokens=6)
