"""What of a model is trained, and how the result is saved and loaded again.

`lora` attaches PEFT's adapter, `freeze` leaves only the last layers or named modules trainable, `full` trains everything. A result
folder holds either an adapter (adapter_config.json) or whole weights (config.json), in safetensors.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tunedock.errors import ModelError
from tunedock.model.quantize import numbers_in
from tunedock.model.score import LAYER, score_layer
from tunedock.recipe.adapters import Adapter, Freeze, Lora

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def attach(model: nn.Module, adapter: Adapter, *, seed: int) -> nn.Module:
    """The model with exactly the adapter's parameters trainable, in float32. Raises ModelError when nothing would be."""
    if isinstance(adapter, Lora):
        torch.manual_seed(seed)
        model = _lora(model, adapter)
    elif isinstance(adapter, Freeze):
        _freeze(model, adapter)
    else:
        model.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _lora(model: nn.Module, lora: Lora) -> nn.Module:
    if lora.alpha is None:
        raise ValueError("adapter.alpha is filled in by recipe.resolve")
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM"
        if score_layer(model) is None
        else "SEQ_CLS",  # the latter trains and saves the score layer whole
    )
    try:
        wrapped: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        linears = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError(
            str(error).splitlines()[0],
            where=f"adapter.target_modules: {lora.target_modules}",
            hint=f"this model's linear layers are called {', '.join(linears)}; or use `all-linear`",
        ) from None
    return wrapped


def _freeze(model: nn.Module, freeze: Freeze) -> None:
    names = [name for name, _ in model.named_parameters()]
    layers = {int(found.group(1)) for name in names if (found := _LAYER.search(name))}
    count = max(layers, default=-1) + 1
    last_n = freeze.last_n_layers or 0
    if last_n > count:
        raise ModelError(f"the model has {count} layers", where=f"adapter.last_n_layers: {last_n}")
    for word in freeze.trainable_modules:
        if not any(word in name for name in names):
            raise ModelError("no parameter has this word in its name", where=f"adapter.trainable_modules: {word}")
    for name, parameter in model.named_parameters():
        layer = _LAYER.search(name)
        in_last = layer is not None and int(layer.group(1)) >= count - last_n
        scores = name == f"{LAYER}.weight"  # a new layer, which nothing else would train
        parameter.requires_grad_(in_last or scores or any(word in name for word in freeze.trainable_modules))


def checkpoint_activations(model: nn.Module, layers: int | None = None) -> None:
    """Keeps only a layer's input for the backward pass and computes the rest again (transformers' gradient checkpointing).

    In the first `layers` layers; in all of them by default.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # type: ignore[operator]
    if layers is not None:
        for number, layer in enumerate(checkpointable(model)):
            layer.gradient_checkpointing = number < layers  # type: ignore[assignment]


def checkpointable(model: nn.Module) -> list[nn.Module]:
    """The layers whose activations can be computed again, each by itself, from the first."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def save(model: nn.Module, folder: Path, *, max_shard_size: str = "5GB") -> None:
    """Writes the adapter, or the whole weights, as safetensors, for whom the folder's other files are."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)  # type: ignore[operator]
    # safetensors writes for its owner alone: a server of another user could read the config and not the weights.
    config = folder / ("adapter_config.json" if is_adapter(folder) else "config.json")
    mode = stat.S_IMODE(config.stat().st_mode)
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def load_adapter(base: nn.Module, folder: Path) -> PeftModel:
    """The base with a saved adapter on it, frozen. Safetensors only."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError("adapter_model.safetensors is missing", where=str(folder))
    try:
        return PeftModel.from_pretrained(base, folder, is_trainable=False)
    except (RuntimeError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"the adapter does not fit this base model: {first}", where=str(folder)) from None


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters by name, on the CPU: what a checkpoint holds of the model."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def load_trainable_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != state.keys():
        strange = sorted(own.keys() ^ state.keys())[:3]
        raise ModelError(f"the checkpoint holds other parameters than the model: {', '.join(strange)}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def parameter_counts(model: nn.Module) -> dict[str, Any]:
    total = sum(numbers_in(p) for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"parameters": total, "trained": trained, "trained_share": trained / max(total, 1)}
