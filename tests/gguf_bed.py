"""A GGUF file of a tiny model with its tokenizer and facts beside it, as an export leaves them."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def gguf_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written("qwen3", tmp_path_factory.mktemp("exported"))


def written(family: str, folder: Path) -> Path:
    import families  # heavy, and pytest reads this file whatever is tested
    from tunedock.export.gguf import TOKENIZER
    from tunedock.export.gguf.shape import shape_of
    from tunedock.export.gguf.vocabulary import vocabulary_of
    from tunedock.export.gguf.write import write
    from tunedock.model.chat_facts import ChatFacts

    model, tokenizer, stops = families.tiny_model(family), families.tokenizer(family), sorted(families.stop_ids(family))
    words = vocabulary_of(tokenizer, model.config.vocab_size, stops)
    write(folder / "model.gguf", model.state_dict(), shape_of(model.config), words, "f32", "tiny")
    tokenizer.save_pretrained(folder / TOKENIZER)
    ChatFacts(stops, thinking=False).write(folder)
    return folder
