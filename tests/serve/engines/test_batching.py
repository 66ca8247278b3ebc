"""The engine of this process: what is asked together is answered as if it were asked alone."""

from __future__ import annotations

import asyncio
import gc
import random
from typing import Any

import psutil
import pytest
import torch
from asking import CPU, answer, asked, by_generate, ids, prompts, together, until_idle

import families
from tunedock.serve.engines.batching import Engine, Limits
from tunedock.serve.engines.compute import Alone, Paged
from tunedock.serve.engines.generator import EngineGone, Overloaded, Sampling
from tunedock.serve.engines.loading import from_model

LIMITS = Limits(running=6, chunk=40, longest=512, cache_bytes=16 << 20)
LENGTHS = (3, 150, 41, 1, 90, 17, 64, 33)


def engine_of(family: str, limits: Limits = LIMITS, **changes: Any) -> Engine:
    return from_model(lively(family, **changes), CPU, limits=limits)


def lively(family: str, **changes: Any) -> Any:
    """A tiny model whose answers vary and have no ties: with fresh weights many repeat one token, and all are about as likely."""
    model = families.tiny_model(family, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(4.0)
        model.model.norm.weight.add_(9.0)
    return model


@pytest.fixture
def engine() -> Any:
    made = engine_of("qwen3")
    yield made
    made.close()


@pytest.mark.parametrize("family", families.MODEL_FAMILIES)
def test_together_as_alone(family: str) -> None:
    """Prompts of unlike lengths, longer than a step's share and than the windows, more of them than run at once."""
    engine, model = engine_of(family), lively(family)
    assert isinstance(engine._compute, Paged) and not engine.notes
    asks = prompts(engine._compute.vocabulary, LENGTHS)
    got = together(engine, [asked(prompt, 5 + 3 * i) for i, prompt in enumerate(asks)])
    engine.close()
    wanted = [by_generate(model, prompt, 5 + 3 * i) for i, prompt in enumerate(asks)]
    assert [ids(tokens) for tokens in got] == wanted
    assert len({token for tokens in wanted for token in tokens}) > 12, "the answers show nothing"
    assert all(tokens[-1].finish == "length" and all(t.finish is None for t in tokens[:-1]) for tokens in got)


@pytest.mark.parametrize("way", ["kernel", "gathered", "alone"])
@pytest.mark.parametrize("family", ["qwen3", "gemma"])
def test_each_way_of_computing(family: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "gathered":
        monkeypatch.setattr("tunedock.serve.engines.paged.kernels", lambda: None)
    if way == "alone":
        monkeypatch.setattr(Paged, "prove", lambda self: "it is to be so")
    engine, model = engine_of(family), lively(family)
    assert isinstance(engine._compute, Alone if way == "alone" else Paged)
    asks = prompts(engine._compute.vocabulary, LENGTHS, seed=1)
    together(engine, [asked(asks[0], 1)])
    if isinstance(engine._compute, Paged):  # memory that was never written may hold anything
        for kept in engine._compute._pool._layers.values():
            for pages in kept:
                pages.data.fill_(torch.nan)
    got = together(engine, [asked(prompt, 20) for prompt in asks])
    engine.close()
    assert [ids(tokens) for tokens in got] == [by_generate(model, prompt, 20) for prompt in asks]


def test_a_model_whose_windows_are_only_masks_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively("gemma")
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    engine = from_model(model, CPU, limits=LIMITS)
    assert isinstance(engine._compute, Alone)
    assert "one by one" in engine.notes[0] and "window of 64" in engine.notes[0]
    engine.close()


def test_a_seed_gives_the_same_whatever_runs_beside(engine: Engine) -> None:
    asks = prompts(engine._compute.vocabulary, (9, 60, 21, 5, 33))
    kinds = [
        Sampling(temperature=0.9, seed=7),
        Sampling(temperature=1.3, top_p=0.8, seed=8),
        Sampling(temperature=0.7, top_k=20, seed=9),
        Sampling(temperature=1.1, min_p=0.02, seed=10),
        Sampling(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2, seed=11),
    ]
    requests = [asked(prompt, 16, kind) for prompt, kind in zip(asks, kinds, strict=True)]
    alone = [ids(together(engine, [request])[0]) for request in requests]
    noise = [asked(prompt, 30, Sampling(temperature=1.0)) for prompt in prompts(engine._compute.vocabulary, (50, 8))]
    beside = together(engine, [*noise, *requests])[2:]
    assert [ids(tokens) for tokens in beside] == alone
    other = together(engine, [asked(asks[0], 16, Sampling(temperature=0.9, seed=70))])[0]
    assert ids(other) != alone[0]


def test_the_first_token_says_how_long_it_was_waited_for() -> None:
    engine = engine_of("qwen3", Limits(running=1, longest=512, cache_bytes=16 << 20))
    first, second = together(engine, [asked([1, 2, 3], 60), asked([1, 2, 3], 2)])
    engine.close()
    assert first[0].queued_s is not None and second[0].queued_s is not None
    assert 0 <= first[0].queued_s < second[0].queued_s
    assert all(token.queued_s is None for token in (*first[1:], *second[1:]))


def test_stop_tokens_and_lengths(engine: Engine) -> None:
    prompt = prompts(engine._compute.vocabulary, (12,))[0]
    whole = ids(together(engine, [asked(prompt, 12)])[0])
    stop = whole[4]
    cut = together(engine, [asked(prompt, 12, stop_ids=frozenset({stop}))])[0]
    assert ids(cut) == whole[: whole.index(stop) + 1] and cut[-1].finish == "stop"
    assert [t.finish for t in together(engine, [asked(prompt, 1)])[0]] == ["length"]


def test_likelihoods_are_the_models_own(engine: Engine) -> None:
    prompt = prompts(engine._compute.vocabulary, (12,))[0]
    warm = Sampling(temperature=2.0, repetition_penalty=1.5, seed=1)
    got = together(engine, [asked(prompt, 6, warm, top_logprobs=3), asked(prompt, 6, top_logprobs=0), asked(prompt, 6)])
    whole = torch.tensor([prompt + ids(got[0])])
    with torch.no_grad():
        logprobs = torch.log_softmax(lively("qwen3")(input_ids=whole).logits[0], -1)
    for place, token in enumerate(got[0]):
        row = logprobs[len(prompt) + place - 1]
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [token for token, _ in token.alternatives] == row.topk(3).indices.tolist()
        assert [value for _, value in token.alternatives] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert all(token.logprob is not None and not token.alternatives for token in got[1])
    assert all(token.logprob is None for token in got[2])


@pytest.mark.parametrize("way", ["closed", "task cancelled", "forgotten"])
def test_who_leaves_frees_everything(engine: Engine, way: str) -> None:
    prompt = prompts(engine._compute.vocabulary, (30,))[0]

    async def leave() -> None:
        stream = engine.submit(asked(prompt, 400))
        await stream.__anext__()
        if way == "closed":
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await stream.__anext__()
        elif way == "task cancelled":

            async def read() -> None:
                async for _ in stream:
                    pass

            task = asyncio.create_task(read())
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            del stream
            gc.collect()

    asyncio.run(leave())
    until_idle(engine, 5)
    assert engine.load().cache_used == 0.0
    assert engine.load().more["answer_tokens"] < 400


def test_an_event_loop_that_ends_takes_its_requests_along(engine: Engine) -> None:
    held = []

    async def start() -> None:
        held.append(engine.submit(asked([1, 2, 3], 450)))

    asyncio.run(start())
    until_idle(engine, 5)
    assert engine.load().more["answer_tokens"] < 400


def test_what_is_refused(engine: Engine) -> None:
    async def refused(match: str, request: Any) -> None:
        with pytest.raises(ValueError, match=match):
            engine.submit(request)

    async def all_of_them() -> None:
        await refused("512 fit together", asked([1] * 500, 13))
        await refused("no tokens", asked([]))
        await refused("at least 1", asked([1], 0))
        await refused("has a token 100000", asked([1, 100_000]))
        await refused("no adapter 'none'", asked([1], adapter="none"))

    asyncio.run(all_of_them())
    with pytest.raises(ValueError, match="no adapter 'none'"):
        engine.drop_adapter("none")


def test_more_wait_than_may() -> None:
    engine = engine_of("qwen3", Limits(running=2, waiting=3, longest=512, cache_bytes=16 << 20))

    async def crowd() -> list[list[Any]]:
        streams = [engine.submit(asked([1, 2, 3], 30)) for _ in range(5)]
        with pytest.raises(Overloaded, match="wait"):
            engine.submit(asked([1, 2, 3], 30))
        await streams.pop().aclose()  # who leaves makes room at once
        streams.append(engine.submit(asked([1, 2, 3], 30)))
        return [[token async for token in stream] for stream in streams]

    answers = asyncio.run(crowd())
    assert len({tuple(ids(tokens)) for tokens in answers}) == 1 and len(answers[0]) == 30
    engine.close()


def test_little_memory_is_shared_out() -> None:
    """Rows that grow take pages from the youngest, whose answers are none the worse."""
    layers, kept = 2, 2 * 2 * 16 * 4  # keys and values of two heads, float32
    engine = engine_of("qwen3", Limits(running=6, chunk=64, longest=256, cache_bytes=256 * layers * kept))
    assert engine.load().more["cache_tokens"] == 256
    asks = prompts(engine._compute.vocabulary, (30, 40, 20, 33, 25))
    got = together(engine, [asked(prompt, 60) for prompt in asks])
    assert engine.load().more["put_back"] > 0
    model = lively("qwen3")
    assert [ids(tokens) for tokens in got] == [by_generate(model, prompt, 60) for prompt in asks]
    assert engine.load().cache_used == 0.0
    engine.close()


def test_an_error_of_the_thread_ends_all(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def during() -> None:
        streams = [engine.submit(asked([1, 2, 3], 400)) for _ in range(3)]
        await streams[0].__anext__()
        monkeypatch.setattr(engine._compute, "_call", lambda step: 1 / 0)
        for stream in streams:
            with pytest.raises(EngineGone, match="ZeroDivisionError: division by zero"):
                async for _ in stream:
                    pass
        with pytest.raises(EngineGone, match="ZeroDivisionError"):
            engine.submit(asked([1]))

    asyncio.run(asyncio.wait_for(during(), 30))
    assert "ZeroDivisionError" in engine.load().more["gone"]


def test_memory_that_runs_out_means_fewer_at_a_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    call = engine._compute._call

    def little(step: Any) -> Any:
        if step.singles > 2:
            raise MemoryError("of three")
        return call(step)

    monkeypatch.setattr(engine._compute, "_call", little)
    asks = prompts(engine._compute.vocabulary, (9, 12, 7, 5))
    got = together(engine, [asked(prompt, 8) for prompt in asks])
    model = lively("qwen3")
    assert [ids(tokens) for tokens in got] == [by_generate(model, prompt, 8) for prompt in asks]


def test_closing_tells_those_who_wait(engine: Engine) -> None:
    async def during() -> None:
        stream = engine.submit(asked([1, 2, 3], 400))
        await stream.__anext__()
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineGone, match="closed"):
            async for _ in stream:
                pass

    asyncio.run(during())
    assert not engine._thread.is_alive()


def test_a_model_without_numbers_says_so() -> None:
    model = lively("qwen3")
    engine = from_model(model, CPU, limits=LIMITS)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EngineGone, match="NaN"):
        together(engine, [asked([1, 2, 3])])
    engine.close()


def crowd(count: int, most: int, seed: int) -> None:
    """Random prompts, joining at random, some leaving early: who stays gets what they get alone."""
    chance = random.Random(seed)
    engine, model = engine_of("qwen3"), lively("qwen3")
    asks = prompts(engine._compute.vocabulary, [chance.randint(1, 200) for _ in range(count)], seed)
    lengths = [chance.randint(1, most) for _ in asks]
    stays = [chance.random() < 0.7 for _ in asks]

    async def one(number: int) -> list[int]:
        await asyncio.sleep(chance.random() * 0.5)
        got: list[int] = []
        stream = engine.submit(asked(asks[number], lengths[number]))
        async for token in stream:
            got.append(token.id)
            if not stays[number] and len(got) >= lengths[number] // 2:
                await stream.aclose()
        return got

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*map(one, range(count)))

    answers = asyncio.run(asyncio.wait_for(all_of_them(), 250))
    until_idle(engine)
    assert engine.load().cache_used == 0.0
    engine.close()
    for number, got in enumerate(answers):
        wanted = by_generate(model, asks[number], lengths[number])
        assert got == (wanted if stays[number] else wanted[: len(got)])
        assert stays[number] or len(got) >= lengths[number] // 2


