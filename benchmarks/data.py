"""The rows: chats of lognormal length and preference pairs, from a fixed seed, as a file for each side.

sft  a prompt and an answer; in batches of four, 38 % of the slots are padding; 29.5 % of the tokens carry loss
dpo  a prompt of about 300 tokens and two answers of about 60

tunedock draws an epoch's order from the seed. The other files stand in that order and are read without shuffling, so that every
side's step n trains on the same rows. `facts.json` holds each row's tokens, counted with the model's tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.models import END, PAD, START
from benchmarks.peers import ROOT
from benchmarks.protocol import ObjectiveName
from benchmarks.words import Words

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MADE = ROOT / "benchmarks" / ".work" / "data"
DATA_SEED = 7
MAX_LENGTH = 1024
SFT_MEDIAN, SFT_SIGMA = 340.0, 0.56
ANSWER_SHARE = 0.292
PROMPT_MEDIAN, PROMPT_SIGMA = 285.0, 0.35
ANSWER_MEDIAN, ANSWER_SIGMA = 56.0, 0.35


@dataclass(frozen=True, slots=True)
class Example:
    """One answer (sft), or the preferred one first (dpo)."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a data set. Rows in the order they are trained on."""

    objective: ObjectiveName
    pad_id: int
    tokens: list[int]
    """Of a row's paths, prompt and answer together; two of them in a pair."""
    trained: list[int]
    lengths: list[list[int]]
    """Tokens of each path."""


def ensure(objective: ObjectiveName, rows: int, tokenizer: Tokenizer, *, seed: int) -> Path:
    """The data set's folder, made first where it is missing. `seed` is the training's, which decides the order."""
    folder = MADE / f"{objective}-{rows}-{seed}"
    if not (folder / "facts.json").is_file():
        from tunedock.data.layout import epoch_order

        folder.mkdir(parents=True, exist_ok=True)
        examples = make(objective, rows, tokenizer)
        trained_on = [examples[i] for i in epoch_order(rows, seed=seed, epoch=0)]
        _write(folder / "tunedock.jsonl", (_messages(objective, example) for example in examples))
        _write(folder / "ordered.jsonl", (_messages(objective, example) for example in trained_on))
        _write(folder / "completions.jsonl", (_completions(objective, example) for example in trained_on))
        _write(folder / "sharegpt.jsonl", (_sharegpt(objective, example) for example in trained_on))
        (folder / "dataset_info.json").write_text(json.dumps(_registration(objective)), encoding="utf-8")
        facts = count(objective, trained_on, tokenizer)
        (folder / "facts.json").write_text(
            json.dumps(asdict(facts)), encoding="utf-8"
        )  # last: it says that all is there
    return folder


