"""What of a model is trained, and how the result is saved and loaded again.

`lora` puts PEFT's adapter on (`model.lora`), `freeze` leaves some parameters trainable (`model.freeze`), `full` trains everything.
A result folder holds either an adapter (adapter_config.json) or whole weights (config.json), in safetensors.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tunedock.errors import ModelError
from tunedock.model.freeze import freeze
from tunedock.model.lora import put_on, save_plain
from tunedock.model.quantize import numbers_in
from tunedock.model.saved_lora import go_on_with
from tunedock.recipe.adapters import Adapter, Freeze, Lora, leaves_the_base


def attach(
    model: nn.Module,
    adapter: Adapter,
    *,
    seed: int,
    new_ids: Sequence[int] = (),
    began: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """The model with exactly the adapter's parameters trainable, in float32. Raises ModelError when nothing would be.

    `new_ids`: tokens made for this training; `began`: `trainable_state` as the run began, for an adapter to begin as exactly that.
    """
    if isinstance(adapter, Lora):
        if adapter.continue_from is not None:
            model = go_on_with(model, adapter, new_ids=new_ids, began=began)
        else:
            model = put_on(model, adapter, seed=seed, new_ids=new_ids, began=began)
    elif isinstance(adapter, Freeze):
        freeze(model, adapter)
    else:
        model.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


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


def save(
    model: nn.Module,
    folder: Path,
    *,
    max_shard_size: str = "5GB",
    adapter: Adapter | None = None,
    began: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the adapter, or the whole weights, as safetensors, for whom the folder's other files are.

    `adapter`, `began`: of a training whose adapter took its start out of the base, so that the result fits the base as it was.
    """
    if isinstance(adapter, Lora) and leaves_the_base(adapter):
        if began is None:
            raise ValueError("what the adapter began with is not known")
        save_plain(model, folder, adapter, began)
    elif isinstance(model, PeftModel):
        model.save_pretrained(str(folder), save_embedding_layers=False)  # what is trained of them is in the adapter
    else:
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


def trainable_state(model: nn.Module, *, copy: bool = False) -> dict[str, Tensor]:
    """The trained parameters by name, on the CPU: what a checkpoint holds of the model.

    With `copy` no later step changes these tensors; without, those that are on the CPU anyway are the model's own.
    """
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: p.detach().to("cpu", copy=copy).contiguous() for name, p in named}


def load_trainable_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != state.keys():
        strange = sorted(own.keys() ^ state.keys())[:3]
        raise ModelError(f"the checkpoint holds other parameters than the model: {', '.join(strange)}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def token_rows(model: nn.Module) -> int:
    """Tokens whose rows an adapter trains by themselves."""
    return max((len(p) for name, p in model.named_parameters() if "trainable_tokens_delta" in name), default=0)


def parameter_counts(model: nn.Module) -> dict[str, Any]:
    total = sum(numbers_in(p) for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"parameters": total, "trained": trained, "trained_share": trained / max(total, 1)}
