"""The parts of a model between its matrix products, each as one operation: norms, gated activations, rotary embeddings, LoRA.

A part is replaced on the instance, and only after the replacement has given, on made-up input, what the part itself gives: what a
class is called or claims to be is not looked at. What does not fit at the time of a call (another type, device or shape, an adapter
switched off, dropout) goes to the module's own forward. On CUDA the parts are Liger's, when it is installed.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from typing import Any

import torch
from torch import nn

from tunedock.model.fused.gates import fuse_gate, gate_act
from tunedock.model.fused.lora import fuse_lora, is_plain_lora
from tunedock.model.fused.norms import fuse_norm, norm_offset
from tunedock.model.fused.rotary import fuse_rotary
from tunedock.model.kernels import kernels

Parts = dict[str, dict[str, Any]]
"""Kind of a part -> names of the modules that are such parts, each with what was found of it; plain JSON."""


def find_parts(model: nn.Module) -> Parts:
    """What `fuse` can replace, for calls on the CPU. The weights must be there."""
    compiled = kernels()
    parts: Parts = {"lora": {}, "norm": {}, "gate": {}}
    for name, module in model.named_modules():
        if "forward" in vars(module):  # replaced already, by us or by somebody who had a reason
            continue
        if is_plain_lora(module):
            parts["lora"][name] = True
        elif compiled is None:
            continue
        elif (offset := norm_offset(module, compiled)) is not None:
            parts["norm"][name] = offset
        elif (act := gate_act(module)) is not None:
            parts["gate"][name] = act
    return parts


def fuse(model: nn.Module, parts: Parts | None = None) -> list[str]:
    """Replaces what can be replaced, for calls on the CPU. Returns what was, by kind, with counts.

    `parts`: what `find_parts` found of the same model elsewhere, for one whose weights are not there yet.
    """
    parts = find_parts(model) if parts is None else parts
    compiled = kernels()
    counts = {"lora": len(parts["lora"])}
    for name in parts["lora"]:
        fuse_lora(model.get_submodule(name))
    if compiled is not None:
        for name, offset in parts["norm"].items():
            fuse_norm(model.get_submodule(name), compiled, offset)
        for name, act in parts["gate"].items():
            fuse_gate(model.get_submodule(name), compiled, act)
        sources = {type(module).__module__ for module in model.modules() if hasattr(module, "q_proj")}
        rotary = sum(fuse_rotary(sys.modules[source], compiled) for source in sources)
        counts |= {"norm": len(parts["norm"]), "gate": len(parts["gate"]), "rotary": rotary}
    return [f"{number} {kind}" for kind, number in counts.items() if number]


def fuse_with_liger(model: Any, device: torch.device) -> list[str]:
    """Liger's kernels for norms, rotary embeddings and gated activations on CUDA, where installed and where they know the model."""
    if device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return []
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # type: ignore[import-not-found]

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if apply is None:
        return []
    known = inspect.signature(apply).parameters
    # The head is ours: Liger's losses would make the logits of every position.
    options = {name: False for name in ("cross_entropy", "fused_linear_cross_entropy") if name in known}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    apply(model=base, **options)
    return ["liger"]