def test_a_small_crowd() -> None:
    crowd(12, 20, seed=1)


@pytest.mark.long
def test_a_crowd() -> None:
    crowd(64, 80, seed=2)


@pytest.mark.long
def test_memory_stays_flat(engine: Engine) -> None:
    process = psutil.Process()

    def some(number: int) -> None:
        asks = prompts(engine._compute.vocabulary, [20 + i % 50 for i in range(number)])
        for start in range(0, number, 50):
            together(engine, [asked(prompt, 8, top_logprobs=2) for prompt in asks[start : start + 50]])

    some(300)
    before = process.memory_info().rss
    some(1500)
    assert process.memory_info().rss - before < 8 << 20


def test_answers_come_one_at_a_time(engine: Engine) -> None:
    """A long prompt that joins does not hold up who is being answered: each step takes a share of it."""
    long = prompts(engine._compute.vocabulary, (480,))[0]

    async def during() -> tuple[int, int]:
        first = engine.submit(asked([1, 2, 3], 300))
        await first.__anext__()
        before = engine.load().more["steps"]
        joined = asyncio.create_task(answer(engine, asked(long, 1)))
        count = 0
        while not joined.done():
            await first.__anext__()
            count += 1
        await first.aclose()
        await joined
        return count, engine.load().more["steps"] - before

    count, _ = asyncio.run(during())
    assert count >= 480 // LIMITS.chunk - 2
