"""The `adapter` section: what of the model is trained, and how. Keys of a LoRA have PEFT's names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from tunedock.recipe.section import Fraction, Section, tagged

Start = Literal[True, "gaussian", "pissa", "olora"] | Annotated[str, Field(pattern=r"^pissa_niter_[1-9][0-9]{0,2}$")]


class Lora(Section):
    kind: Literal["lora"] = "lora"
    r: PositiveInt = 16
    """Rank."""
    alpha: PositiveFloat | None = None
    """Scale numerator; twice the rank by default."""
    dropout: Fraction = 0.0
    target_modules: str | list[str] = "all-linear"
    """Names of modules or their last parts, a regular expression for whole names, or `all-linear` for every linear layer but the
    head."""
    exclude_modules: str | list[str] | None = None
    """Names, or a regular expression, of modules to pass over."""
    layers_to_transform: NonNegativeInt | list[NonNegativeInt] | None = None
    """Numbers of the layers, from 0, that get an adapter; needs `target_modules` as names."""
    rank_pattern: dict[str, PositiveInt] = {}
    """Ranks of some modules: the end of a name, or a regular expression for it -> the rank."""
    alpha_pattern: dict[str, PositiveFloat] = {}
    use_rslora: bool = False
    """Scale by alpha over the root of the rank (rank-stabilised LoRA), not over the rank."""
    use_dora: bool = False
    """Train each weight's length apart from its direction (DoRA)."""
    init_lora_weights: Start = True
    """How the pair starts: at zero, `gaussian` (also at zero), or as the largest part of the weight itself, which the base then
    lacks: `pissa`, `pissa_niter_16` (a quicker decomposition by so many iterations), `olora`. The result is a plain LoRA."""
    loraplus_lr_ratio: PositiveFloat | None = None
    """Learning rate of B over that of A (LoRA+); 16 is usual."""
    modules_to_save: list[str] = []
    """Modules trained whole beside the adapter, by the ends of their names (`norm`, `lm_head`, `embed_tokens`)."""
    continue_from: str | None = None
    """A folder with a LoRA, or a run directory with one: training goes on with it, in the shape it has."""


class Full(Section):
    kind: Literal["full"] = "full"


class Freeze(Section):
    kind: Literal["freeze"] = "freeze"
    last_n_layers: PositiveInt | None = None
    """Train the last n decoder layers."""
    first_n_layers: PositiveInt | None = None
    """Train the first n decoder layers."""
    layer_modules: list[str] = []
    """Of the first or last layers, only parameters whose name contains one of these words (`mlp`, `self_attn`)."""
    trainable_modules: list[str] = []
    """Train parameters of any place whose name contains one of these words (`norm`, `lm_head`)."""


Adapter = Annotated[
    Annotated[Lora | Full | Freeze, Field(discriminator="kind")],
    BeforeValidator(tagged("lora"), json_schema_input_type=Literal["lora", "full", "freeze"] | Lora | Full | Freeze),
]
"""`full` is `{kind: full}`, and `{r: 8}` is a LoRA."""


def leaves_the_base(lora: Lora) -> bool:
    """Whether the pair starts as a part of the weight, which is taken out of the base: PiSSA (arXiv 2404.02948), OLoRA
    (2406.01775)."""
    return isinstance(lora.init_lora_weights, str) and lora.init_lora_weights.startswith(("pissa", "olora"))
