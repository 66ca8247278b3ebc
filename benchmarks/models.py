"""The models: Qwen3's architecture at two sizes, random weights from a fixed seed, a tokenizer trained on the spot.

    tiny    15.1 M parameters, vocabulary   8,192: what lies between the matrix products weighs most
    small  115.6 M parameters, vocabulary 151,936 (Qwen3's own): the output layer weighs most

Weights are saved in bfloat16, as published models are. Both have the same tokenizer of 8,192 tokens; `small` has more rows in its
embedding than the tokenizer uses, which costs what a full vocabulary costs. The chat template is ChatML without line breaks
between turns: every side then reads the same tokens from it, LLaMA-Factory's template parser among them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers import ROOT
from benchmarks.words import Words

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MADE = ROOT / "benchmarks" / ".work" / "models"
SEED = 20
VOCABULARY = 8192
PAD = "<|endoftext|>"
START = "<|im_start|>"
END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{START}' + message['role'] + '\\n' + message['content'] + '{END}' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{START}assistant\\n' }}}}{{% endif %}}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 64

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's seven linear maps."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = [(self.hidden_size, queries), (self.hidden_size, keys), (self.hidden_size, keys)]
        mlp = [(self.hidden_size, self.intermediate_size)] * 2 + [(self.intermediate_size, self.hidden_size)]
        return [*attention, (queries, self.hidden_size), *mlp]

    @property
    def layer_parameters(self) -> int:
        """Weights of all layers' linear maps."""
        return self.num_hidden_layers * sum(a * b for a, b in self.linears)

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All of them: linear maps, norms, and the embedding, which is the output layer too."""
        norms = self.num_hidden_layers * (2 * self.hidden_size + 2 * self.head_dim) + self.hidden_size
        return self.layer_parameters + self.head_parameters + norms

    def lora_parameters(self, r: int) -> int:
        return self.num_hidden_layers * sum(r * (a + b) for a, b in self.linears)


SHAPES = {
    "tiny": Shape(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=960,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
    ),
    "small": Shape(
        vocab_size=151_936,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
}


def ensure(name: str) -> Path:
    """The model's folder, made first where it is missing or was made by another definition."""
    folder = MADE / name
    mark = folder / "made-from.json"
    definition = json.dumps({"seed": SEED, "template": CHAT_TEMPLATE, **asdict(SHAPES[name])}, sort_keys=True)
    if not (mark.is_file() and mark.read_text(encoding="utf-8") == definition):
        folder.mkdir(parents=True, exist_ok=True)
        _make(SHAPES[name], folder)
        mark.write_text(definition, encoding="utf-8")
    return folder


def _make(shape: Shape, folder: Path) -> None:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(), eos_token=END, pad_token=PAD, model_max_length=32_768
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    ends, pads = tokenizer.convert_tokens_to_ids([END, PAD])
    config = Qwen3Config(
        **asdict(shape),
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        bos_token_id=None,
        eos_token_id=ends,
        pad_token_id=pads,
    )
    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM(config)
    if model.num_parameters() != shape.parameters:
        raise AssertionError(f"{model.num_parameters()} parameters, {shape.parameters} by the shape")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE over made-up words, the chat's marks as special tokens. The same one each time."""
    from tokenizers import Tokenizer as Tokens
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Tokens(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = Words(SEED)
    tokenizer.train_from_iterator((words.text(200) for _ in range(3000)), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise AssertionError(f"the corpus gave a vocabulary of {tokenizer.get_vocab_size()}")
    return tokenizer


def main(names: list[str]) -> int:
    for name in names or SHAPES:
        print(f"{name}: {SHAPES[name].parameters:,} parameters in {ensure(name).relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
