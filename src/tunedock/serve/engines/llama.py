"""llama.cpp as what an engine computes with: a GGUF file, many rows in one batch of its own.

The rows of a step are sequences of one context, which share its cells for keys and values; drawing, the schedule and the streams
are those of `engines.batching`. llama.cpp adds an adapter to a whole batch, so a step's rows are computed adapter by adapter.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from tunedock.errors import ModelError
from tunedock.export.gguf.quantise import llama_cpp
from tunedock.plan import control_group
from tunedock.serve.engines.batching import CHUNK, Engine, Limits
from tunedock.serve.engines.drawing_numpy import Floats, draw
from tunedock.serve.engines.schedule import Work
from tunedock.serve.engines.steps import PAGE, Drawer, Drawn

SHARE = 0.5
"""Of the memory that is free once the weights are loaded, for keys and values."""


@dataclass(frozen=True, slots=True, eq=False)
class LlamaLora:
    name: str
    handle: Any
    """llama.cpp's own; it is freed with the model."""


_ERROR = 4
_errors: deque[str] = deque(maxlen=3)
"""What llama.cpp has said last of errors; it has one listener for the whole process, and calls it from any thread."""
_listener: list[Any] = []


def _listen(package: Any) -> None:
    """Keeps what llama.cpp says of errors, and the rest of it (a line a tensor, two a step) from standard error."""
    if not _listener:

        def hear(level: int, text: bytes, _: Any) -> None:
            if level == _ERROR:
                _errors.append(text.decode("utf-8", errors="replace").strip())

        _listener.append(package.llama_log_callback(hear))  # kept: llama.cpp only has its address
    package.llama_log_set(_listener[0], ctypes.c_void_p(0))


def _said() -> str:
    said = "; ".join(_errors) or "it says no reason"
    _errors.clear()
    return said


