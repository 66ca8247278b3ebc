"""Scores for others: a reward model, this house's or a foreign one, asked about whole conversations.

A reward model is loaded from the run that trained it, from an export, from an adapter's folder, or from any folder or hub id whose
model is a sequence classifier with one label. Conversations come as messages, which the reward model's own chat template renders
(it may be another model than the one that answered), or as token ids of its own tokenizer, taken as they are. Scores are computed
in rows, what conversations begin with alike stands once.

The score is read where transformers reads it: at the last token that is not the config's padding. (Many a foreign model was trained
with the end of an answer for padding, and is to be read at the token before.) A classifier that is no decoder with a score layer
(DeBERTa) is called as it is, on padded lines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tunedock.data.chat import Chat
from tunedock.data.conversation import Conversation
from tunedock.data.sample import Sample, single
from tunedock.errors import ModelError, OutOfMemoryError, RunError
from tunedock.model import adapter as adapters
from tunedock.model import load
from tunedock.model.chat_facts import ChatFacts, stop_ids
from tunedock.model.hub import Located, locate
from tunedock.model.out_of_memory import give_back, is_out_of_memory
from tunedock.model.policy import Policy, Precision
from tunedock.model.score import score_layer, share_padding
from tunedock.model.session import find_base, tuned_policy
from tunedock.recipe.schema import Model, Recipe
from tunedock.run.record import Run, read_json

TOKEN_BUDGET = 8192
"""Tokens of a row, until one does not fit."""

TOGETHER = 128
"""Conversations laid out at once."""


class Scorer(ABC):
    """A reward model, in eval mode and without gradients."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, chat: Chat | None, stop_ids: frozenset[int], token_budget: int
    ) -> None:
        """`chat`: how conversations are rendered; made of the tokenizer's own template when none is given, and one is asked for."""
        self.tokenizer = tokenizer
        self._given_chat = chat
        self._stop_ids = stop_ids
        self._budget = token_budget
        self._pad_id: int | None = None

    @cached_property
    def _chat(self) -> Chat:
        return self._given_chat or Chat(
            self.tokenizer, stop_ids=self._stop_ids, max_length=1 << 30, over_length="error", train_on="last"
        )

    def render(self, conversation: Conversation) -> list[int]:
        """Token ids of a conversation that ends with an answer.

        Raises DataError when the template refuses it, ModelError when there is no template.
        """
        return self._chat.whole_ids(conversation.messages, conversation.tools)

    def scores(
        self,
        conversations: Sequence[Conversation | Sequence[int]],
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[float]:
        """The score of each: of messages, or of token ids as they stand.

        Raises what `render` raises, ModelError for fewer than two tokens, OutOfMemoryError when one alone does not fit.
        """
        paths = [self.render(one) if isinstance(one, Conversation) else one for one in conversations]
        return self.sample_scores([_sample(number, path) for number, path in enumerate(paths)], on_progress=on_progress)

    @torch.no_grad()
    def sample_scores(
        self, samples: Sequence[Sample], *, on_progress: Callable[[int], None] | None = None
    ) -> list[float]:
        """The score at the end of every leaf of every sample, in the samples' order. Their weights are not looked at."""
        found: list[float] = []
        for start in range(0, len(samples), TOGETHER):
            part = [sample.weighed_at_ends(pad_id=self._pad_id) for sample in samples[start : start + TOGETHER]]
            found += self._within_memory(part)
            if on_progress is not None:
                on_progress(start + len(part))
        return found

    def _within_memory(self, samples: Sequence[Sample]) -> list[float]:
        """Asked in smaller rows while memory runs out."""
        longest = max(sample.longest_path for sample in samples)
        while True:
            try:
                return self._score(samples)
            except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
                if not is_out_of_memory(error):
                    raise
            give_back()
            if self._budget <= longest:
                raise OutOfMemoryError(
                    f"a conversation of {longest} tokens does not fit into memory beside the reward model",
                    where="reward model",
                    hint="take a smaller reward model, or shorter answers",
                )
            whole = sum(sample.tokens for sample in samples)
            self._budget = max(longest, min(self._budget, whole) // 2)

    @abstractmethod
    def _score(self, samples: Sequence[Sample]) -> list[float]:
        """The leaves' scores, in rows of at most `_budget` tokens."""


class RowScorer(Scorer):
    """A decoder with a score layer: rows without padding, what is shared computed once."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: Chat | None = None,
        stop_ids: frozenset[int] = frozenset(),
        token_budget: int = TOKEN_BUDGET,
    ) -> None:
        super().__init__(tokenizer, chat=chat, stop_ids=stop_ids, token_budget=token_budget)
        self.policy = policy
        self._pad_id = policy.config.get_text_config().pad_token_id

    def _score(self, samples: Sequence[Sample]) -> list[float]:
        self.policy.model.eval()
        first = torch.tensor([0, *(len(sample.leaves()) for sample in samples)], device=self.policy.device).cumsum(0)
        found = torch.zeros(int(first[-1]), dtype=torch.float32, device=self.policy.device)
        for row in self.policy.rows(samples, self._budget):
            score_N, tensors = self.policy.scores(row)
            found[first[tensors.sample_N] + tensors.leaf_N] = score_N
        values: list[float] = found.tolist()
        return values


class LineScorer(Scorer):
    """Any other classifier, called as it is: a line each, lines of like length together, padded on the right."""

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, loading: Loading, *, token_budget: int
    ) -> None:
        super().__init__(tokenizer, chat=None, stop_ids=frozenset(), token_budget=token_budget)
        self._model = model
        self._loading = loading
        text: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
        self._filler = load.pad_id(tokenizer) if text.pad_token_id is None else int(text.pad_token_id)
        text.pad_token_id = self._filler
        self._most = int(getattr(text, "max_position_embeddings", None) or 1 << 30)

    def _score(self, samples: Sequence[Sample]) -> list[float]:
        paths = [sample.path(leaf)[0] for sample in samples for leaf in sample.leaves()]
        if (longest := max(map(len, paths))) > self._most:
            raise ModelError(f"a conversation has {longest} tokens, and the reward model reads {self._most} at most")
        order = sorted(range(len(paths)), key=lambda i: -len(paths[i]))
        found = [0.0] * len(paths)
        while order:
            lines = order[: max(1, self._budget // len(paths[order[0]]))]
            order = order[len(lines) :]
            shape = len(lines), len(paths[lines[0]])
            ids_BT = torch.full(shape, self._filler, dtype=torch.int64)
            mask_BT = torch.zeros(shape, dtype=torch.int64)
            for line, number in enumerate(lines):
                ids_BT[line, : len(paths[number])] = torch.as_tensor(paths[number])
                mask_BT[line, : len(paths[number])] = 1
            device = self._loading.device
            with self._loading.autocast():
                logits = self._model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device)).logits
            for number, score in zip(lines, logits[:, 0].float().tolist(), strict=True):
                found[number] = score
        return found


def _sample(number: int, path: Sequence[int]) -> Sample:
    if len(path) < 2:
        raise ModelError(
            f"there are {len(path)} token(s), and a conversation has two at least", where=f"conversation {number}"
        )
    return single(str(number), path, np.ones(len(path), np.float32))


# -- loading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loading:
    """Where and how a reward model that no recipe describes is held."""

    device: torch.device
    precision: Precision
    code: bool
    """The model's own Python may run."""

    @classmethod
    def here(cls, *, code: bool) -> Loading:
        device = load.find_device()
        numbers = torch.bfloat16 if load.has_bf16(device) else torch.float32
        return cls(device, Precision(weights=numbers, compute=numbers), code)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision.compute == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision.compute)

    def model(self, folder: Path) -> Model:
        return Model(path=str(folder), trust_remote_code=self.code)


def load_scorer(
    path: str | Path,
    *,
    revision: str | None = None,
    hub: str = "hf",
    offline: bool = False,
    trust_remote_code: bool = False,
    token_budget: int = TOKEN_BUDGET,
) -> Scorer:
    """The reward model of a run directory, of an exported or foreign folder, or of a hub id.

    `token_budget`: tokens of a row. Raises RunError for a run that trained no reward model or has no result, ModelError for a model
    that is no classifier with one label, and what loading any model raises.
    """
    folder = Path(path).expanduser()
    if (folder / "run.json").is_file():
        return _of_run(Run.open(folder), token_budget)
    find = partial(locate, hub=hub, offline=offline, code=trust_remote_code)
    folder = find(str(path), revision=revision).folder
    loading = Loading.here(code=trust_remote_code)
    if adapters.is_adapter(folder):
        return _of_adapter(folder, find, loading, token_budget)
    config = load.require_config(folder)
    tokenizer = load.load_tokenizer(folder, loading.model(folder))
    named = config.get("architectures") or ["not named"]
    if not any("ForSequenceClassification" in str(name) for name in named):
        raise ModelError(
            f"the model is no reward model: its architecture is {', '.join(map(str, named))}",
            where=str(path),
            hint="a reward model is a ...ForSequenceClassification with one label; `objective: reward` trains one",
        )
    model = _weights(folder, loading)
    if score_layer(model) is None:
        return LineScorer(model, tokenizer, loading, token_budget=token_budget)
    return _of_decoder(model, folder, tokenizer, loading, token_budget)


def _of_run(run: Run, token_budget: int) -> Scorer:
    recipe = Recipe.model_validate(run.resolved()["recipe"])
    if recipe.objective.kind != "reward":
        raise RunError(
            f"the run trained with `objective: {recipe.objective.kind}`, which makes no reward model",
            where=str(run.path),
            hint="name a run of `objective: reward`, or the folder or hub id of a reward model",
        )
    run.require_model()
    commit = run.state().lineage.get("commit")
    if commit is not None:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": commit})})
    base = find_base(recipe, stop_ids=ChatFacts.read(run.model).stop_ids)
    policy = tuned_policy(base, run.model)
    policy.probe()
    return RowScorer(policy, base.tokenizer, chat=base.chat, token_budget=token_budget)


def _of_adapter(folder: Path, find: Callable[..., Located], loading: Loading, token_budget: int) -> Scorer:
    config = read_json(folder / "adapter_config.json")
    if config.get("task_type") != "SEQ_CLS":
        raise ModelError(
            f"the adapter is of the type {config.get('task_type')}; a reward model's is of the type SEQ_CLS",
            where=str(folder),
            hint="`objective: reward` trains one",
        )
    base = find(str(config.get("base_model_name_or_path")), revision=config.get("revision")).folder
    tokenizer = load.load_tokenizer(folder, loading.model(folder))
    frozen = _weights(base, loading)
    if (
        tokenizer.pad_token_id is not None
    ):  # the adapter's own folder says what it was trained with, the base's config does not
        share_padding(frozen, tokenizer)
    model = adapters.load_adapter(frozen, folder)
    return _of_decoder(model, base, tokenizer, loading, token_budget)


def _of_decoder(
    model: nn.Module, folder: Path, tokenizer: PreTrainedTokenizerBase, loading: Loading, token_budget: int
) -> Scorer:
    """`folder`: what generation_config.json is read from."""
    policy = Policy(model.eval(), loading.device, loading.precision)
    policy.probe()
    return RowScorer(policy, tokenizer, stop_ids=stop_ids(folder, tokenizer), token_budget=token_budget)


def _weights(folder: Path, loading: Loading) -> nn.Module:
    dtype = loading.precision.weights
    return load.load_weights(folder, loading.model(folder), dtype=dtype, device=loading.device, head="scores")
