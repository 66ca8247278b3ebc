"""Bytes a run needs, by part, by arithmetic on the model's config alone: before a weight is loaded, on a laptop without torch.

    needed(tokens) = fixed parts + bytes_per_token x tokens of the largest row

or, where that is more, what stands while answers are made (`plan.rollout_memory`), when there are no gradients and activations.

Weights, gradients and optimizer states are exact. Activations are counted from what transformers' layers keep for the backward pass
and are right within a factor of `TRUST`; a run starts from the plan and corrects it by what it measures (`train.budget`).

Symbols: H hidden size, Q width of all query heads, K of all key heads, c bytes of a number in the compute type, w in that of
the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tunedock.plan.decoder import HEADS, Decoder, decoder
from tunedock.plan.optimizer_memory import Matrix, optimizer_state_bytes
from tunedock.plan.rollout_memory import Answering, answering_parts
from tunedock.plan.trained import base_growth, is_thawed, rank_of, targets, trained_size, value_head_size
from tunedock.recipe.adapters import Adapter, Freeze, Lora
from tunedock.recipe.schema import Recipe

Number = Literal["float32", "bfloat16", "float16"]
Part = Literal["lora", "norm", "gate", "softmax"]
"""What is one operation, which keeps its inputs once and nothing in between: those of `model.fused`, and the head's softmax."""

PARTS: tuple[Part, ...] = get_args(Part)

