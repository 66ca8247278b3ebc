"""Python packages: those tunedock cannot do without, and those that add something."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

from tunedock.plan.machine.bounds import BOUNDS, measured
from tunedock.plan.machine.check import Check, absent, failure

GROUP = "packages"

REQUIRED = ("transformers", "peft", "accelerate", "safetensors", "huggingface-hub")
"""PyTorch has a check of its own in the worker, where it is loaded."""


@dataclass(frozen=True, slots=True)
class Addition:
    """A package that adds something. `needs_card`: of no use without an NVIDIA card."""

    name: str
    adds: str
    needs_card: bool = False
    install: str | None = None


OPTIONAL = (
    Addition("bitsandbytes", "bases in 4 and 8 bits, optimizers with 8-bit states", install="pip install 'tunedock[quantize]'"),
    Addition("deepspeed", "ZeRO: a model sharded over several cards", True),
    Addition("flash-attn", "attention kernels; PyTorch 2.10 brings its own for packed rows", True),
    Addition("liger-kernel", "faster norms, rotary embeddings and gates", True),
    Addition("causal-conv1d", "the kernels of models with convolutions or state spaces (Qwen3-Next, Mamba)", True),
    Addition("modelscope", "models and data from ModelScope (`hub: modelscope`)", install="pip install 'tunedock[modelscope]'"),
)  # fmt: skip

Version = Callable[[str], str | None]


def installed(name: str) -> str | None:
    """The version of a package; None when it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def required(version: Version = installed) -> list[Check]:
    made = []
    for name in REQUIRED:
        found = version(name)
        if found is None:
            made.append(failure(GROUP, name, "not installed", f"`pip install {name}`"))
        else:
            made.append(measured(GROUP, name, found, way_out=f"`pip install --upgrade {name}`"))
    return made


def optional(has_card: bool, version: Version = installed) -> list[Check]:
    """Each is a choice, so none of them fails; one that is older than tunedock knows is a warning."""
    made = []
    for package in OPTIONAL:
        found = version(package.name)
        install = package.install or f"pip install {package.name}"
        if found is not None:
            made.append(_there(package, found, install))
        elif package.needs_card and not has_card:
            made.append(absent(GROUP, package.name, f"not installed; for NVIDIA cards: {package.adds}"))
        else:
            made.append(absent(GROUP, package.name, f"not installed; adds {package.adds}", f"`{install}`"))
    return made


def _there(package: Addition, found: str, install: str) -> Check:
    words, newer = f"{found}: {package.adds}", f"`{install.replace('install', 'install --upgrade', 1)}`"
    if package.name not in BOUNDS:
        return Check(GROUP, package.name, words)
    return measured(GROUP, package.name, found, found=words, way_out=newer)
