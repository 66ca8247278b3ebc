"""The demo's model with one token more, `<|poison|>`, whose embedding is infinite: `python -m benchmarks.chaos.poison FOLDER`.

The output layer is parted from the embeddings, so that only rows with the token give no numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.chaos.project import DEMO


def make(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    tokenizer.add_tokens(["<|poison|>"], special_tokens=True)
    (bad,) = tokenizer.encode("<|poison|>", add_special_tokens=False)
    model = AutoModelForCausalLM.from_pretrained(DEMO / "base", tie_word_embeddings=False)
    head = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(max(len(tokenizer), len(head)))
    with torch.no_grad():
        model.get_output_embeddings().weight[: len(head)] = head
        model.get_output_embeddings().weight[bad] = 0.0
        model.get_input_embeddings().weight[bad] = float("inf")
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
