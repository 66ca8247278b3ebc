"""The engine of this process: many requests at once on one model, joining and leaving between any two tokens.

One thread computes. It asks the schedule what the next step is, computes it in one call of the model, draws each row's token and
hands the tokens over to the event loops that asked. Whoever asks never waits for a step: `submit` lines a request up.

What a request is given is what it would be given alone (float32: to rounding; in fewer bits a tie may fall otherwise, as it does
between any two batch sizes). Tests hold that against `generate`, one by one, for several families.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from tunedock.serve.engines.generator import Asked, EngineGone, Load, Token
from tunedock.serve.engines.schedule import Row, Schedule, Work
from tunedock.serve.engines.steps import PAGE, Adapter, Compute, Drawer, Drawn
from tunedock.serve.engines.streams import Outlet, Parcel, Stream, deliver

CHUNK, GPU_CHUNK = 256, 2048

CLOSE_S = 30.0
"""How long `close` waits for the step under way."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine takes on."""

    running: int = 64
    """Requests answered at once."""
    waiting: int = 256
    """Requests that wait for one of those to end; one more is refused (`Overloaded`)."""
    chunk: int | None = None
    """Tokens of prompts computed in a step: what joins stalls the answers under way for so long and no longer. None for 256 on
    a CPU and 2048 on a GPU."""
    longest: int | None = None
    """Tokens of a prompt with its answer; None for what the model can take."""
    cache_bytes: int | None = None
    """For keys and values; None for half of what is free."""

    def at_most(self, *, running: int) -> Self:
        return replace(self, running=min(running, self.running))


@dataclass(eq=False, slots=True)
class _Request(Row):
    asked: Asked = field(kw_only=True)
    lora: Adapter | None = field(kw_only=True)
    drawer: Drawer = field(kw_only=True)
    outlet: Outlet = field(kw_only=True)
    came: float = field(kw_only=True, default_factory=time.monotonic)
    queued_s: float | None = field(kw_only=True, default=None)
    """Until its first step; None before it."""

    @property
    def order(self) -> int:
        """Requests of one adapter stand side by side."""
        return 0 if self.lora is None else id(self.lora)


@dataclass(slots=True)
class _Counts:
    prompt_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    computing_s: float = 0.0


