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

from torch import nn

from tunedock.model.fused.gates import fuse_gate
from tunedock.model.fused.lora import fuse_lora
from tunedock.model.fused.norms import fuse_norm
from tunedock.model.fused.rotary import fuse_rotary
from tunedock.model.kernels import kernels


def fuse(model: nn.Module) -> list[str]:
    """Replaces what can be replaced, for calls on the CPU. Returns what was, by kind, with counts."""
    compiled = kernels()
    counts: dict[str, int] = {}

    def count(kind: str, done: bool) -> None:
        counts[kind] = counts.get(kind, 0) + done

    for module in list(model.modules()):
        if "forward" in vars(module):  # replaced already, by us or by somebody who had a reason
            continue
        count("lora", fuse_lora(module))
        if compiled is not None:
            count("norm", fuse_norm(module, compiled))
            count("gate", fuse_gate(module, compiled))
    if compiled is not None:
        for source in {type(module).__module__ for module in model.modules() if hasattr(module, "q_proj")}:
            count("rotary", fuse_rotary(sys.modules[source], compiled))
    return [f"{number} {kind}" for kind, number in counts.items() if number]


def fuse_with_liger(model: Any) -> list[str]:
    """Liger's kernels for norms, rotary embeddings and gated activations on CUDA, where installed and where they know the model."""
    device = next(model.parameters()).device
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
