"""Which parameters an adapter trains, by their names: PEFT's rules and our own, on the model's shape alone."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tunedock.plan.decoder import HEADS, Decoder, Linear
from tunedock.recipe.adapters import Adapter, Freeze, Lora


def trained_size(shape: Decoder, adapter: Adapter, *, new_tokens: int = 0, grows: int = 0) -> int:
    """Numbers that are trained.

    `new_tokens`: whose rows a LoRA trains by themselves; `grows`: rows that the vocabulary of the config is to grow by.
    """
    if isinstance(adapter, Lora):
        whole = _saved(shape, adapter, grows) + _new_rows(shape, adapter, new_tokens)
        scores = shape.hidden if shape.scored and not is_saved(shape, "score.weight", adapter) else 0
        return _pairs(shape, adapter) + whole + scores
    if isinstance(adapter, Freeze):
        thawed = [name for name in shape.parameters if is_thawed(name, shape.layers, adapter)]
        return sum(shape.parameters[name] + grows * _row(shape, name) for name in thawed)
    return shape.size + base_growth(shape, grows)


def value_head_size(shape: Decoder) -> int:
    """Numbers of the head that ppo trains beside the model: a weight for each hidden one, and a bias."""
    return shape.hidden + 1


def targets(shape: Decoder, lora: Lora) -> Iterator[Linear]:
    """The linear layers a LoRA is put on, by PEFT's rules: `all-linear`, a regular expression, or names and ends of names."""
    for linear in shape.linears:
        if not _passed_over(linear.name, lora) and _chosen(linear.name, lora):
            yield linear


def rank_of(name: str, lora: Lora) -> int:
    """The rank of a module's pair."""
    for pattern, rank in lora.rank_pattern.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return rank
    return lora.r


def is_saved(shape: Decoder, parameter: str, lora: Lora) -> bool:
    """Whether a parameter's module, or one that it is in, is trained whole. PEFT looks at a name's end, not at its last part."""
    parts = parameter.split(".")[:-1]
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    if parameter == "model.embed_tokens.weight" and "lm_head.weight" not in shape.parameters:
        names.append("lm_head")  # tied: one matrix with two names
    return any(name.endswith(word) for name in names for word in lora.modules_to_save)


def is_thawed(name: str, layers: int, freeze: Freeze) -> bool:
    """Whether a parameter is trained by `freeze`; a new score layer is, whatever is frozen."""
    if name.startswith("score."):
        return True
    found = re.match(r"model\.layers\.(\d+)\.", name)
    in_range = found is not None and in_layers(int(found.group(1)), layers, freeze)
    words = freeze.layer_modules
    return (in_range and (not words or any(word in name for word in words))) or any(
        word in name for word in freeze.trainable_modules
    )


def in_layers(number: int, layers: int, freeze: Freeze) -> bool:
    """Whether a layer is among the first or the last that `freeze` trains."""
    return number >= layers - (freeze.last_n_layers or 0) or number < (freeze.first_n_layers or 0)


def base_growth(shape: Decoder, grows: int) -> int:
    """Numbers that the embedding and the output layer grow by."""
    return grows * sum(_row(shape, name) for name in shape.parameters)


def _row(shape: Decoder, name: str) -> int:
    """Numbers of a parameter for each token of the vocabulary."""
    return {"model.embed_tokens.weight": shape.hidden, "lm_head.weight": shape.hidden, "lm_head.bias": 1}.get(name, 0)


def _saved(shape: Decoder, lora: Lora, grows: int) -> int:
    """Numbers of `modules_to_save`, which are copies: the base keeps its own. Of tied modules there is one copy."""
    chosen = [name for name in shape.parameters if is_saved(shape, name, lora)]
    return sum(shape.parameters[name] + grows * _row(shape, name) for name in chosen)


def _new_rows(shape: Decoder, lora: Lora, new_tokens: int) -> int:
    """Rows of new tokens that are trained by themselves, where their matrix is not trained whole."""
    matrices = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in shape.parameters]
    return new_tokens * shape.hidden * sum(not is_saved(shape, name, lora) for name in matrices)


def _pairs(shape: Decoder, lora: Lora) -> int:
    length = 1 if lora.use_dora else 0
    each = (
        rank_of(linear.name, lora) * (linear.inputs + linear.outputs) + length * linear.outputs
        for linear in targets(shape, lora)
    )
    return sum(each) + _on_experts(shape, lora)


def _passed_over(name: str, lora: Lora) -> bool:
    excluded = lora.exclude_modules
    if isinstance(excluded, str) and excluded:
        if re.fullmatch(excluded, name):
            return True
    elif excluded and _ends_with(name, excluded):
        return True
    return any(re.match(rf"(^|.*\.){word}($|\..*)", name) for word in lora.modules_to_save)


def _chosen(name: str, lora: Lora) -> bool:
    wanted = lora.target_modules
    if wanted == "all-linear":
        return name not in HEADS
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    if name in wanted:
        return True
    layers = lora.layers_to_transform
    if not _ends_with(name, wanted) or layers is None or layers == []:
        return _ends_with(name, wanted)
    found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    numbers = [layers] if isinstance(layers, int) else layers
    return found is not None and int(found.group(1)) in numbers


def _ends_with(name: str, endings: list[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _on_experts(shape: Decoder, lora: Lora) -> int:
    """Numbers of the pairs PEFT puts on experts held as one tensor; a fused tensor has a pair for each projection named."""
    names = lora.target_modules
    if isinstance(names, str) and names != "all-linear":
        return 0  # an expression could name them, but nobody writes it so
    hidden, total = shape.hidden, 0
    for (count, width), (first, second, router) in (
        (layer, shape.expert_lora_names) for layer in shape.expert_layers if shape.expert_lora_names
    ):
        fused, down, gate = (
            len(part) if isinstance(names, str) else sum(name in names for name in part)
            for part in (first, second, router)
        )
        total += lora.r * count * (fused * (hidden + 2 * width) + down * (width + hidden)) + lora.r * gate * (
            hidden + count
        )
    return total
