"""A GGUF file as llama.cpp reads it, through llama-cpp-python, on the CPU."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunedock.errors import ModelError
from tunedock.export.expected import TOKENS, Answer, most_likely
from tunedock.export.gguf.quantise import llama_cpp
from tunedock.export.probes import Talk
from tunedock.export.readers import rendered

CONTEXT = 2048
"""Tokens of the longest text it is asked about."""
TEMPLATE = "tokenizer.chat_template"


class LlamaReader:
    def __init__(self, path: Path) -> None:
        """Raises ModelError where llama.cpp does not load the file, DependencyError without it."""
        self._package = llama_cpp()
        began = time.monotonic()
        try:
            self._llama = self._package.Llama(
                str(path), n_ctx=CONTEXT, n_batch=CONTEXT, logits_all=True, verbose=False, n_gpu_layers=0
            )
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"llama.cpp does not load it: {error}", where=str(path)) from error
        self.load_s = time.monotonic() - began

    def tokens(self, text: str) -> list[int]:
        found: list[int] = self._llama.tokenize(text.encode(), add_bos=False, special=True)
        return found

    def prompt(self, talk: Talk, *, thinking: bool) -> list[int]:
        metadata = self._llama.metadata
        special = {
            f"{name}_token": self._piece(int(metadata[f"tokenizer.ggml.{name}_token_id"]))
            for name in ("bos", "eos")
            if f"tokenizer.ggml.{name}_token_id" in metadata
        }
        return self.tokens(rendered(metadata.get(TEMPLATE, ""), talk, special, thinking=thinking))

    def _piece(self, token: int) -> str:
        return bytes(self._llama.detokenize([token], special=True)).decode("utf-8", errors="replace")

    def answer(self, prompt: Sequence[int], stops: Collection[int]) -> Answer:
        tokens: list[int] = []
        gaps: list[float] = []
        self._llama.reset()
        self._llama.eval(list(prompt))
        while True:
            token, gap = most_likely(self._llama.scores[self._llama.n_tokens - 1])
            tokens.append(token)
            gaps.append(gap)
            if token in stops or len(tokens) == TOKENS:
                return Answer(list(prompt), tokens, gaps)
            self._llama.eval([token])

    def nll(self, ids: Sequence[int]) -> NDArray[np.float64]:
        self._llama.reset()
        self._llama.eval(list(ids))
        logits_TV = np.asarray(self._llama.scores[: len(ids) - 1], dtype=np.float64)
        highest_T1 = logits_TV.max(-1, keepdims=True)
        normaliser_T = np.log(np.exp(logits_TV - highest_T1).sum(-1)) + highest_T1[:, 0]
        chosen_T: NDArray[np.float64] = logits_TV[np.arange(len(ids) - 1), list(ids[1:])]
        nll_T: NDArray[np.float64] = normaliser_T - chosen_T
        return nll_T

    def ends(self) -> set[int]:
        words = self._llama._model.vocab
        return {i for i in range(self._llama.n_vocab()) if self._package.llama_vocab_is_eog(words, i)}

    def close(self) -> None:
        self._llama.close()
