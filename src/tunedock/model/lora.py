"""LoRA and what is kin to it, through PEFT: put on a model, begun as it began before, and written as a plain LoRA.

PiSSA and OLoRA start as the largest part of a weight W and take it out of the base: W = W' + s B0 A0. What training makes of it
is a plain LoRA of twice the rank on the weight as it was, since W' + s B A = W + s (B A - B0 A0); that is what is saved, so that
what comes after a training needs the base alone. Sources: arXiv 2106.09685 (LoRA), 2312.03732 (rsLoRA), 2402.09353 (DoRA),
2402.12354 (LoRA+), 2404.02948 (PiSSA), 2406.01775 (OLoRA).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tunedock.errors import ModelError
from tunedock.model.score import score_layer
from tunedock.recipe.adapters import Lora, leaves_the_base

DEFAULT = "default"
"""PEFT's name for an adapter that has none."""


def put_on(
    model: nn.Module, lora: Lora, *, seed: int, new_ids: Sequence[int] = (), began: Mapping[str, Tensor] | None = None
) -> PeftModel:
    """The model with a fresh adapter.

    `new_ids`: tokens whose rows are trained; `began`: what the trained parameters were as the run began, to begin as exactly that.
    Raises ModelError where the adapter finds nothing to sit on, or PEFT refuses.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    _require_found("modules_to_save", [w for w in lora.modules_to_save if not any(n.endswith(w) for n in names)], names)
    torch.manual_seed(seed)
    try:
        wrapped: PeftModel = get_peft_model(model, _config(model, lora, new_ids, drawn=began is None))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise _refused(model, lora, error) from None
    if leaves_the_base(lora) and any(DEFAULT not in layer.lora_A for layer in _layers(wrapped)):
        raise ModelError(
            "only a linear layer has a largest part to start from",
            where=f"adapter.init_lora_weights: {lora.init_lora_weights}",
            hint="name linear layers in `adapter.target_modules`",
        )
    adapted = [name for name, module in wrapped.base_model.model.named_modules() if isinstance(module, LoraLayer)]
    for key, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        idle = [text for text in patterns if not any(re.match(rf"(.*\.)?({text})$", name) for name in adapted)]
        _require_found(key, idle, adapted)
    if began is not None:
        begin_as(wrapped, lora, began)
    return wrapped


def _require_found(key: str, idle: Sequence[str], names: Sequence[str]) -> None:
    """Raises ModelError for the first of `idle`, which PEFT would pass over without a word."""
    if idle:
        parts = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()} - {""})
        shown = ", ".join(parts[:30]) + (", ..." if len(parts) > 30 else "")
        raise ModelError("no module has such a name", where=f"adapter.{key}: {idle[0]}", hint=f"there are {shown}")


def _config(model: nn.Module, lora: Lora, new_ids: Sequence[int], *, drawn: bool) -> LoraConfig:
    if lora.alpha is None:
        raise ValueError("adapter.alpha is filled in by recipe.resolve")
    saved = list(lora.modules_to_save)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=lora.exclude_modules,
        layers_to_transform=lora.layers_to_transform,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=lora.init_lora_weights if drawn or not leaves_the_base(lora) else True,
        modules_to_save=saved or None,
        trainable_token_indices=_token_rows(model, saved, new_ids) or None,
        ensure_weight_tying=tied and any(word.endswith(("embed_tokens", "lm_head")) for word in saved),
        task_type=task_of(model),
    )


def task_of(model: nn.Module) -> str:
    """PEFT's name for what the model does; with SEQ_CLS the score layer is trained and saved whole."""
    return "CAUSAL_LM" if score_layer(model) is None else "SEQ_CLS"


def _token_rows(model: nn.Module, saved: Sequence[str], new_ids: Sequence[int]) -> dict[str, list[int]]:
    """Module -> the rows to train of it. A matrix that is trained whole has none, two that are tied have them once."""
    if new_ids and getattr(model.get_output_embeddings(), "bias", None) is not None:  # type: ignore[operator]
        raise ModelError(  # PEFT would leave the bias out
            "this model's output layer has a bias, and single rows are not trained beside one",
            where="model.add_tokens",
            hint="train whole weights with `adapter: full`, or leave the tokens out",
        )
    rows: dict[str, list[int]] = {}
    whole: list[nn.Parameter] = []
    for name, weight in _matrices(model):
        if any(name.endswith(word) for word in saved):
            whole.append(weight)
    for name, weight in _matrices(model) if new_ids else ():
        if not any(weight is other for other in whole):
            whole.append(weight)
            rows[name] = list(new_ids)
    return rows


def _matrices(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names of the embedding and the output layer, and their weights."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    if modules[1] is None:  # a reward model has scores
        modules.pop()
    return [
        (next(name for name, other in model.named_modules() if other is module), module.weight) for module in modules
    ]


def _refused(model: nn.Module, lora: Lora, error: Exception) -> ModelError:
    linears = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    return ModelError(
        (str(error).splitlines() or [type(error).__name__])[0],
        where=f"adapter.target_modules: {lora.target_modules}",
        hint=f"this model's linear layers are called {', '.join(linears)}; or use `all-linear`",
    )


def begin_as(model: PeftModel, lora: Lora, began: Mapping[str, Tensor]) -> None:
    """Sets what is trained to `began`, and takes out of the base what its pairs start as."""
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if own.keys() != began.keys() or any(began[name].shape != parameter.shape for name, parameter in own.items()):
        raise ModelError("what the run began with does not fit its adapter", where="began.safetensors")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.data = began[name].to(parameter.device, copy=True)
        if leaves_the_base(lora):
            for layer in _layers(model):
                base = layer.get_base_layer()
                a, b = layer.lora_A[DEFAULT].weight, layer.lora_B[DEFAULT].weight
                # As PEFT computes it, so that it comes out the same to the last bit.
                base.weight.data = (base.weight.float() - layer.scaling[DEFAULT] * b @ a).to(base.weight.dtype)


def _layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def save_plain(model: PeftModel, folder: Path, lora: Lora, began: Mapping[str, Tensor]) -> None:
    """Writes what PiSSA or OLoRA became as a plain LoRA of twice the rank on the base as it was. `began`: as `put_on` takes it."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, start in began.items():
        if ".lora_A." in name:
            state[name] = torch.cat([state[name], start.to(state[name])], 0)
        elif ".lora_B." in name:
            state[name] = torch.cat([state[name], -start.to(state[name])], 1)
    config: Any = copy.deepcopy(model.peft_config[DEFAULT])
    twice = math.sqrt(2.0) if lora.use_rslora else 2.0  # what leaves alpha over the rank, or over its root, as it was
    config.init_lora_weights = True
    config.r, config.lora_alpha = 2 * config.r, twice * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: twice * alpha for name, alpha in config.alpha_pattern.items()}
    trained = model.peft_config[DEFAULT]
    model.peft_config[DEFAULT] = config
    try:
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    finally:
        model.peft_config[DEFAULT] = trained
