"""A recipe's tokenizer, chat and policy, made the same way for training, evaluation, conversation and export."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tunedock.data.chat import Chat
from tunedock.data.conversation import Message
from tunedock.errors import ModelError
from tunedock.model import adapter as adapters
from tunedock.model import load, world
from tunedock.model.chat_facts import stop_ids as stop_ids_of
from tunedock.model.fused import find_parts
from tunedock.model.hub import Located
from tunedock.model.new_tokens import NewTokens, add_tokens, make_room
from tunedock.model.noise import EmbeddingNoise
from tunedock.model.policy import Policy, Precision
from tunedock.model.products import use_fast_float32
from tunedock.model.quantize import bits_and_bytes, keep_gradients, to_fp8
from tunedock.model.saved_lora import digest, merge_into
from tunedock.model.score import require_score_layer, set_padding, share_padding
from tunedock.recipe.adapters import Lora
from tunedock.recipe.objectives.rollout import Rollout
from tunedock.recipe.schema import Recipe
from tunedock.run.record import read_json, write_json

BENEATH = "beneath.json"
"""Beside an adapter: the adapters merged into the weights it sits on, and their digests."""


@dataclass(frozen=True, slots=True)
class Base:
    """Where a recipe's base model is and how its text becomes tokens."""

    recipe: Recipe
    located: Located
    tokenizer: PreTrainedTokenizerBase
    chat: Chat
    new_tokens: NewTokens

    @property
    def new_ids(self) -> tuple[int, ...]:
        """Of the tokens the recipe adds."""
        return self.new_tokens.ids

    @property
    def pad_id(self) -> int:
        return load.pad_id(self.tokenizer)

    @property
    def head(self) -> load.Head:
        return "scores" if self.recipe.objective.kind == "reward" else "logprobs"

    def lineage(self) -> dict[str, Any]:
        found = {"model": self.recipe.model.path, "commit": self.located.commit, "folder": str(self.located.folder)}
        beneath = {path: digest(path) for path in self.recipe.model.adapters}
        return {**found, "adapters": beneath} if beneath else found


def find_base(recipe: Recipe, *, stop_ids: Collection[int] = (), weights: bool = True) -> Base:
    """Locates the model (fetching a hub id; its weights only with `weights`) and reads its tokenizer. Loads no weights yet."""
    located = load.locate_base(recipe, weights=weights)
    load.require_config(located.folder)  # before the tokenizer, whose reader would blame the tokenizer
    tokenizer = load.load_tokenizer(located.folder, recipe.model)
    made = add_tokens(tokenizer, recipe.model)
    answered = recipe.objective if isinstance(recipe.objective, Rollout) else None
    chat = Chat(
        tokenizer,
        stop_ids=stop_ids_of(located.folder, tokenizer) | frozenset(stop_ids),
        max_length=recipe.data.max_length - (answered.max_new_tokens if answered else 0),
        over_length=recipe.data.over_length,
        train_on=recipe.data.train_on,
        documents=recipe.objective.kind == "pretrain",
        scored=recipe.objective.kind == "reward",
        thinking=answered.thinking if answered else False,
    )
    base = Base(recipe, located, tokenizer, chat, made)
    if base.head == "scores":
        asked = (Message("user", "Which probe is asked?"), Message("assistant", "This probe is answered."))
        set_padding(tokenizer, chat.whole_ids(asked)[-1])
    return base


def base_policy(base: Base, *, precision: Precision | None = None) -> Policy:
    """The untrained model, frozen: as it was before the run, with the adapter that the run went on from.

    `precision` as for `tuned_policy`.
    """
    device = load.find_device()
    chosen = precision or load.precision(base.recipe, device)
    model = base_weights(base, chosen, device, quantise=precision is None)
    if continues(base.recipe):
        model = adapters.attach(model, base.recipe.adapter, seed=0, new_ids=base.new_ids).eval()
    return Policy(model.requires_grad_(False), device, chosen)


def trainable_policy(base: Base, *, began: Mapping[str, Tensor] | None = None, spread: bool = False) -> Policy:
    """The model with the recipe's adapter, ready to train; with `began`, beginning as exactly that (`model.adapter.attach`).

    `spread`: its weights are to be sharded over the devices. The first rank loads them into host memory; the others have
    the model's shape alone (`train.parallel.filling`). A collective call then.
    """
    recipe = base.recipe
    device = load.find_device()
    precision = load.precision(recipe, device)
    if precision.compute == torch.float32:
        use_fast_float32(device)
    empty = spread and world.rank() > 0
    model = trainable_model(base, precision, load.CPU if spread else device, began=began, empty=empty)
    if recipe.train.gradient_checkpointing:
        given = recipe.train.gradient_checkpointing
        adapters.checkpoint_activations(model, None if given is True else given)
    parts = world.told_by_first(None if empty else find_parts(model)) if spread and device.type == "cpu" else None
    policy = Policy(model, device, precision, to_compile=recipe.train.torch_compile is True, parts=parts)
    if recipe.train.neftune_noise_alpha is not None:
        policy.noise = EmbeddingNoise(model, recipe.train.neftune_noise_alpha)
    return policy


