"""A folder of weights as `tunedock export` leaves it, or somebody else: its tokenizer and prompts.

No PyTorch here: images that hold llama.cpp alone have none.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tunedock.data.chat import Chat
from tunedock.model.chat_facts import ChatFacts, stop_ids
from tunedock.recipe.serving import ServeOrder
from tunedock.serve.engines.batching import Limits
from tunedock.serve.engines.generator import Generator
from tunedock.serve.engines.tokens import TokenEngine


def engine_of(folder: Path, generator: Generator, tokenizer: PreTrainedTokenizerBase) -> TokenEngine:
    """By what an export left beside its weights; of a folder from elsewhere by its generation config."""
    facts = ChatFacts.read(folder) if (folder / "chat.json").is_file() else None
    stops = frozenset(facts.stop_ids) if facts else stop_ids(folder, tokenizer)
    documents = not tokenizer.chat_template
    chat = Chat(
        tokenizer,
        stop_ids=stops,
        max_length=generator.longest,
        over_length="drop",
        train_on="assistant",
        documents=documents,
        thinking=facts.thinking if facts else False,
    )
    return TokenEngine(
        generator, tokenizer, chat, thinking=facts.thinking if facts else False, system=facts.system if facts else None
    )


def limits_of(order: ServeOrder) -> Limits:
    given = {"running": order.max_running, "waiting": order.max_waiting, "longest": order.longest}
    return Limits(**{name: value for name, value in given.items() if value is not None})
