"""The demo's untrained base: a byte-level BPE tokenizer made from the corpus, a chat template, a small Qwen3 config.

    python examples/demo/make_tokenizer.py CORPUS.jsonl FOLDER

Two choices matter for so small a model. Numbers are learnt as pairs of digits: single digits repeat too often to tell which
one to copy next, and the thousand groups of three are each too rare to be learnt so soon. And the end of a document is the end of a
turn (`<|im_end|>`), so pretraining teaches the one special token the model must produce.

Once its merges are made, texts are cut as GPT-2 cuts them: llama.cpp knows expressions by name and not by text, and has none for
pairs of digits. Longer numbers are then whatever pairs were merged first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

PAD, TURN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
WORDS = Regex(r"\p{N}{1,2}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
"""By which merges are learnt."""
GPT2 = Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
"""By which texts are cut."""
VOCABULARY = 2176
"""Enough for one token per product and few across two words; more would glue whole clauses together."""
LONGEST_PIECE = 15
"""Bytes of a piece: whole English words, but at most five Chinese characters."""

CONTEXT = 1024

TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def texts(corpus: Path) -> Iterator[str]:
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]
    every_pair = " ".join(f"{number:02d}" for number in range(100))
    yield from [every_pair] * 300  # often enough that each becomes a token, whatever numbers the corpus drew


def cut_by(expression: Regex) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(expression, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = cut_by(WORDS)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST_PIECE,
        show_progress=False,
    )
    bpe.train_from_iterator(texts(corpus), trainer)
    bpe.pre_tokenizer = cut_by(GPT2)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=END, model_max_length=CONTEXT)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def name_class(path: Path) -> None:
    """The class by the name that older transformers and serving engines know too."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="bfloat16",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(arguments.corpus)
    tokenizer.save_pretrained(arguments.folder)
    name_class(arguments.folder / "tokenizer_config.json")
    config(tokenizer).save_pretrained(arguments.folder)
    print(f"{arguments.folder}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
