"""The tokenizer of a GGUF file, for the gateway: the one its export left beside it, or one made of the file itself.

Either is held against llama.cpp's own on texts of many scripts before it is used: with another tokenizer a model would be asked
something else than it was trained on.
"""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tunedock.errors import ModelError
from tunedock.export.gguf import TOKENIZER
from tunedock.export.gguf.quantise import llama_cpp
from tunedock.export.probes import TEXTS


def find_file(place: Path) -> Path:
    """The GGUF file of a folder, or the file itself. Raises ModelError where there is not exactly one."""
    if place.is_file():
        return place
    found = sorted(place.glob("*.gguf"))
    if len(found) != 1:
        raise ModelError(f"there are {len(found)} GGUF files here", where=str(place), hint="name the file")
    return found[0]


def tokenizer_of(file: Path) -> PreTrainedTokenizerBase:
    """Raises ModelError where none can be had that reads texts as llama.cpp does, DependencyError without llama-cpp-python."""
    beside = file.parent / TOKENIZER
    if not beside.is_dir() and not _can_be_made():
        raise ModelError(
            "its tokenizer does not lie beside it, and making one of the file needs PyTorch, which is not here",
            where=str(file),
            hint=f"put the folder `{TOKENIZER}` of `tunedock export` (tokenizer.json and what goes with it) beside the file",
        )
    try:
        tokenizer: PreTrainedTokenizerBase = (
            AutoTokenizer.from_pretrained(beside)
            if beside.is_dir()
            else AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        )
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"its tokenizer cannot be read: {first}", where=str(file), hint=_HINT) from error
    _require_same(tokenizer, file)
    return tokenizer


def _can_be_made() -> bool:
    """transformers reads GGUF files with PyTorch only, even for their tokenizer."""
    return find_spec("torch") is not None and find_spec("gguf") is not None


_HINT = "export it by `tunedock export RUN --format gguf`, or run llama.cpp's own server: name=http://host:port/v1"


def _require_same(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    package = llama_cpp()
    try:
        theirs = package.Llama(str(file), vocab_only=True, verbose=False)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"llama.cpp does not load it: {error}", where=str(file)) from error
    with contextlib.closing(theirs):
        for name, text in TEXTS.items():
            ours = tokenizer(text, add_special_tokens=False)["input_ids"]
            if ours != theirs.tokenize(text.encode(), add_bos=False, special=True):
                raise ModelError(
                    f"its tokenizer reads a text ({name}) otherwise than llama.cpp does", where=str(file), hint=_HINT
                )
