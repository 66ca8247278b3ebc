"""How a model's prompts are rendered and where its answers end: files beside its weights, read without them and without PyTorch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunedock.errors import ModelError
from tunedock.run.record import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ChatFacts:
    """`model/chat.json`: how a run's prompts are rendered and where its answers end, for everything that serves it."""

    stop_ids: list[int]
    thinking: bool
    system: str | None = None

    def write(self, folder: Path) -> None:
        write_json(folder / "chat.json", {"stop_ids": self.stop_ids, "thinking": self.thinking, "system": self.system})

    @classmethod
    def read(cls, folder: Path) -> ChatFacts:
        try:
            return cls(**json.loads((folder / "chat.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"chat.json cannot be read: {error}", where=str(folder)) from None


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end generation: the tokenizer's eos and those of generation_config.json. Raises ModelError where that is none."""
    found = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    file = folder / "generation_config.json"
    if file.is_file():
        try:
            eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"generation_config.json cannot be read: {error}", where=str(folder)) from None
        found |= set(eos) if isinstance(eos, list) else {eos}
    return frozenset(int(token) for token in found if token is not None)
