"""Several LoRAs on one model in one step: the base computes all tokens at once, and each adapter's part is added for its own.

A step's rows are ordered by adapter, so that the tokens of one stand side by side. An adapter is weights in plain tensors, read
from safetensors and never changed: a request holds the one it began with, whatever is loaded or dropped by that name meanwhile.

Source: LoRA, arXiv 2106.09685; many in a batch: Punica, arXiv 2310.18547.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tunedock.errors import ModelError
from tunedock.recipe.adapter_files import WEIGHTS, folder_of, read_adapter

_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class LowRank:
    """x [N, in] -> x A^T B^T. Shapes: A^T [in, r], B^T [r, out], which holds the scaling."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LoadedLora:
    name: str
    parts: Mapping[str, LowRank]
    """By the name of the module it is added to."""

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for part in self.parts.values() for t in (part.down, part.up))


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens `start` to `stop` of a step, which are an adapter's."""

    lora: LoadedLora
    start: int
    stop: int


class LoraModules:
    """A model whose linear layers can add adapters' parts."""

    def __init__(self, model: nn.Module, linears: Mapping[str, nn.Module]) -> None:
        """`linears`: the modules that are given every token of a step, one after the other."""
        self._model = model
        self._linears = linears
        self._changed: set[str] = set()
        self.stretches: list[Stretch] = []
        """Of the step that is computed next."""

    def read(self, name: str, path: Path) -> LoadedLora:
        """A saved adapter, on the model's device. Raises RecipeError or ModelError where it is not one that can be added so."""
        settings = read_adapter(path)
        _require_plain(settings, path)
        folder = folder_of(path)
        try:
            state = load_file(folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"the adapter's weights are cut off or damaged: {error}", where=str(folder), hint="copy them again"
            ) from None
        return LoadedLora(name, self._parts(state, settings, folder))

    def _parts(self, state: Mapping[str, Tensor], settings: Mapping[str, Any], folder: Path) -> dict[str, LowRank]:
        sides: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            found = _PART.fullmatch(key.removeprefix(_PREFIX))
            if found is None:
                raise ModelError(f"{key} is no part of a plain LoRA on linear layers", where=str(folder), hint=_MERGE)
            sides.setdefault(found["module"], {})[found["which"]] = tensor
        return {name: self._part(name, side, settings, folder) for name, side in sorted(sides.items())}

    def _part(self, name: str, side: Mapping[str, Tensor], settings: Mapping[str, Any], folder: Path) -> LowRank:
        module = self._linears.get(name)
        if module is None:
            known = any(name == each for each, _ in self._model.named_modules())
            why = "is not a linear layer that is given every token" if known else "is not there"
            raise ModelError(f"the adapter does not fit this model: {name} {why}", where=str(folder), hint=_MERGE)
        if set(side) != {"A", "B"}:
            raise ModelError(f"the adapter is not whole: {name} has one of its two parts", where=str(folder))
        sizes = _sizes(module)
        given = (side["A"].shape[1], side["B"].shape[0])
        if given != sizes or side["A"].shape[0] != side["B"].shape[1]:
            raise ModelError(
                f"the adapter does not fit this model: {name} is {sizes[0]} -> {sizes[1]}, and its part {given[0]} -> {given[1]}",
                where=str(folder),
                hint="it was trained on another model",
            )
        scaling = _scaling(name, side["A"].shape[0], settings)
        like = next(p for p in self._model.parameters() if p.is_floating_point())
        down = side["A"].to(like.device, like.dtype).T.contiguous()
        up = (side["B"].float() * scaling).to(like.device, like.dtype).T.contiguous()
        return LowRank(down, up)

    def make_ready(self, lora: LoadedLora) -> None:
        """Lets the modules of an adapter add to their output. Between two steps."""
        for name in lora.parts.keys() - self._changed:
            self._let_add(name, self._linears[name])
            self._changed.add(name)

    def _let_add(self, name: str, module: nn.Module) -> None:
        plain = module.forward

        def forward(x: Tensor) -> Tensor:
            out: Tensor = plain(x)
            flat_x, flat_out = x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1])
            for stretch in self.stretches:
                part = stretch.lora.parts.get(name)
                if part is not None:
                    tokens = slice(stretch.start, stretch.stop)
                    flat_out[tokens] += (flat_x[tokens] @ part.down) @ part.up
            return out

        module.forward = forward


def is_plain(path: Path) -> bool:
    """Whether the adapter in a folder may be one of several on its base, by its settings. Raises RecipeError for what is none."""
    settings = read_adapter(path)
    return not any(settings.get(key) for key, _ in _OTHER_THAN_PLAIN)


_MERGE = "merge it into the model (`tunedock export --format merged`) and serve that"


_OTHER_THAN_PLAIN = (
    ("use_dora", "a DoRA changes the base's weights too"),
    ("modules_to_save", "it holds whole modules in the place of the base's"),
    ("trainable_token_indices", "it holds rows of tokens in the place of the base's"),
    ("target_parameters", "it changes parameters that are no linear layer's"),
)


def _require_plain(settings: Mapping[str, Any], path: Path) -> None:
    for key, what in _OTHER_THAN_PLAIN:
        if settings.get(key):
            raise ModelError(f"the adapter cannot be one of several: {what} (`{key}`)", where=str(path), hint=_MERGE)


def _scaling(name: str, r: int, settings: Mapping[str, Any]) -> float:
    """As PEFT has it: the pattern that a module's name ends in decides, the first that does."""
    alpha = float(settings.get("lora_alpha", 8))
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = float(value)
            break
    return alpha / (r**0.5 if settings.get("use_rslora") else r)


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(in, out)."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    weight: Any = module.weight  # of transformers' Conv1D, which keeps it turned
    return int(weight.shape[0]), int(weight.shape[1])
