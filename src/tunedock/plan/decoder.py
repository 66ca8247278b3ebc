"""The parameters of a decoder-only transformer, by name and size, from its config.json alone: no weights, no torch.

What differs between families (biases, norms, fused projections, experts) is data in `families.json`; a string there names the
config's key that decides. Names are those of transformers' classes, so that adapters can be matched against them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from tunedock.errors import ModelError

HEADS = ("lm_head", "score")
"""What stands on the decoder: a language model's output layer, or a reward model's one score."""

UNKNOWN = "llama"
"""The family an unknown `model_type` is taken for: most decoders are near enough for a plan that is corrected by measuring."""


@dataclass(frozen=True, slots=True)
class Experts:
    """Keys of the config: number of experts (names it has had), width of each, width of the expert every token goes through."""

    count: tuple[str, ...]
    width: str
    shared_width: str | None = None
    lora_names: tuple[tuple[str, ...], ...] = ()
    """Names under which PEFT puts adapters on the experts' first part, their second part and the router; none where it does not."""


@dataclass(frozen=True, slots=True)
class Family:
    """A row of `families.json`. A bias is a fact, or the name of the config's key that holds it."""

    qkv: Literal["split", "fused"] = "split"
    qkv_bias: bool | str = False
    o_name: str = "o_proj"
    o_bias: bool | str = False
    qk_norm: Literal["none", "head", "projection"] = "none"
    mlp: Literal["gated", "gated_fused", "plain"] = "gated"
    mlp_bias: bool | str = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_bias: bool = False
    final_norm: str = "norm"
    head_bias: bool = False
    tied: bool = False
    """`tie_word_embeddings` where the config does not say."""
    head_dim: int | None = None
    """Where the config does not say; hidden size over heads for most."""
    experts: Experts | None = None


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer, an `nn.Linear` that an adapter can be put on."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def size(self) -> int:
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model's shape. Widths are numbers a token has in a place."""

    known: bool
    """Whether the family is in `families.json`; else the figures are a guess by the commonest one."""
    layers: int
    hidden: int
    heads: int
    query_width: int
    """heads x head size."""
    kv_width: int
    mlp_widths: tuple[int, ...]
    """By layer: intermediate numbers of a token, over all experts it goes through."""
    experts_per_token: int
    """0 for a model without experts."""
    expert_layers: tuple[tuple[int, int], ...]
    """(experts, width of each) of every layer that has some."""
    expert_lora_names: tuple[tuple[str, ...], ...]
    gated: bool
    gate_fused: bool
    """The gate and what it closes are one linear layer."""
    norms: int
    """Norms of a layer over the hidden size."""
    qk_norm: bool
    soft_capped: bool
    """Attention scores go through a soft cap, which keeps them from the fused kernels."""
    vocabulary: int
    scored: bool
    """It is a reward model, and makes no logits."""
    linears: tuple[Linear, ...]
    others: Mapping[str, int]
    """Parameters that are no linear layer's: embedding, norms, experts."""

    @property
    def parameters(self) -> dict[str, int]:
        """Name -> numbers, as `model.named_parameters()` has them."""
        found = dict(self.others)
        for linear in self.linears:
            found[f"{linear.name}.weight"] = linear.inputs * linear.outputs
            if linear.bias:
                found[f"{linear.name}.bias"] = linear.outputs
        return found

    @property
    def size(self) -> int:
        return sum(self.others.values()) + sum(linear.size for linear in self.linears)


def decoder(config: Mapping[str, Any], *, scored: bool = False) -> Decoder:
    """The shape a config.json describes; of a model of several parts, the text part. `scored`: as a reward model.

    Raises ModelError where it says too little.
    """
    nested = config.get("text_config")
    text = {**nested} if isinstance(nested, Mapping) else {**config}
    kind = str(text.get("model_type", ""))
    family = _families().get(kind)
    try:
        return _Reader(text, family or _families()[UNKNOWN], known=family is not None).read(scored=scored)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, StopIteration) as error:
        raise ModelError(
            f"config.json does not say how large the model is ({type(error).__name__}: {error})",
            where=f"model_type: {kind or 'none'}",
        ) from None


@cache
def _families() -> dict[str, Family]:
    table = json.loads(files("tunedock.plan").joinpath("families.json").read_text(encoding="utf-8"))
    made = {}
    for name, row in table.items():
        if "experts" in row:
            row["experts"] = Experts(**{**row["experts"], "count": tuple(row["experts"]["count"])})
            names = tuple(tuple(part) for part in row["experts"].lora_names)
            row["experts"] = replace(row["experts"], lora_names=names)
        if "norms" in row:
            row["norms"] = tuple(row["norms"])
        made[name] = Family(**row)
    return made