NUMBER_BYTES: Mapping[Number, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

QUANTIZED_BYTES: Mapping[str, tuple[float, int]] = {
    "fp8": (1, 4),
    "int8": (1, 4),
    "nf4": (0.5 + 1 / 64 + 4 / (64 * 256), 0),
}
"""By `quantize`: bytes of a number of a linear layer, and of what comes with each output.

nf4 has a scale of one byte for 64 numbers, and one of four for 256 of those."""

MASTER_BYTES = 4
"""Trained weights and their gradients are held in float32, whatever the base is held in."""

CHUNK_BYTES = 1 << 27
"""Logits the head holds at once; `model.head` says the same (a test compares them)."""

CHUNK_COPIES = 4
"""A chunk's logits in the compute type and in float32, their probabilities, and what becomes of them on the way back. Where the
softmax is one operation it overwrites the only copy."""

TRUST = 1.7
"""Measured and planned activations differ by at most this factor on the models of the tests."""

ALLOCATOR: Mapping[str, float] = {"cpu": 1.25, "cuda": 1.1}
"""Memory held over memory asked for. glibc keeps freed blocks of up to 32 MiB in its heap, where the next ones do not quite fit."""

GATED_COPIES, PLAIN_COPIES, ROUTED_COPIES = 3, 4, 3
"""Tensors a feed-forward part keeps: gate, its activation and up; GELU's four; a routed token's on the way to its experts."""

LENGTH_COPIES = 2
"""What DoRA keeps of a layer's output: the base's part and the pair's, which its lengths multiply."""

AFTER_ATTENTION = ("self_attn.o_proj", "self_attn.dense")
"""Layers whose input is what attention gives."""

RUNTIME_BYTES: Mapping[str, int] = {"cpu": 815 << 20, "cuda": 600 << 20}
"""What Python, torch and the other libraries take before there is a model, and oneDNN's kernels for the sizes it meets; on CUDA the
context on the card."""


HELD_FROM_THE_START = ("runtime", "base weights", "adapter weights", "reference copy")
"""Parts that stand once the model is loaded."""

ONLY_IN_STEPS = ("gradients", "head")
"""Parts that do not stand while answers are made."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a run needs on one device."""

    parts: Mapping[str, int]
    """Name -> bytes that do not depend on the size of a row."""
    bytes_per_token: int
    """For each token (padding counted) of the largest row."""
    known: bool
    """False where the model's family is not known and the nearest was taken."""
    answering: Mapping[str, int] = field(default_factory=dict)
    """Name -> bytes that are held while answers are made; empty where none are."""

    @property
    def fixed_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def answering_bytes(self) -> int:
        """Held at the peak of making answers; 0 where none are made."""
        return answering_bytes(self.parts, self.answering)

    @property
    def to_come_bytes(self) -> int:
        """The fixed parts that do not stand yet when the model is loaded and the first step has not begun."""
        return sum(size for name, size in self.parts.items() if name not in HELD_FROM_THE_START)

    def needed(self, tokens: int) -> int:
        """Bytes at the peak: of a step whose largest row has `tokens`, or of making answers."""
        return max(self.fixed_bytes + self.bytes_per_token * tokens, self.answering_bytes)


def answering_bytes(parts: Mapping[str, int], answering: Mapping[str, int]) -> int:
    """Bytes held while answers are made, of a run's `parts` and of the `answering` itself; 0 where none are made."""
    if not answering:
        return 0
    return sum(size for name, size in parts.items() if name not in ONLY_IN_STEPS) + sum(answering.values())


def plan_memory(
    config: Mapping[str, Any],
    *,
    adapter: Adapter,
    optim: str = "adamw_torch",
    optim_args: str | None = None,
    weights: Number = "bfloat16",
    compute: Number = "bfloat16",
    quantize: str = "none",
    gradient_checkpointing: bool | int = False,
    longest_path: int = 2048,
    most_tokens: int | None = None,
    fused: Collection[Part] = (),
    device: str = "cpu",
    scored: bool = False,
    new_tokens: int = 0,
    grows: int = 0,
    reference: int = 0,
    valued: bool = False,
    answering: Answering | None = None,
) -> MemoryPlan:
    """The plan for a model's config.json under a recipe's adapter and optimizer.

    `quantize`: the recipe's; `gradient_checkpointing`: all layers, or how many; `longest_path` in tokens, for attention that
    materialises its scores and for caches; `most_tokens`: of any row, which the head need not go beyond; `fused`: the parts that
    are; `scored`: a reward model, which has no logits; `new_tokens`, `grows`: as `plan.trained.trained_size` takes them;
    `reference`: bytes of a trained number in a copy of the policy as it began; `valued`: a value head is trained beside;
    `answering`: how answers are made, where they are. Raises ModelError where the config says too little.
    """
    shape, quantize = decoder(config, scored=scored), held_as(config, quantize)
    w, c = NUMBER_BYTES[weights], NUMBER_BYTES[compute]
    trained = trained_size(shape, adapter, new_tokens=new_tokens, grows=grows)
    in_base = 0 if isinstance(adapter, Lora) else trained
    beside = value_head_size(shape) if valued else 0
    first = _first_thawed(shape, adapter)
    parts = {
        "runtime": RUNTIME_BYTES.get(device, RUNTIME_BYTES["cpu"]),
        "base weights": (shape.size + base_growth(shape, grows) - in_base) * w
        + in_base * MASTER_BYTES
        - _narrowed(shape, quantize, w),
        "adapter weights": (trained - in_base + beside) * MASTER_BYTES,
        "reference copy": trained * reference,
        "gradients": (trained + beside) * MASTER_BYTES,
        "optimizer": math.ceil(
            optimizer_state_bytes(optim, optim_args, trained + beside, _trained_matrices(shape, adapter))
        ),
        "compute copies": _copies(shape, in_base, first, w, c),
        "head": _head(shape, c, most_tokens, fused),
        "widened layer": _widened(shape, c) if quantize != "none" else 0,
    }
    kept, working = _activations(shape, adapter, w, c, longest_path, fused)
    kept = [0 if layer < first else size for layer, size in enumerate(kept)]
    again = shape.layers if gradient_checkpointing is True else min(gradient_checkpointing, shape.layers)
    largest = sum(kept[again:]) + again * shape.hidden * w + max(kept[:again], default=0)
    held = ALLOCATOR.get(device, ALLOCATOR["cpu"])
    made = answering_parts(shape, config, answering, w=w, c=c, longest_path=longest_path) if answering else {}
    return MemoryPlan(parts, math.ceil((largest + working) * held), shape.known, made)


def _head(shape: Decoder, c: int, most_tokens: int | None, fused: Collection[Part]) -> int:
    """Logits of a chunk of tokens, and what is made of them."""
    if shape.scored:
        return 0
    number, copies = (c, 1) if "softmax" in fused else (MASTER_BYTES, CHUNK_COPIES)
    chunk = CHUNK_BYTES if most_tokens is None else min(CHUNK_BYTES, number * shape.vocabulary * most_tokens)
    return chunk * copies


def _widened(shape: Decoder, c: int) -> int:
    """A layer's weights on their way from few bits to the compute type, by way of float32."""
    return max(linear.inputs * linear.outputs for linear in shape.linears if linear.name not in HEADS) * (
        c + MASTER_BYTES
    )


def _narrowed(shape: Decoder, quantize: str, w: int) -> int:
    """Bytes that linear layers, all but the head, need less."""
    if quantize == "none":
        return 0
    number, output = QUANTIZED_BYTES[quantize]
    linears = [linear for linear in shape.linears if linear.name not in HEADS]
    return round(sum(linear.outputs * (linear.inputs * (w - number) - output) for linear in linears))


def held_as(config: Mapping[str, Any], quantize: str) -> str:
    """What the base's linear layers are held in: the recipe's `quantize`, or what a checkpoint of few bits comes nearest to."""
    own = config.get("quantization_config")
    if quantize != "none" or not isinstance(own, Mapping):
        return quantize
    eight = own.get("bits") == 8 or own.get("load_in_8bit") is True or own.get("quant_method") == "fp8"
    return "int8" if eight else "nf4"


def numbers(recipe: Recipe, *, bf16: bool) -> tuple[Number, Number]:
    """What weights are held in and what products are computed in, on a device that has bfloat16 or not.

    Weights that are trained stay in float32; a frozen base under an adapter is held in the compute type.
    """
    train = recipe.train
    compute: Number = "float32"
    if train.fp16:
        compute = "float16"
    elif train.bf16 or (train.bf16 is None and bf16):
        compute = "bfloat16"
    return (compute if recipe.adapter.kind == "lora" else "float32"), compute


def _trained_matrices(shape: Decoder, adapter: Adapter) -> Iterator[Matrix]:
    """Matrices of hidden layers that are trained, the factors of a LoRA among them."""
    if isinstance(adapter, Lora):
        for linear in targets(shape, adapter):
            rank = rank_of(linear.name, adapter)
            yield f"{linear.name}.lora_A", rank, linear.inputs
            yield f"{linear.name}.lora_B", linear.outputs, rank
        return
    for linear in shape.linears:
        thawed = not isinstance(adapter, Freeze) or is_thawed(f"{linear.name}.weight", shape.layers, adapter)
        if linear.name not in HEADS and thawed:
            yield linear.name, linear.outputs, linear.inputs


def readable(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{max(0, math.ceil(size / 2**20))} MiB"


def _first_thawed(shape: Decoder, adapter: Adapter) -> int:
    """The first layer through which gradients go: below it nothing is kept for them."""
    if not isinstance(adapter, Freeze):
        return 0
    thawed = [name for name in shape.parameters if is_thawed(name, shape.layers, adapter)]
    if any("embed_tokens" in name for name in thawed):
        return 0
    return min((_layer_of(name) for name in thawed), default=0)


def _layer_of(name: str) -> int:
    """Layers of parameters that are in none, norm and head, come after the last."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found.group(1)) if found else 1 << 30


def _copies(shape: Decoder, trained: int, first: int, w: int, c: int) -> int:
    """Weights cast for a product are kept for its backward pass: all that gradients go through where they are wider than the type
    of the products."""
    if w > c:
        through = (size for name, size in shape.parameters.items() if _layer_of(name) >= first)
        return (shape.size if first == 0 else sum(through)) * c
    return trained * c if c < MASTER_BYTES else 0


def _activations(
    shape: Decoder, adapter: Adapter, w: int, c: int, longest_path: int, fused: Collection[Part]
) -> tuple[list[int], int]:
    """Bytes a token keeps in each layer for the backward pass, and bytes a token needs while one layer's gradients are computed."""
    H, Q, K = shape.hidden, shape.query_width, shape.kv_width
    scores = longest_path * shape.heads if shape.soft_capped else 0
    normed = w if "norm" in fused else 4 + (0 if isinstance(adapter, Lora) else w)
    norms = normed * (shape.norms * H + (Q + K if shape.qk_norm else 0))
    attention = c * (2 * Q + 2 * K) + 4 * shape.heads + scores * (4 + c)
    routing = ROUTED_COPIES * c * shape.experts_per_token * H
    between = c * ((2 if "gate" in fused else GATED_COPIES) if shape.gated else PLAIN_COPIES)
    inputs = _kept_inputs(shape, adapter, c, shared=c == w == 4 or "lora" in fused)
    kept = [
        norms + attention + routing + between * width + inputs[layer] for layer, width in enumerate(shape.mlp_widths)
    ]
    widest = max(shape.mlp_widths)
    working = 3 * c * widest + 4 * c * H if "gate" in fused else (3 * c + 4) * widest + 4 * 4 * H
    return kept, working + 3 * 4 * scores


def _kept_inputs(shape: Decoder, adapter: Adapter, c: int, *, shared: bool) -> list[int]:
    """By layer: bytes of a token that linear layers keep of their inputs, for gradients of weights. A frozen layer keeps nothing.

    `shared`: layers with one input keep it once; under autocast each keeps a cast copy of its own.
    """
    chosen = list(targets(shape, adapter)) if isinstance(adapter, Lora) else list(shape.linears)
    lora = adapter if isinstance(adapter, Lora) else None
    kept = [0] * shape.layers
    seen: set[tuple[int, str]] = set()
    for linear in chosen:
        found = re.match(r"model\.layers\.(\d+)\.(\w+)\.", linear.name)
        if found is None:
            continue
        layer = int(found.group(1))
        if lora is not None:
            kept[layer] += c * (rank_of(linear.name, lora) + (LENGTH_COPIES * linear.outputs if lora.use_dora else 0))
        if linear.name.endswith(AFTER_ATTENTION):
            continue  # what attention gives is kept by attention itself
        place = (layer, f"{found.group(2)} {linear.inputs}")
        if place in seen and shared:
            continue
        seen.add(place)
        kept[layer] += c * linear.inputs
    return kept
