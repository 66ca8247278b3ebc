"""A recipe's tokenizer, chat and policy, made the same way for training, evaluation, conversation and export."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tunedock.data.chat import Chat
from tunedock.data.conversation import Message
from tunedock.errors import ModelError
from tunedock.model import adapter as adapters
from tunedock.model import load
from tunedock.model.hub import Located
from tunedock.model.noise import EmbeddingNoise
from tunedock.model.policy import Policy, Precision
from tunedock.model.products import use_fast_float32
from tunedock.model.quantize import bits_and_bytes, keep_gradients, to_fp8
from tunedock.model.score import require_score_layer, set_padding, share_padding
from tunedock.recipe.objectives.rollout import Rollout
from tunedock.recipe.schema import Recipe
from tunedock.run.record import write_json


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


@dataclass(frozen=True, slots=True)
class Base:
    """Where a recipe's base model is and how its text becomes tokens."""

    recipe: Recipe
    located: Located
    tokenizer: PreTrainedTokenizerBase
    chat: Chat

    @property
    def pad_id(self) -> int:
        return load.pad_id(self.tokenizer)

    @property
    def head(self) -> load.Head:
        return "scores" if self.recipe.objective.kind == "reward" else "logprobs"

    def lineage(self) -> dict[str, Any]:
        return {"model": self.recipe.model.path, "commit": self.located.commit, "folder": str(self.located.folder)}


def find_base(recipe: Recipe, *, stop_ids: Collection[int] = (), weights: bool = True) -> Base:
    """Locates the model (fetching a hub id; its weights only with `weights`) and reads its tokenizer. Loads no weights yet."""
    located = load.locate_base(recipe, weights=weights)
    load.require_config(located.folder)  # before the tokenizer, whose reader would blame the tokenizer
    tokenizer = load.load_tokenizer(located.folder, recipe.model)
    answered = recipe.objective if isinstance(recipe.objective, Rollout) else None
    chat = Chat(
        tokenizer,
        stop_ids=load.stop_ids(located.folder, tokenizer) | frozenset(stop_ids),
        max_length=recipe.data.max_length - (answered.max_new_tokens if answered else 0),
        over_length=recipe.data.over_length,
        train_on=recipe.data.train_on,
        documents=recipe.objective.kind == "pretrain",
        scored=recipe.objective.kind == "reward",
        thinking=answered.thinking if answered else False,
    )
    base = Base(recipe, located, tokenizer, chat)
    if base.head == "scores":
        asked = (Message("user", "Which probe is asked?"), Message("assistant", "This probe is answered."))
        set_padding(tokenizer, chat.whole_ids(asked)[-1])
    return base


def base_policy(base: Base, *, precision: Precision | None = None) -> Policy:
    """The untrained model, frozen: as it was before the run. `precision` as for `tuned_policy`."""
    device = load.find_device()
    chosen = precision or load.precision(base.recipe, device)
    model = _base_weights(base, chosen, device, quantise=precision is None)
    return Policy(model.requires_grad_(False), device, chosen)


def trainable_policy(base: Base) -> Policy:
    """The model with the recipe's adapter, ready to train."""
    recipe = base.recipe
    device = load.find_device()
    precision = load.precision(recipe, device)
    if precision.compute == torch.float32:
        use_fast_float32(device)
    model = _base_weights(base, precision, device, quantise=True)
    model = adapters.attach(model, recipe.adapter, seed=recipe.train.seed)
    if recipe.train.gradient_checkpointing:
        given = recipe.train.gradient_checkpointing
        adapters.checkpoint_activations(model, None if given is True else given)
    policy = Policy(model, device, precision, to_compile=recipe.train.torch_compile is True)
    if recipe.train.neftune_noise_alpha is not None:
        policy.noise = EmbeddingNoise(model, recipe.train.neftune_noise_alpha)
    return policy


def tuned_policy(base: Base, folder: Path, *, precision: Precision | None = None) -> Policy:
    """The result of a run: the base with its adapter, or its whole weights.

    `precision`: this one instead of the recipe's, and the base's weights whole where the recipe quantises them.
    """
    device = load.find_device()
    chosen = precision or load.precision(base.recipe, device)
    if adapters.is_adapter(folder):
        frozen = _base_weights(base, chosen, device, quantise=precision is None)
        model: torch.nn.Module = adapters.load_adapter(frozen, folder)
    else:
        whole = base.recipe.model.model_copy(update={"init": "pretrained", "config_overrides": {}})
        model = load.load_weights(folder, whole, dtype=chosen.weights, device=device, head=base.head)
        _agree(base, model)
    return Policy(model.eval(), device, chosen)


def _base_weights(base: Base, precision: Precision, device: torch.device, *, quantise: bool) -> torch.nn.Module:
    """The base's weights, in the bits the recipe says before they are on the device."""
    recipe = base.recipe
    kind = recipe.quantize if quantise else "none"
    held = load.held_in(load.require_config(base.located.folder))
    if held is not None:
        _require_frozen_as_it_is(base, held, quantise=quantise)
    quantization = bits_and_bytes(kind, precision.compute) if kind in ("nf4", "int8") else None
    model = load.load_weights(
        base.located.folder,
        recipe.model,
        dtype=precision.weights,
        device=torch.device("cpu") if kind == "fp8" else device,
        seed=recipe.train.seed,
        quantization=quantization,
        head=base.head,
    )
    _agree(base, model)
    if kind == "fp8":
        to_fp8(model)
        model = model.to(device)
    keep_gradients(model)
    return model


def _agree(base: Base, model: torch.nn.Module) -> None:
    """What a reward model must have, and its padding."""
    if base.head == "scores":
        require_score_layer(model)
        share_padding(model, base.tokenizer)


def _require_frozen_as_it_is(base: Base, held: str, *, quantise: bool) -> None:
    """Raises ModelError for what a checkpoint whose weights are `held` in few bits cannot be."""
    if base.recipe.adapter.kind != "lora":
        why, hint = "weights of few bits do not train", "use `adapter: lora`, or take the model's own weights"
    elif not quantise:
        why = "there are no whole ones to merge into"
        hint = "`tunedock export --format adapter` writes the adapter, which fits the model's own weights too"
    elif base.recipe.quantize != "none":
        why, hint = "are not quantised again", "leave `quantize` out"
    else:
        return
    raise ModelError(f"the weights are held in {held}, and {why}", where=str(base.located.folder), hint=hint)
