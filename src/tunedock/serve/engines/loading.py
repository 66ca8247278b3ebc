"""Engines of this process, made of what a run leaves or of an exported folder. Weights come from safetensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunedock.errors import ModelError
from tunedock.model.adapter import is_adapter
from tunedock.model.load import find_device, held_in, load_weights, parameters_of, require_config
from tunedock.model.policy import Precision
from tunedock.model.session import base_weights, find_base, tuned_policy
from tunedock.recipe.schema import Model, Recipe
from tunedock.run.record import Run
from tunedock.serve.engines.batching import CHUNK, GPU_CHUNK, Engine, Limits
from tunedock.serve.engines.compute import Paged, choose, positions_of
from tunedock.serve.engines.precision import usual
from tunedock.serve.engines.steps import PAGE
from tunedock.train.memory import memory_of

SHARE = 0.5
"""Of the memory that is free once the weights are loaded, for keys and values."""

LEAST_PAGES = 8
"""Below this there is no serving."""


def from_run(
    run: Run,
    recipe: Recipe,
    *,
    merge: bool = True,
    adapters: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    limits: Limits | None = None,
) -> Engine:
    """The result of a run. `merge`: an adapter in the base's weights; without, it is one of several on them, by the run's name.

    `adapters`: names and folders of others on the same weights. `dtype` None: as `precision.usual` says. A base that a recipe holds
    in few bits is served so where the adapter stays one, and whole where it is merged.
    """
    device = device or find_device()
    base = find_base(recipe)
    dtype = dtype or usual(device, parameters_of(base.located.folder))
    own: dict[str, str] = {}
    if is_adapter(run.model) and not merge:
        model = base_weights(base, Precision(dtype, dtype), device, quantise=recipe.quantize != "none")
        own[run.name] = str(run.model)
    else:
        loaded = torch.float32 if is_adapter(run.model) else dtype  # merged before it is rounded
        policy = tuned_policy(base, run.model, precision=Precision(loaded, loaded), device=device)
        model = _in_one(policy.model)
        for parameter in model.parameters():  # not the buffers, some of which stay float32
            parameter.data = parameter.data.to(dtype)
    return from_model(model, device, adapters={**own, **(adapters or {})}, limits=limits)


def from_base(
    recipe: Recipe,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    limits: Limits | None = None,
) -> Engine:
    """The model that a recipe's adapter sits on, in the bits it was trained in, for adapters to be loaded onto it."""
    device = device or find_device()
    base = find_base(recipe)
    dtype = dtype or usual(device, parameters_of(base.located.folder))
    model = base_weights(base, Precision(dtype, dtype), device, quantise=recipe.quantize != "none")
    return from_model(model, device, limits=limits)


def from_folder(
    folder: Path,
    *,
    adapters: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    limits: Limits | None = None,
    trust_remote_code: bool = False,
) -> Engine:
    """A folder of Hugging Face's layout: an export, or a base with `adapters`, names and folders."""
    device = device or find_device()
    settings = Model(path=str(folder), trust_remote_code=trust_remote_code)
    kept: Any = "auto" if held_in(require_config(folder)) else dtype or usual(device, parameters_of(folder))
    model = load_weights(folder, settings, dtype=kept, device=device)
    return from_model(model, device, adapters=adapters, limits=limits)


@torch.no_grad()
def from_model(
    model: nn.Module,
    device: torch.device,
    *,
    adapters: Mapping[str, str] | None = None,
    limits: Limits | None = None,
) -> Engine:
    """A causal language model that is on its device, and the engine's own from here on."""
    limits = limits or Limits()
    if limits.chunk is None:
        limits = replace(limits, chunk=GPU_CHUNK if device.type == "cuda" else CHUNK)
    compute = choose(model.eval().requires_grad_(False), device)
    config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    longest = int(getattr(config, "max_position_embeddings", 0) or 1 << 20)
    exact, one_other_way = positions_of(config) or (longest, False)
    if exact < longest and one_other_way and isinstance(compute, Paged):
        compute.turn = exact
    elif exact < longest:
        longest = exact
        compute.notes.append(
            f"prompts and answers have at most {exact} tokens: beyond, this model's positions depend on the length of the whole"
        )
    longest = min(longest, limits.longest or longest)
    pages = _pages(compute.bytes_per_token, longest, device, limits)
    if pages * PAGE < longest:
        compute.notes.append(
            f"prompts and answers have at most {pages * PAGE} tokens: memory for keys and values ends there"
        )
    compute.reserve(pages, PAGE)
    engine = Engine(compute, longest=longest, pages=pages, limits=limits)
    try:
        for name, path in (adapters or {}).items():
            engine.load_adapter(name, path)
    except BaseException:
        engine.close()
        raise
    return engine


def _pages(bytes_per_token: int, longest: int, device: torch.device, limits: Limits) -> int:
    """Pages that fit, no more than all rows could use. Raises ModelError where there is no room."""
    room = limits.cache_bytes
    if room is None:
        room = int(memory_of(device).free_bytes() * SHARE)
    fit = room // (PAGE * bytes_per_token)
    if fit < LEAST_PAGES:
        raise ModelError(
            f"there is no memory for keys and values: a token takes {bytes_per_token:,} bytes, and {room:,} are free for them",
            where="serve",
            hint="a smaller model, fewer bits, or another machine",
        )
    return min(fit, -(-longest // PAGE) * limits.running)


def _in_one(model: Any) -> nn.Module:
    """Adapters merged into the weights."""
    merged: nn.Module = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return merged
