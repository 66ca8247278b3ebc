"""A tokenizer -> the vocabulary in a GGUF file, from which llama.cpp makes a tokenizer of its own.

llama.cpp has two that concern us. `gpt2`: text is cut by a regular expression that is named, not carried, then merged pair by
pair (Qwen, Llama 3). `llama`: no cutting, the pair that makes the piece with the best score is merged first, and what is left
becomes bytes (Llama 2, Gemma, Mistral); its scores are made of the merges' order. A tokenizer whose expression or normalisation
llama.cpp has no name for is refused: the file would load and read texts otherwise. Whether what was written reads texts as ours
does is tried with llama.cpp itself (`export.verify`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import gguf
from transformers import PreTrainedTokenizerBase

from tunedock.errors import ModelError
from tunedock.export.gguf.shape import HINT

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    gguf.TokenType.NORMAL, gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED,
    gguf.TokenType.BYTE,
)  # fmt: skip

_GPT2 = "gpt-2"
_DIGITS = r"\p{N}"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    model: Literal["gpt2", "llama"]
    pre: str
    """llama.cpp's name of the expression that cuts texts."""
    tokens: list[str]
    """By id."""
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    ids: dict[str, int]
    """`bos`, `eos`, `unk`, `pad`, `eot`, `eom`, as far as there are any."""
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None
    notes: list[str] = field(default_factory=list)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int, stop_ids: Collection[int]) -> Vocabulary:
    """`size`: rows of the embedding; ids beyond the tokenizer's are filled. `stop_ids`: the tokens that end an answer.

    Raises ModelError for a tokenizer that llama.cpp cannot be.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("the tokenizer is not one of the `tokenizers` library", "save it as a fast tokenizer")
    told = json.loads(backend.to_str())
    model: Mapping[str, Any] = told["model"]
    if model["type"] != "BPE":
        raise _refused(f"the tokenizer's model is `{model['type']}`, and llama.cpp's are made of merges")
    spaces = _spaces(told)
    pre = "default" if spaces is not None else _cut_by(told)
    notes = _normalised(told, spaces is not None)
    tokens, types = _tokens(told, size, bytes_=spaces is not None)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    ends = _ends(tokenizer, stop_ids)
    return Vocabulary(
        model="gpt2" if spaces is None else "llama",
        pre=pre,
        tokens=tokens,
        types=[int(kind) for kind in types],
        scores=None if spaces is None else _scores(tokens, types, model["merges"]),
        merges=merges if spaces is None else None,
        ids={**_special(tokenizer), **ends},
        add_bos=adds_bos(tokenizer),
        add_eos=tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id],
        add_space_prefix=bool(spaces),
        chat_template=_template(tokenizer),
        notes=notes,
    )


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it puts a BOS before a text by itself, as llama.cpp then will."""
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _refused(what: str, hint: str = HINT) -> ModelError:
    return ModelError(f"{what}: it cannot be written as GGUF", where="tokenizer.json", hint=hint)