def tokenizer_of(model: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Tokens

    return Tokens.from_file(str(model / "tokenizer.json"))


def read_facts(folder: Path) -> Facts:
    return Facts(**json.loads((folder / "facts.json").read_text(encoding="utf-8")))


def make(objective: ObjectiveName, rows: int, tokenizer: Tokenizer) -> list[Example]:
    """The rows, in the order of the file."""
    draw = np.random.Generator(np.random.Philox(key=[DATA_SEED, int(objective == "dpo")]))
    text = _Text(tokenizer)
    frame = len(tokenizer.encode(render("", "")).ids)
    if objective == "sft":
        totals = lognormal(draw, rows, SFT_MEDIAN, SFT_SIGMA, 64, MAX_LENGTH)
        shares = np.clip(draw.normal(ANSWER_SHARE, 0.08, rows), 0.1, 0.6)
        answers = np.maximum((totals * shares).astype(np.int64) - 1, 8)  # the stop carries loss too
        return [
            Example(text.of(int(total - frame - answer)), (text.of(int(answer)),))
            for total, answer in zip(totals, answers, strict=True)
        ]
    prompts = lognormal(draw, rows, PROMPT_MEDIAN, PROMPT_SIGMA, 64, MAX_LENGTH - 256)
    answers = lognormal(draw, 2 * rows, ANSWER_MEDIAN, ANSWER_SIGMA, 16, 200)
    return [
        Example(text.of(int(prompt)), (text.of(int(first)), text.of(int(second))))
        for prompt, first, second in zip(prompts, answers[::2], answers[1::2], strict=True)
    ]


def lognormal(
    draw: np.random.Generator, count: int, median: float, sigma: float, least: int, most: int
) -> NDArray[np.int64]:
    return np.clip(draw.lognormal(np.log(median), sigma, count).astype(np.int64), least, most)


def padding_share(lengths: Sequence[int], batch_size: int) -> float:
    """Share of padding among the slots when rows are batched in order, each batch as wide as its longest row."""
    slots = sum(
        len(batch) * max(batch)
        for batch in (lengths[at : at + batch_size] for at in range(0, len(lengths), batch_size))
    )
    return 1.0 - sum(lengths) / slots


def render(prompt: str, answer: str) -> str:
    """What the chat template makes of a prompt and its answer."""
    return f"{START}user\n{prompt}{END}{START}assistant\n{answer}{END}"


def count(objective: ObjectiveName, examples: Sequence[Example], tokenizer: Tokenizer) -> Facts:
    lengths, trained = [], []
    for example in examples:
        lengths.append([len(tokenizer.encode(render(example.prompt, answer)).ids) for answer in example.answers])
        trained.append(sum(len(tokenizer.encode(answer + END).ids) for answer in example.answers))
    (pad_id,) = tokenizer.encode(PAD).ids
    return Facts(objective, pad_id, [sum(row) for row in lengths], trained, lengths)


class _Text:
    """Text of a given number of tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._words = Words(DATA_SEED)
        lexicon = [str(word) for word in self._words.lexicon]
        self._cost = {
            word: len(encoded.ids)
            for word, encoded in zip(lexicon, tokenizer.encode_batch([f" {word}" for word in lexicon]), strict=True)
        }
        opens = tokenizer.encode_batch(lexicon)
        self._short = [
            word for word, alone in zip(lexicon, opens, strict=True) if len(alone.ids) == 1 == self._cost[word]
        ]

    def of(self, tokens: int) -> str:
        """Words of `tokens` tokens together. The first is a token by itself with or without the space before it."""
        drawn = self._words.draw(tokens)
        words = [self._short[len(drawn[0]) % len(self._short)]] if tokens else []
        left = tokens - 1
        for number, word in enumerate(drawn):
            if left <= 0:
                break
            chosen = word if self._cost[word] <= left else self._short[number % len(self._short)]
            words.append(chosen)
            left -= self._cost[chosen]
        return " ".join(words)


def _messages(objective: ObjectiveName, example: Example) -> dict[str, Any]:
    asked = {"role": "user", "content": example.prompt}
    answers = [{"role": "assistant", "content": answer} for answer in example.answers]
    if objective == "sft":
        return {"messages": [asked, answers[0]]}
    return {"prompt": [asked], "chosen": [answers[0]], "rejected": [answers[1]]}


def _completions(objective: ObjectiveName, example: Example) -> dict[str, Any]:
    """TRL's conversational rows: prompt and completion, or prompt, chosen and rejected."""
    row = _messages(objective, example)
    return {"prompt": row["messages"][:1], "completion": row["messages"][1:]} if objective == "sft" else row


def _sharegpt(objective: ObjectiveName, example: Example) -> dict[str, Any]:
    asked = {"from": "human", "value": example.prompt}
    answers = [{"from": "gpt", "value": answer} for answer in example.answers]
    if objective == "sft":
        return {"conversations": [asked, answers[0]]}
    return {"conversations": [asked], "chosen": answers[0], "rejected": answers[1]}


def _registration(objective: ObjectiveName) -> dict[str, Any]:
    """LLaMA-Factory's `dataset_info.json`."""
    columns = {"messages": "conversations"}
    if objective == "dpo":
        columns |= {"chosen": "chosen", "rejected": "rejected"}
    entry = {"file_name": "sharegpt.jsonl", "formatting": "sharegpt", "ranking": objective == "dpo", "columns": columns}
    return {"bench": entry}


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