class LlamaCompute:
    """`engines.steps.Compute` on llama.cpp."""

    whole_prompts = False

    def __init__(self, path: Path, limits: Limits, *, longest: int | None, float32_cache: bool) -> None:
        """Raises ModelError where llama.cpp does not load the file, DependencyError without it."""
        self._package = package = llama_cpp()
        _listen(package)
        package.llama_backend_init()
        self.notes: list[str] = []
        self.turn: int | None = None
        self._path = path
        self._using = threading.Lock()
        """Around the model: adapters are read beside the steps."""
        settings = package.llama_model_default_params()
        self._model = package.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise ModelError(f"llama.cpp does not load it: {_said()}", where=str(path), hint="is it a whole GGUF file?")
        self._context: Any = None
        self.vocabulary = int(package.llama_vocab_n_tokens(package.llama_model_get_vocab(self._model)))
        trained = int(package.llama_model_n_ctx_train(self._model))
        self.longest = min(trained, longest or trained)
        self.running = min(limits.running, int(package.llama_max_parallel_sequences()))
        self._batch_size = (limits.chunk or CHUNK) + self.running
        self._float32 = float32_cache
        self.bytes_per_token = self._bytes_per_token()
        self._batch = package.llama_batch_init(self._batch_size, 0, 1)

    def _bytes_per_token(self) -> int:
        """Of keys and values: as many as all key heads have, which no layer exceeds."""
        package, model = self._package, self._model
        heads, key_heads = package.llama_model_n_head(model), package.llama_model_n_head_kv(model)
        width = package.llama_model_n_embd(model) // max(1, heads) * key_heads
        stated = self._stated("attention.key_length")
        if stated is not None:
            width = stated * key_heads
        return int(2 * width * package.llama_model_n_layer(model) * (4 if self._float32 else 2))

    def _stated(self, key: str) -> int | None:
        """A number of the file's metadata, by the key's end."""
        package, model = self._package, self._model
        room = ctypes.create_string_buffer(256)
        if package.llama_model_meta_val_str(model, b"general.architecture", room, 256) < 0:
            return None
        name = room.value + b"." + key.encode()
        return int(room.value) if package.llama_model_meta_val_str(model, name, room, 256) >= 0 else None

    def reserve(self, pages: int, page: int) -> None:
        package = self._package
        settings = package.llama_context_default_params()
        settings.n_ctx = pages * page
        settings.n_batch = self._batch_size
        settings.n_ubatch = min(512, self._batch_size)
        settings.n_seq_max = self.running
        settings.kv_unified = True  # one row may have all cells, where it runs alone
        settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
        settings.no_perf = True
        if self._float32:
            settings.type_k = settings.type_v = package.GGML_TYPE_F32
            settings.flash_attn_type = package.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16 on its way
        self._context = package.llama_init_from_model(self._model, settings)
        if not self._context:
            raise ModelError(f"llama.cpp makes no context for {pages * page} tokens: {_said()}", where=str(self._path))
        self._memory = package.llama_get_memory(self._context)

    def step(self, works: Sequence[Work], loras: Sequence[LlamaLora | None]) -> Floats:
        drawn: list[Floats] = []
        pairs = list(zip(works, loras, strict=True))
        with self._using:
            for _, group in groupby(pairs, key=lambda pair: id(pair[1])):
                some = list(group)
                self._set_lora(some[0][1])
                drawn += self._decode([work for work, _ in some])
        return np.stack(drawn) if drawn else np.empty((0, self.vocabulary), dtype=np.float32)

    def computing(self) -> AbstractContextManager[object]:
        return nullcontext()

    def draw(self, logits_RV: Floats, drawers: Sequence[Drawer], told: Sequence[int | None]) -> list[Drawn | None]:
        return draw(logits_RV, drawers, told)

    def ran_out(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError)

    def give_back(self) -> None:
        """llama.cpp keeps nothing."""

    def _set_lora(self, lora: LlamaLora | None) -> None:
        package = self._package
        number = 0 if lora is None else 1
        handles = (package.llama_adapter_lora_p_ctypes * 1)(*([lora.handle] if lora else []))
        scales = (ctypes.c_float * 1)(1.0)
        if package.llama_set_adapters_lora(self._context, handles, number, scales) != 0:
            raise RuntimeError(f"llama.cpp does not take the adapter {lora.name if lora else None}")

    def _decode(self, works: Sequence[Work]) -> Iterator[Floats]:
        """Logits [V] of the works that draw."""
        batch, package = self._batch, self._package
        at, draws = 0, []
        for work in works:
            if work.start == 0:  # a row that was put back begins again
                package.llama_memory_seq_rm(self._memory, work.row.slot, -1, -1)
            for place in range(work.start, work.stop):
                last = work.draws and place == work.stop - 1
                batch.token[at] = work.row.tokens[place]
                batch.pos[at] = place
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = work.row.slot
                batch.logits[at] = last
                draws += [at] if last else []
                at += 1
        batch.n_tokens = at
        came_to = package.llama_decode(self._context, batch)
        if came_to == 1:
            raise MemoryError("llama.cpp has no cells left for keys and values")
        if came_to != 0:
            raise RuntimeError(f"llama_decode ended with {came_to}: {_said()}")
        for place in draws:
            found = package.llama_get_logits_ith(self._context, place)
            yield np.ctypeslib.as_array(found, (self.vocabulary,)).copy()

    def leave(self, slots: Sequence[int]) -> None:
        with self._using:
            for slot in slots:
                self._package.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def read_adapter(self, name: str, folder: Path) -> LlamaLora:
        """A LoRA in a GGUF file, as llama.cpp's convert_lora_to_gguf.py writes it."""
        if not folder.is_file():
            raise ModelError(
                "llama.cpp reads adapters from GGUF files",
                where=str(folder),
                hint="convert it (llama.cpp's convert_lora_to_gguf.py), or serve the model merged",
            )
        with self._using:
            handle = self._package.llama_adapter_lora_init(self._model, str(folder).encode())
        if not handle:
            raise ModelError(f"llama.cpp does not take this adapter for this model: {_said()}", where=str(folder))
        return LlamaLora(name, handle)

    def close(self) -> None:
        with self._using:
            package = self._package
            if self._context:
                package.llama_free(self._context)
            if self._model:
                package.llama_batch_free(self._batch)
                package.llama_model_free(self._model)
            self._context = self._model = None


def from_gguf(path: Path, *, limits: Limits | None = None, float32_cache: bool = False) -> Engine:
    """An engine on a GGUF file. Keys and values are held in float16, or with `float32_cache` in float32: then what a row
    gets alone it gets to 3e-6 among others, else to about 1e-2, and of two tokens that are nearly as likely either may be taken."""
    limits = limits or Limits()
    compute = LlamaCompute(path, limits, longest=limits.longest, float32_cache=float32_cache)
    room = limits.cache_bytes
    if room is None:
        room = int(control_group.host_free_bytes(control_group.groups()) * SHARE)
    longest_pages = -(-compute.longest // PAGE)
    # Cells are all taken at once here, so no more than rows of middling length need.
    pages = min(
        room // (PAGE * compute.bytes_per_token), longest_pages * compute.running, max(longest_pages, MOST_PAGES)
    )
    try:
        if pages < 1:
            raise ModelError(
                f"there is no memory for keys and values: a token takes {compute.bytes_per_token:,} bytes, and {room:,} are free",
                where=str(path),
                hint="a smaller model, or another machine",
            )
        compute.reserve(pages, PAGE)
    except BaseException:
        compute.close()
        raise
    return Engine(compute, longest=compute.longest, pages=pages, limits=limits.at_most(running=compute.running))


MOST_PAGES = 2048
"""65,536 tokens, unless one row may be longer: llama.cpp fills the memory for all of them with zeros when it begins."""