def trainable_model(
    base: Base,
    precision: Precision,
    device: torch.device,
    *,
    began: Mapping[str, Tensor] | None = None,
    empty: bool = False,
) -> torch.nn.Module:
    """The base's weights on a device, with exactly what the recipe's adapter trains trainable. `empty`: as `load.load_weights`
    takes it; what the adapter adds is on the meta device too."""
    recipe = base.recipe
    model = base_weights(base, precision, device, quantise=True, empty=empty)
    with _on_meta() if empty else nullcontext():
        model = adapters.attach(model, recipe.adapter, seed=recipe.train.seed, new_ids=base.new_ids, began=began)
    _require_rows_trained(model, base)
    return model


@contextmanager
def _on_meta() -> Iterator[None]:
    """What is made is on the meta device; that values copied there are lost, is meant."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        yield


def tuned_policy(
    base: Base, folder: Path, *, precision: Precision | None = None, device: torch.device | None = None
) -> Policy:
    """The result of a run: the base with its adapter, or its whole weights.

    `precision`: this one instead of the recipe's, and the base's weights whole where the recipe quantises them. `device`: in the
    place of the one that would train.
    """
    device = device or load.find_device()
    chosen = precision or load.precision(base.recipe, device)
    if adapters.is_adapter(folder):
        _require_same_beneath(base, folder)
        frozen = base_weights(base, chosen, device, quantise=precision is None)
        model: torch.nn.Module = adapters.load_adapter(frozen, folder)
    else:
        whole = base.recipe.model.model_copy(update={"init": "pretrained", "config_overrides": {}})
        model = load.load_weights(folder, whole, dtype=chosen.weights, device=device, head=base.head)
        _agree(base, model)
    policy = Policy(model.eval(), device, chosen)
    policy.has_base = policy.has_base and not continues(base.recipe)
    return policy


def continues(recipe: Recipe) -> bool:
    """Whether the run goes on with an adapter: then the model as it was before the run is not its base alone."""
    return isinstance(recipe.adapter, Lora) and recipe.adapter.continue_from is not None


def write_beneath(base: Base, folder: Path) -> None:
    """Notes, beside an adapter, what was merged into the weights it sits on."""
    if base.recipe.model.adapters:
        write_json(folder / BENEATH, base.lineage()["adapters"])


def _require_same_beneath(base: Base, folder: Path) -> None:
    """Raises ModelError when the adapters merged into the base are not what they were as the run trained."""
    if not (folder / BENEATH).is_file():
        return
    before, now = read_json(folder / BENEATH), base.lineage().get("adapters", {})
    changed = [path for path, digest in before.items() if now.get(path) != digest]
    if changed:
        raise ModelError(
            "the adapter that was merged into the weights is not what it was when this run trained",
            where=", ".join(changed),
            hint="put its files back as they were",
        )


def base_weights(
    base: Base, precision: Precision, device: torch.device, *, quantise: bool, empty: bool = False
) -> torch.nn.Module:
    """The base's weights with the recipe's adapters merged into them, in the bits the recipe says before they are on the device,
    with room for new tokens. `empty`: as `load.load_weights` takes it."""
    recipe = base.recipe
    kind = recipe.quantize if quantise else "none"
    held = load.held_in(load.require_config(base.located.folder))
    if held is not None:
        _require_frozen_as_it_is(base, held, quantise=quantise)
    quantization = bits_and_bytes(kind, precision.compute) if kind in ("nf4", "int8") else None
    model = load.load_weights(
        base.located.folder,
        recipe.model,
        dtype=torch.float32 if recipe.model.adapters else precision.weights,
        device=torch.device("cpu") if kind == "fp8" else device,
        seed=recipe.train.seed,
        quantization=quantization,
        head=base.head,
        empty=empty,
    )
    _agree(base, model)
    make_room(model, base.new_ids, seed=recipe.train.seed, empty=empty)
    if recipe.model.adapters and not empty:
        model = merge_into(model, recipe.model.adapters).eval()
        for parameter in model.parameters():  # not the buffers, some of which stay float32
            parameter.data = parameter.data.to(precision.weights)
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


def _require_rows_trained(model: torch.nn.Module, base: Base) -> None:
    """Raises ModelError where the rows of new tokens would stay as they were drawn."""
    matrices = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    if base.new_ids and not all(
        any(p.requires_grad for p in matrix.parameters()) for matrix in matrices if matrix is not None
    ):
        raise ModelError(
            "the embedding and the output layer are frozen, so new tokens would learn nothing",
            where="model.add_tokens",
            hint="`adapter.trainable_modules: [embed_tokens, lm_head]` trains them; `adapter: lora` trains the new rows alone",
        )


def _require_frozen_as_it_is(base: Base, held: str, *, quantise: bool) -> None:
    """Raises ModelError for what a checkpoint whose weights are `held` in few bits cannot be."""
    if base.recipe.adapter.kind != "lora":
        why, hint = "weights of few bits do not train", "use `adapter: lora`, or take the model's own weights"
    elif not quantise:
        why = "there are no whole ones to merge into"
        hint = "`tunedock export --format adapter` writes the adapter, which fits the model's own weights too"
    elif base.recipe.model.adapters:
        why, hint = "adapters are not merged into them", "leave `model.adapters` out, or take the model's own weights"
    elif base.recipe.quantize != "none":
        why, hint = "are not quantised again", "leave `quantize` out"
    else:
        return
    raise ModelError(f"the weights are held in {held}, and {why}", where=str(base.located.folder), hint=hint)