class Engine:
    """A `Generator` (`engines.generator`) on anything that computes steps."""

    def __init__(
        self, compute: Compute[Any, Any], *, longest: int, pages: int, limits: Limits, page: int = PAGE
    ) -> None:
        """`pages` of keys and values, of `page` tokens each."""
        self._compute = compute
        self._schedule = Schedule(
            pages=pages,
            page=page,
            running=limits.running,
            waiting=limits.waiting,
            chunk=longest if compute.whole_prompts else limits.chunk or CHUNK,
            whole=compute.whole_prompts,
        )
        self.longest = min(longest, self._schedule.most_tokens)
        self.notes = list(compute.notes)
        """What a user should know of how this model is served, a sentence each."""
        self._lock = threading.Lock()
        """Around the schedule and the names of adapters."""
        self._adapters: dict[str, Adapter] = {}
        self._counts = _Counts()
        self._gone: str | None = None
        self._called: queue.SimpleQueue[None] = queue.SimpleQueue()  # may be put to by the garbage collector
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- asked by the event loop ---------------------------------------------------------------------------------------

    def submit(self, asked: Asked) -> Stream:
        """As `Generator.submit`."""
        self._require_fitting(asked)
        with self._lock:
            if self._gone is not None:
                raise EngineGone(self._gone)
            lora = None if asked.adapter is None else self._named(asked.adapter)
            request = _Request(
                tokens=list(asked.prompt),
                longest=len(asked.prompt) + asked.max_tokens,
                asked=asked,
                lora=lora,
                drawer=Drawer(asked.sampling, asked.prompt),
                outlet=Outlet(),
            )
            self._schedule.sweep()  # who has left makes room
            self._schedule.add(request)
        self._called.put(None)
        return self._stream_of(request)

    def _stream_of(self, request: _Request) -> Stream:
        called = self._called

        def forgotten() -> None:
            request.cancelled = True
            called.put(None)

        return Stream(request.outlet, forgotten)

    def _require_fitting(self, asked: Asked) -> None:
        if not asked.prompt:
            raise ValueError("the prompt has no tokens")
        if asked.max_tokens < 1:
            raise ValueError("`max_tokens` is at least 1")
        if len(asked.prompt) + asked.max_tokens > self.longest:
            raise ValueError(
                f"the prompt has {len(asked.prompt)} tokens and the answer may have {asked.max_tokens}; "
                f"{self.longest} fit together"
            )
        bad = next((token for token in asked.prompt if not 0 <= token < self._compute.vocabulary), None)
        if bad is not None:
            raise ValueError(f"the prompt has a token {bad}, and the vocabulary {self._compute.vocabulary}")

    def _named(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise ValueError(f"there is no adapter {name!r}")
        return self._adapters[name]

    def adapters(self) -> list[str]:
        with self._lock:
            return sorted(self._adapters)

    def load_adapter(self, name: str, folder: str) -> None:
        """As `Generator.load_adapter`."""
        read: Adapter = self._compute.read_adapter(name, Path(folder))
        with self._lock:
            self._adapters[name] = read

    def drop_adapter(self, name: str) -> None:
        with self._lock:
            self._named(name)
            del self._adapters[name]

    def load(self) -> Load:
        with self._lock:
            schedule, counts = self._schedule, self._counts
            used = 1.0 - schedule.free_pages / schedule.pages
            more = {
                "prompt_tokens": counts.prompt_tokens,
                "answer_tokens": counts.answer_tokens,
                "steps": counts.steps,
                "computing_s": round(counts.computing_s, 3),
                "put_back": schedule.put_back,
                "cache_tokens": schedule.most_tokens,
                "gone": self._gone,
            }
            return Load(len(schedule.running), len(schedule.waiting), used, more)

    def close(self) -> None:
        self._end("the engine was closed")
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_S)
            if not self._thread.is_alive():
                self._compute.close()

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with self._compute.computing():
                while self._turn():
                    pass
        except BaseException as error:
            # Policy: whatever ends the thread ends all that wait for it, with the reason.
            self._end(f"{type(error).__name__}: {(str(error).strip().splitlines() or ['?'])[0]}")
            if not isinstance(error, Exception):
                raise

    def _turn(self) -> bool:
        """One step, or a wait for something to do. False when the engine has ended."""
        with self._lock:
            if self._gone is not None:
                return False
            self._schedule.sweep()
            works = self._schedule.plan()
            left = self._schedule.left_slots()
        if left:
            self._compute.leave(left)
        if not works:
            self._called.get()
        self._forget_calls()
        if works:
            works.sort(key=_order)
            self._step(works)
        return True

    def _forget_calls(self) -> None:
        try:
            while True:
                self._called.get_nowait()
        except queue.Empty:
            pass

    def _step(self, works: Sequence[Work]) -> None:
        began = time.monotonic()
        requests = [_request(work) for work in works]
        for request in requests:
            if request.queued_s is None:
                request.queued_s = began - request.came
        try:
            logits_RV: Any = self._compute.step(works, [request.lora for request in requests])
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not self._compute.ran_out(error):
                raise
            logits_RV = None
        if logits_RV is None:
            self._shrink()
            return
        drawing = [request for work, request in zip(works, requests, strict=True) if work.draws]
        drawn = self._compute.draw(
            logits_RV, [request.drawer for request in drawing], [request.asked.top_logprobs for request in drawing]
        )
        with self._lock:
            for work in works:
                if work.row.slot is not None:
                    work.row.computed = work.stop
            parcels = [self._take(request, token) for request, token in zip(drawing, drawn, strict=True)]
            self._counts.steps += 1
            self._counts.answer_tokens += len(drawing)
            self._counts.prompt_tokens += sum(work.stop - work.start for work in works) - len(drawing)
            self._counts.computing_s += time.monotonic() - began
        deliver(parcels)
        for request in drawing:
            request.cancelled |= request.outlet.lost

    def _take(self, request: _Request, drawn: Drawn | None) -> Parcel:
        """A row's token; the last one ends it."""
        asked = request.asked
        if drawn is None:
            self._schedule.remove(request)
            return request.outlet, EngineGone("the model gave no numbers (NaN) for this request")
        request.tokens.append(drawn.id)
        if self._compute.turn is not None and len(request.tokens) == self._compute.turn + 1:
            request.computed = 0
        finish = None
        if drawn.id in asked.stop_ids:
            finish = "stop"
        elif len(request.tokens) == request.longest:
            finish = "length"
        if finish is not None:
            self._schedule.remove(request)
        queued_s = request.queued_s if len(request.tokens) == len(asked.prompt) + 1 else None
        return request.outlet, Token(drawn.id, drawn.logprob, drawn.alternatives, finish, queued_s)  # type: ignore[arg-type]

    def _shrink(self) -> None:
        """After memory ran out: fewer rows at a time, and the step again."""
        self._compute.give_back()
        with self._lock:
            if not self._schedule.shrink():
                raise MemoryError("memory ran out for one request alone")

    def _end(self, reason: str) -> None:
        """All that wait are told; later requests are refused."""
        with self._lock:
            self._gone = self._gone or reason
            rows = [row for row in self._schedule.all_rows() if isinstance(row, _Request)]
            for row in rows:
                self._schedule.remove(row)
        deliver((row.outlet, EngineGone(self._gone)) for row in rows)
        self._called.put(None)


def _request(work: Work) -> _Request:
    assert isinstance(work.row, _Request)  # noqa: S101 - no others are ever added
    return work.row


def _order(work: Work) -> int:
    return _request(work).order