@cache
def _splits() -> dict[str, str]:
    """Regular expression -> llama.cpp's name."""
    text = (files("tunedock.export.gguf") / "splits.json").read_text(encoding="utf-8")
    return {expression: name for name, known in json.loads(text).items() for expression in known}


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences laid flat."""
    if part is None:
        return []
    return [step for one in part[inner] for step in _steps(one, inner)] if part["type"] == "Sequence" else [part]


def _spaces(told: Mapping[str, Any]) -> bool | None:
    """Of a tokenizer of SentencePiece's kind (spaces are `▁`, unknown characters bytes): whether a text gets one before it.
    None for any other kind."""
    if not told["model"].get("byte_fallback"):
        return None
    normal, cut = _steps(told["normalizer"], "normalizers"), _steps(told["pre_tokenizer"], "pretokenizers")
    prefixed = any(step["type"] == "Prepend" for step in normal)
    for step in cut:
        if step["type"] == "Metaspace":
            return bool(step.get("prepend_scheme", "always") != "never")
    if not any(step["type"] == "Replace" and step["content"] == "▁" for step in normal):
        raise _refused("it falls back to bytes, and does not write spaces as `▁`")
    return prefixed


def _cut_by(told: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts texts. Raises ModelError where it has none."""
    cut = _steps(told["pre_tokenizer"], "pretokenizers")
    if not cut or cut[-1]["type"] != "ByteLevel" or cut[-1].get("add_prefix_space"):
        raise _refused("it is neither a byte-level tokenizer nor one of SentencePiece's kind")
    if cut[-1].get("use_regex", True):
        kinds = [step["type"] for step in cut[:-1]]
        if not kinds:
            return _GPT2
        if kinds == ["Digits"] and cut[0].get("individual_digits"):
            return "smollm"
        raise _refused(f"it cuts texts by {', '.join(kinds)} before the usual expression")
    expressions = [str(step["pattern"].get("Regex")) for step in cut[:-1] if step["type"] == "Split"]
    if len(expressions) != len(cut) - 1 or len(expressions) != 1 or expressions[0] not in _splits():
        raise _refused(f"it cuts texts by {'; '.join(expressions)[:300] or 'nothing'}, for which llama.cpp has no name")
    return _splits()[expressions[0]]


def _normalised(told: Mapping[str, Any], spaces: bool) -> list[str]:
    """Notes on what is done to texts first. Raises ModelError for what llama.cpp cannot do."""
    notes = []
    for step in _steps(told["normalizer"], "normalizers"):
        if spaces and step["type"] in ("Prepend", "Replace"):
            continue
        if step["type"] == "NFC":
            notes.append("texts are not normalised (NFC) by llama.cpp: an é of two characters stays two characters")
            continue
        raise _refused(f"it normalises texts by {step['type']}, which llama.cpp does not")
    return notes


def _tokens(told: Mapping[str, Any], size: int, *, bytes_: bool) -> tuple[list[str], list[gguf.TokenType]]:
    """Texts and kinds by id; places without a token are filled with unused ones."""
    texts: list[str | None] = [None] * size
    kinds = [UNUSED] * size
    unknown = told["model"].get("unk_token")
    for text, index in told["model"]["vocab"].items():
        if index >= size:
            raise _refused(
                f"token {index} has no row in the embedding, which has {size}", "the files do not fit together"
            )
        texts[index], kinds[index] = text, UNKNOWN if text == unknown else BYTE if bytes_ and _is_byte(text) else NORMAL
    for added in told["added_tokens"]:
        index = added["id"]
        if index >= size:
            raise _refused(
                f"token {index} has no row in the embedding, which has {size}", "the files do not fit together"
            )
        if kinds[index] is not UNKNOWN:
            kinds[index] = CONTROL if added["special"] else USER_DEFINED
        texts[index] = added["content"]
    return [text if text is not None else f"[PAD{i}]" for i, text in enumerate(texts)], kinds


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _scores(tokens: Sequence[str], types: Sequence[gguf.TokenType], merges: Sequence[Any]) -> list[float]:
    """The earlier a merge that makes a piece, the better; what no merge makes is found as it is, or not at all."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        rank.setdefault(left + right, number)
    last = -float(len(merges)) - 1.0
    return [
        -float(rank[text]) if kind is NORMAL and text in rank else last if kind is NORMAL else 0.0
        for text, kind in zip(tokens, types, strict=True)
    ]


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    named = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id}
    named["pad"] = tokenizer.pad_token_id
    return {name: int(index) for name, index in named.items() if index is not None}


def _ends(tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> dict[str, int]:
    """Tokens that end an answer, beside EOS. GGUF has two more names for them; llama.cpp knows further ones by their texts."""
    others = [index for index in stop_ids if index != tokenizer.eos_token_id]
    return dict(zip(("eot", "eom"), others, strict=False))


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found