class _Reader:
    def __init__(self, config: Mapping[str, Any], family: Family, *, known: bool) -> None:
        self.config = config
        self.family = family
        self.known = known
        self.hidden = int(config["hidden_size"])
        self.layers = int(config["num_hidden_layers"])
        self.heads = int(config["num_attention_heads"])
        self.kv_heads = int(config.get("num_key_value_heads") or self.heads)
        self.head_dim = int(config.get("head_dim") or family.head_dim or self.hidden // self.heads)

    def read(self, *, scored: bool) -> Decoder:
        family, vocabulary = self.family, int(self.config["vocab_size"])
        linears: list[Linear] = []
        others = {"model.embed_tokens.weight": vocabulary * self.hidden}
        widths: list[int] = []
        experts = [found for layer in range(self.layers) if (found := self._experts(layer)) is not None]
        for layer in range(self.layers):
            place = f"model.layers.{layer}"
            linears += self._attention(f"{place}.self_attn")
            others |= self._norms(place)
            widths.append(self._mlp(f"{place}.mlp", layer, linears, others))
        others |= self._norm(f"model.{family.final_norm}", self.hidden)
        if scored:
            linears.append(Linear("score", self.hidden, 1))
        elif not self.config.get("tie_word_embeddings", family.tied):
            linears.append(Linear("lm_head", self.hidden, vocabulary, family.head_bias))
        return Decoder(
            known=self.known,
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            query_width=self.heads * self.head_dim,
            kv_width=self.kv_heads * self.head_dim,
            mlp_widths=tuple(widths),
            experts_per_token=int(self.config["num_experts_per_tok"]) if family.experts else 0,
            expert_layers=tuple(experts),
            expert_lora_names=family.experts.lora_names if family.experts else (),
            gated=family.mlp != "plain",
            gate_fused=family.mlp == "gated_fused",
            norms=len(family.norms),
            qk_norm=family.qk_norm != "none",
            soft_capped=bool(self.config.get("attn_logit_softcapping")),
            vocabulary=vocabulary,
            scored=scored,
            linears=tuple(linears),
            others=others,
        )

    def _says(self, fact: bool | str) -> bool:
        return bool(self.config.get(fact, False)) if isinstance(fact, str) else fact

    def _attention(self, place: str) -> Iterator[Linear]:
        family, q, kv = self.family, self.heads * self.head_dim, self.kv_heads * self.head_dim
        bias = self._says(family.qkv_bias)
        if family.qkv == "fused":
            yield Linear(f"{place}.qkv_proj", self.hidden, q + 2 * kv, bias)
        else:
            for name, width in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
                yield Linear(f"{place}.{name}", self.hidden, width, bias)
        yield Linear(f"{place}.{family.o_name}", q, self.hidden, self._says(family.o_bias))

    def _norm(self, name: str, width: int) -> dict[str, int]:
        found = {f"{name}.weight": width}
        return {**found, f"{name}.bias": width} if self.family.norm_bias else found

    def _norms(self, place: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for name in self.family.norms:
            found |= self._norm(f"{place}.{name}", self.hidden)
        whole = self.family.qk_norm == "projection"
        if self.family.qk_norm != "none":
            found |= self._norm(f"{place}.self_attn.q_norm", self.head_dim * (self.heads if whole else 1))
            found |= self._norm(f"{place}.self_attn.k_norm", self.head_dim * (self.kv_heads if whole else 1))
        return found

    def _mlp(self, place: str, layer: int, linears: list[Linear], others: dict[str, int]) -> int:
        """Adds a layer's feed-forward part, and returns its intermediate width for one token."""
        found, experts = self._experts(layer), self.family.experts
        if found is None or experts is None:
            width = int(self.config["intermediate_size"])
            linears += self._feed_forward(place, width)
            return width
        count, width = found
        others[f"{place}.gate.weight"] = count * self.hidden
        others[f"{place}.experts.gate_up_proj"] = count * 2 * width * self.hidden
        others[f"{place}.experts.down_proj"] = count * width * self.hidden
        active = int(self.config["num_experts_per_tok"]) * width
        if experts.shared_width is None:
            return active
        shared = int(self.config[experts.shared_width])
        linears += self._feed_forward(f"{place}.shared_expert", shared)
        linears.append(Linear(f"{place}.shared_expert_gate", self.hidden, 1))
        return active + shared

    def _experts(self, layer: int) -> tuple[int, int] | None:
        """How many experts a layer has, and the width of each; None for a dense layer."""
        experts = self.family.experts
        if experts is None or self._dense(layer):
            return None
        count = next(int(self.config[key]) for key in experts.count if key in self.config)
        return count, int(self.config[experts.width])

    def _dense(self, layer: int) -> bool:
        """Whether a layer of a mixture has no experts (Qwen's `mlp_only_layers` and `decoder_sparse_step`)."""
        step = int(self.config.get("decoder_sparse_step") or 1)
        return layer in (self.config.get("mlp_only_layers") or ()) or (layer + 1) % step != 0

    def _feed_forward(self, place: str, width: int) -> Iterator[Linear]:
        bias = self._says(self.family.mlp_bias)
        if self.family.mlp == "plain":
            yield Linear(f"{place}.fc1", self.hidden, width, bias)
            yield Linear(f"{place}.fc2", width, self.hidden, bias)
            return
        if self.family.mlp == "gated_fused":
            yield Linear(f"{place}.gate_up_proj", self.hidden, 2 * width, bias)
        else:
            yield Linear(f"{place}.gate_proj", self.hidden, width, bias)
            yield Linear(f"{place}.up_proj", self.hidden, width, bias)
        yield Linear(f"{place}.down_proj", width, self.hidden, bias)
