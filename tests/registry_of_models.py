"""A registry of MLflow's in a file, and small models to register: what tests of versions stand on."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tunedock.access.audit import Audit
from tunedock.registry.acts import Acts
from tunedock.registry.client import Registry
from tunedock.registry.record import Record, Version
from tunedock.registry.source import kind_of, record_of


@cache
def _empty() -> bytes:
    """MLflow takes seconds to make its tables: they are made once."""
    with tempfile.TemporaryDirectory() as folder:
        Registry.open(f"{folder}/models.db", create=True)
        return Path(folder, "models.db").read_bytes()


def a_registry(folder: Path) -> Acts:
    (folder / "models.db").write_bytes(_empty())
    registry = Registry.open(str(folder / "models.db"))
    return Acts(registry, Audit(folder / "models.db.audit.jsonl"))


def a_record(folder: Path, text: str = "weights") -> tuple[Path, Record]:
    """A folder that looks like a model, and what it is registered with."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(text)
    kind, place = kind_of(str(folder), folder / "runs")
    return place, record_of(kind, place, folder / "runs", image=None)


def whole_model(folder: Path, seed: int) -> Path:
    """A small model that computes, other weights for every seed."""
    import torch  # heavy, and most tests of a registry need no model that computes

    import families

    families.save_tiny("qwen3", folder)
    model = families.tiny_model("qwen3")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def adapter_on(base: Path, folder: Path, seed: int) -> Path:
    """A LoRA that changes what the base answers, as PEFT saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=64, target_modules="all-linear")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def register(acts: Acts, name: str, folder: Path, **more: str) -> Version:
    kind, place = kind_of(str(folder), folder / "runs")
    return acts.register(name, place, record_of(kind, place, folder / "runs", image=None), **more)


def audit_of(acts: Acts) -> list[dict[str, object]]:
    return [json.loads(line) for line in acts.audit.path.read_text().splitlines()]


@dataclass
class Place:
    """A base, three adapters on it and two whole models."""

    base: Path
    adapters: list[Path]
    wholes: list[Path]

    @classmethod
    def made(cls, folder: Path) -> Place:
        base = whole_model(folder / "base", 0)
        adapters = [adapter_on(base, folder / f"adapter-{seed}", seed) for seed in range(3)]
        return cls(base, adapters, [whole_model(folder / f"whole-{seed}", seed) for seed in (1, 2)])
