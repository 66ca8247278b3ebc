"""An export as those who deploy it read it: plain transformers, or llama.cpp, without a word of the run."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from tunedock.errors import CheckError
from tunedock.export.expected import Answer, answer_of, nll_of
from tunedock.export.merge import FLOAT32
from tunedock.export.probes import Talk, as_text
from tunedock.model import adapter as adapters
from tunedock.model import load
from tunedock.model.chat_facts import ChatFacts
from tunedock.model.load import roomy_device
from tunedock.model.session import Base, base_weights


class Reader(Protocol):
    """What an export is asked. Ids are of its own tokenizer."""

    load_s: float

    def tokens(self, text: str) -> list[int]:
        """Ids of a text with nothing put around it; texts of special tokens in it are those tokens."""
        ...

    def prompt(self, talk: Talk, *, thinking: bool) -> list[int]:
        """Ids of what a server makes of a conversation. Raises CheckError where its template refuses it."""
        ...

    def answer(self, prompt: Sequence[int], stops: Collection[int]) -> Answer: ...

    def nll(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """Negative log-likelihoods (nats) [T - 1] of all tokens but the first."""
        ...

    def ends(self) -> set[int]:
        """Tokens at which it stops by itself."""
        ...

    def close(self) -> None: ...


class TransformersReader:
    """A folder of Hugging Face's layout, by plain transformers; in float32, unless its weights are quantised."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False, device: torch.device | None = None) -> None:
        began = time.monotonic()
        self.device = device or roomy_device(folder)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
        self.model = self._model(folder, trust_remote_code).eval()
        self.load_s = time.monotonic() - began

    def _model(self, folder: Path, code: bool) -> nn.Module:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=code)
        quantised = getattr(config, "quantization_config", None) is not None
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if quantised else torch.float32,
            device_map=self.device,
            use_safetensors=True,
            trust_remote_code=code,
        )
        return model

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def prompt(self, talk: Talk, *, thinking: bool) -> list[int]:
        template = self.tokenizer.get_chat_template(tools=list(talk.tools) or None)
        return self.tokens(rendered(template, talk, self.tokenizer.special_tokens_map, thinking=thinking))

    def answer(self, prompt: Sequence[int], stops: Collection[int]) -> Answer:
        return answer_of(self.model, prompt, self.device, stops)

    def nll(self, ids: Sequence[int]) -> NDArray[np.float64]:
        return nll_of(self.model, ids, self.device)

    def ends(self) -> set[int]:
        found = getattr(self.model, "generation_config").eos_token_id  # noqa: B009 - a module's attribute, of any type to mypy
        return set(found if isinstance(found, list) else [found] if found is not None else [])

    def close(self) -> None:
        del self.model


def held_in_few_bits(base: Base) -> bool:
    """Whether the base's files hold no whole weights."""
    return load.held_in(load.require_config(base.located.folder)) is not None


class AdapterReader(TransformersReader):
    """An adapter's folder on the base it was made for, by PEFT."""

    def __init__(self, folder: Path, base: Base) -> None:
        self._base, self._folder = base, folder
        device = roomy_device(base.located.folder)
        super().__init__(folder, trust_remote_code=base.recipe.model.trust_remote_code, device=device)

    def _model(self, folder: Path, code: bool) -> nn.Module:
        held = held_in_few_bits(self._base)
        precision = load.precision(self._base.recipe, self.device) if held else FLOAT32
        model: nn.Module = adapters.load_adapter(
            base_weights(self._base, precision, self.device, quantise=held), folder
        )
        return model

    def ends(self) -> set[int]:
        """Who serves an adapter reads them from chat.json: the base's own generation config is another's file."""
        return set(ChatFacts.read(self._folder).stop_ids)


def rendered(template: str, talk: Talk, special: Mapping[str, Any], *, thinking: bool) -> str:
    """A conversation by a chat template as servers render it. Raises CheckError where the template refuses it."""
    texts = {name: text for name, text in special.items() if isinstance(text, str)}
    error: Exception | None = None
    for arguments in (dict, as_text):
        try:
            (text,), _ = render_jinja_template(
                conversations=[talk.plain(arguments)],
                tools=list(talk.tools) or None,
                chat_template=template,
                add_generation_prompt=True,
                enable_thinking=thinking,
                thinking=thinking,
                **texts,
            )
            return str(text)
        except Exception as raised:  # noqa: BLE001 - policy: a template is code; what it raises is its verdict
            error = error or raised
    raise CheckError(f"the chat template refuses a conversation that the run's takes: {error}", where="chat template")
